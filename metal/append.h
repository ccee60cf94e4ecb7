// New tokens on their way into a cache, and the queries that come with them. One SIMD-group has one row: a token of a
// head. A lane has four neighbouring dimensions of it, then those 128 behind.
//
//   queries, if there is rotary: out <- R q
//   keys:   cache[length + i] <- R k, or in 8 bits: scale <- max |R k| / largest, cache <- R k / scale
//   values: the same without R
//
// Grid: rows of a batch entry, batch. Slots are found through a block table that is not trusted.
#pragma once

#include "layout.h"
#include "quantize.h"
#include "rotary.h"

namespace mfa {

constant constexpr int kRowStep = 32 * 4;  // dimensions that a SIMD-group has at a time

// Where a token goes.
struct Slot {
  long entry;  // page, or batch entry
  int row;

  Slot(constant AttentionParams& params, constant int* block_table, int batch, int token) : entry(batch), row(token) {
    if (is_paged) {
      const int page = block_table[long(batch) * params.pages_per_sequence + token / params.page_size];
      entry = min(max(page, 0), params.pages - 1);
      row = token % params.page_size;
    }
  }

  long offset(constant long* strides, int head) const {
    return entry * strides[0] + head * strides[1] + row * strides[2];
  }
};

template <typename E>
inline device E* row_of(device E* tensor, constant long* strides, int batch, int head, int row) {
  return tensor + (batch * strides[0] + head * strides[1] + row * strides[2]);
}

template <typename T>
inline void store_rotated(const device T* row, Rotation<T> rotation, device T* target, int dim, ushort lane) {
  for (int d = 4 * lane; d < dim; d += kRowStep) {
    store_quad_guarded(target, float4(rotation.quad(row, d, dim)), d, dim);
  }
}

// As store_rotated, in 8 bits.
template <typename T>
inline void store_quantized(const device T* row, Rotation<T> rotation, device uchar* target, device float* scale,
                            Format format, int dim, ushort lane) {
  uint largest = 0;
  for (int d = 4 * lane; d < dim; d += kRowStep) {
    const vec<T, 4> x = rotation.quad(row, d, dim);
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      largest = max(largest, magnitude(float(x[e])));
    }
  }
  const float unit = format.scale(simd_max(largest));
  if (lane == 0) {
    *scale = unit;
  }
  for (int d = 4 * lane; d < dim; d += kRowStep) {
    const vec<T, 4> x = rotation.quad(row, d, dim);
    float4 codes;
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      const float scaled = float(x[e]) / unit;
      codes[e] = format.is_int8 ? float(int8_of(scaled)) : float(float8_of(scaled, format));
    }
    if (format.is_int8) {
      store_quad_guarded((device char*)target, codes, d, dim);
    } else {
      store_quad_guarded(target, codes, d, dim);
    }
  }
}

template <typename T, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void append(
    const device T* query [[buffer(kQuery), function_constant(has_rotary)]],
    device T* out [[buffer(kOut), function_constant(has_rotary)]], device uchar* key_cache [[buffer(kKey)]],
    device uchar* value_cache [[buffer(kValue)]],
    device float* key_scale [[buffer(kKeyScale), function_constant(key_is_quantized)]],
    device float* value_scale [[buffer(kValueScale), function_constant(value_is_quantized)]],
    const device T* key [[buffer(kNewKey)]], const device T* value [[buffer(kNewValue)]],
    const device int* lengths [[buffer(kKeyLengths), function_constant(has_key_lengths)]],
    device int* new_lengths [[buffer(kNewLengths)]],
    constant int* block_table [[buffer(kBlockTable), function_constant(is_paged)]],
    const device uchar* rotary_cos [[buffer(kRotaryCos), function_constant(has_rotary)]],
    const device uchar* rotary_sin [[buffer(kRotarySin), function_constant(has_rotary)]],
    const device int* rotary_seqlens [[buffer(kRotarySeqlens), function_constant(has_rotary_seqlens)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  const int batch = position.y;
  int length = params.cache_length;
  if (has_key_lengths) {
    length = lengths[batch];
  }
  length = min(max(length, 0), params.key_length - params.new_tokens);
  int first_position = length;
  if (has_rotary_seqlens) {
    first_position = rotary_seqlens[batch];
  }
  long index = long(position.x) * kSimdgroups + simdgroup;
  if (index == 0 && lane == 0) {
    new_lengths[batch] = length + params.new_tokens;
  }

  if (has_rotary) {
    const long queries = long(params.query_heads) * params.query_length;
    if (index < queries) {
      const int head = index / params.query_length;
      const int token = index % params.query_length;
      const Rotation<T> rotation(params, rotary_cos, rotary_sin, first_position, params.queries_advance ? token : 0);
      store_rotated(row_of(query, params.query_strides, batch, head, token), rotation,
                    row_of(out, params.out_strides, batch, head, token), params.head_dim, lane);
      return;
    }
    index -= queries;
  }

  const long rows = long(params.key_heads) * params.new_tokens;  // of keys, then of values
  if (index >= 2 * rows) {
    return;
  }
  const bool is_key = index < rows;
  index -= is_key ? 0 : rows;
  const int head = index / params.new_tokens;
  const int token = index % params.new_tokens;
  const Slot slot(params, block_table, batch, length + token);
  if (is_key) {
    Rotation<T> rotation;
    if (has_rotary) {
      rotation = Rotation<T>(params, rotary_cos, rotary_sin, first_position, token);
    }
    const device T* row = row_of(key, params.new_key_strides, batch, head, token);
    const long offset = slot.offset(params.key_strides, head);
    if (key_is_quantized) {
      store_quantized(row, rotation, key_cache + offset, key_scale + slot.offset(params.key_scale_strides, head),
                      Format{key_is_int8, key_is_e5m2}, params.head_dim, lane);
    } else {
      store_rotated(row, rotation, (device T*)key_cache + offset, params.head_dim, lane);
    }
  } else {
    const device T* row = row_of(value, params.new_value_strides, batch, head, token);
    const long offset = slot.offset(params.value_strides, head);
    if (value_is_quantized) {
      store_quantized(row, Rotation<T>(), value_cache + offset,
                      value_scale + slot.offset(params.value_scale_strides, head), Format{value_is_int8, value_is_e5m2},
                      params.value_dim, lane);
    } else {
      store_rotated(row, Rotation<T>(), (device T*)value_cache + offset, params.value_dim, lane);
    }
  }
}

#define APPEND(dtype, simdgroups)                                      \
  template [[host_name("append_" #dtype "_s" #simdgroups)]] [[kernel]] \
  decltype(append<dtype, simdgroups>) append<dtype, simdgroups>;

}  // namespace mfa
