// K or V of one (batch entry, key head) in a cache: dense or paged, of the query's dtype or quantized to 8 bits with a
// scale per token. Pages are found through a block table that is not trusted, and nothing from `length` on is read.
#pragma once

#include "device_rows.h"
#include "layout.h"

namespace mfa {

// How K or V lie in their cache: in the kernel's own type, or as 8-bit numbers. Function constants, so that it costs
// nothing to ask.
struct CacheFormat {
  bool is_quantized, is_int8, is_e5m2;

  template <typename T>
  int element_size() const {
    return is_quantized ? 1 : sizeof(T);
  }

  // Four values from d on of a row, without their scale; zeros where the dimension ends, or the row isn't valid.
  template <typename T>
  vec<T, 4> quad(const device uchar* row, bool is_valid, int d, int dim) const {
    if (is_aligned && is_valid && d + 4 <= dim) {
      return wide_quad<T>(row, d / 4);
    }
    vec<T, 4> x;
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      x[e] = is_valid && d + e < dim ? element<T>(row, d + e) : T(0);
    }
    return x;
  }

  // By its index in quads.
  template <typename T>
  vec<T, 4> wide_quad(const device uchar* base, uint index) const {
    if (!is_quantized) {
      return load_quad((const device T*)base + 4 * ulong(index));
    }
    MFA_COUNT_FRAGMENT_LOAD();
    if (is_int8) {
      return vec<T, 4>(float4(((const device char4*)base)[index]));  // bfloat has no constructor from integers
    }
    const uchar4 x = ((const device uchar4*)base)[index];
    return vec<T, 4>(T(float8_value(x.x)), T(float8_value(x.y)), T(float8_value(x.z)), T(float8_value(x.w)));
  }

  template <typename T>
  T element(const device uchar* row, int d) const {
    if (!is_quantized) {
      return ((const device T*)row)[d];
    }
    return is_int8 ? T(((const device char*)row)[d]) : T(float8_value(row[d]));
  }

  // float8_e5m2 is the upper half of a half. float8_e4m3fn: its exponent and mantissa, moved into a half, are the value
  // / 256; 0x7f is NaN.
  float float8_value(uchar x) const {
    if (is_e5m2) {
      return float(as_type<half>(ushort(x << 8)));
    }
    const half magnitude = as_type<half>(ushort((x & 0x7f) << 7)) * half(256);
    const half value = (x & 0x80) != 0 ? -magnitude : magnitude;
    return (x & 0x7f) == 0x7f ? NAN : float(value);
  }
};

inline CacheFormat key_format() { return {key_is_quantized, key_is_int8, key_is_e5m2}; }
inline CacheFormat value_format() { return {value_is_quantized, value_is_int8, value_is_e5m2}; }

template <typename T>
struct Cache {
  CacheFormat format;
  const device uchar* base;    // the head's first live row, of the batch entry, or its row 0 of page 0
  constant int* table;         // the entry's pages
  const device float* scales;  // as base
  long page_stride, row_stride, scale_page_stride, scale_row_stride;
  int page_size, pages;
  int first, length, dim;  // of a paged cache, `first` is the slot of the first live row

  Cache(constant AttentionParams& params, CacheFormat format_, const device uchar* cache, constant int* block_table,
        const device float* scales_, constant long* strides, constant long* scale_strides, Sequence sequence, int head,
        int dim_)
      : format(format_),
        base(cache +
             ((is_paged ? 0 : sequence.index * strides[0] + sequence.first_key * strides[2]) + head * strides[1]) *
                 format_.element_size<T>()),
        table(is_paged ? block_table + long(sequence.index) * params.pages_per_sequence : nullptr),
        scales(nullptr),
        page_stride(strides[0]),
        row_stride(strides[2]),
        scale_page_stride(0),
        scale_row_stride(0),
        page_size(params.page_size),
        pages(params.pages),
        first(sequence.first_key),
        length(sequence.key_length),
        dim(dim_) {
    if (format.is_quantized) {
      scales = scales_ + ((is_paged ? 0 : sequence.index * scale_strides[0] + first * scale_strides[2]) +
                          head * scale_strides[1]);
      scale_page_stride = scale_strides[0];
      scale_row_stride = scale_strides[2];
    }
  }

  // Of a key before `length`.
  long offset(int key, long page_step, long row_step) const {
    if (is_paged) {
      const int slot = key + first;
      const int page = min(max(table[slot / page_size], 0), pages - 1);
      return page * page_step + slot % page_size * row_step;
    }
    return key * row_step;
  }

  long row_bytes() const { return row_stride * format.element_size<T>(); }
  const device uchar* row(int key) const {
    return base + offset(key, page_stride, row_stride) * format.element_size<T>();
  }
  vec<T, 4> quad(const device uchar* row, bool is_valid, int d) const { return format.quad<T>(row, is_valid, d, dim); }
  float scale(int key) const { return key < length ? scales[offset(key, scale_page_stride, scale_row_stride)] : 0; }
};

// Those of K and V.
template <typename T>
struct Caches {
  Cache<T> keys, values;

  Caches(constant AttentionParams& params, const device uchar* key, const device uchar* value,
         constant int* block_table, const device float* key_scale, const device float* value_scale, Sequence sequence,
         int head, int head_dim, int value_dim)
      : keys(params, key_format(), key, block_table, key_scale, params.key_strides, params.key_scale_strides, sequence,
             head, head_dim),
        values(params, value_format(), value, block_table, value_scale, params.value_strides,
               params.value_scale_strides, sequence, head, value_dim) {}
};

// A block of keys, as DeviceRows. A tile of eight lies in one page, which is looked up once: pages hold a multiple of
// eight, or else there is one per entry; and the first live row of a paged cache is that of a page, or there is one per
// entry.
template <typename T, int kTiles, int kDim, Loads kLoads>
struct CacheRows {
  static_assert(kDim >= kSetWidth && kLoads != both, "see own_part");

  CacheFormat format;
  const device uchar* tiles[kTiles];  // and this lane's part; without pages all are the block
  long stride;
  int last, dim;
  short own;

  CacheRows(Cache<T> cache, int first_key, Lane lane)
      : format(cache.format),
        stride(cache.row_stride),
        last(cache.length - 1 - first_key),
        dim(cache.dim),
        own(own_part<kLoads>(lane)) {
    MFA_UNROLL
    for (short t = 0; t < kTiles; ++t) {
      tiles[t] = cache.row(first_key + (is_paged ? min(t * kFragment, last) : 0)) + own * format.element_size<T>();
    }
  }

  // In a page: a tile past the last row has that row alone.
  int row_of(short tile, short row) const {
    return is_paged ? max(min(int(row), last - tile * kFragment), 0) : row_to_read(tile, row, last);
  }

  vec<T, 2> pair(short tile, short row, short d) const { return pair_of_quad(quad(tile, row, d & ~3), d); }

  vec<T, 4> quad(short tile, short row, short d) const {
    const int source = row_of(tile, row);
    const vec<T, 4> x =
        is_aligned && (is_exact_head || d + 4 <= dim)
            ? format.wide_quad<T>(tiles[tile], chunk_index(source, stride, d - own, 4))
            : format.quad<T>(tiles[tile] + (source * stride - own) * format.element_size<T>(), true, d, dim);
    return reads_as_zeros<kLoads>(tile, row, last) ? vec<T, 4>(0) : x;
  }

  Octet<T> octet(short tile, short row, short d) const {
    if (format.is_quantized || !is_aligned || (!is_exact_head && d + 8 > dim)) {
      return {quad(tile, row, d), quad(tile, row, d + 4)};
    }
    const Octet<T> x = load_octet((const device T*)tiles[tile], row_of(tile, row), stride, d - own);
    const bool zeros = reads_as_zeros<kLoads>(tile, row, last);
    return {zeros ? vec<T, 4>(0) : x.low, zeros ? vec<T, 4>(0) : x.high};
  }
};

// As stage_rows, of the keys from `first_key` on.
template <typename T, int kRows, int kDim, Loads kLoads, int kThreads>
inline void stage_cache(threadgroup T* tile, thread const Cache<T>& cache, int first_key, ushort thread_index) {
  constexpr int kChunk = 16 / sizeof(T);
  constexpr int kChunksPerRow = kDim / kChunk;
  for (int chunk = thread_index; chunk < kRows * kChunksPerRow; chunk += kThreads) {
    const int row = chunk / kChunksPerRow;
    const int d = chunk % kChunksPerRow * kChunk;
    const bool is_valid = first_key + row < cache.length;
    const device uchar* source = is_valid ? cache.row(first_key + row) : cache.base;
    threadgroup T* target = tile + row * StagedRows<T, kDim, kLoads>::kStride + d;
    if (!cache.format.is_quantized && is_aligned && is_valid && d + kChunk <= cache.dim) {
      *(threadgroup uint4*)target = *(const device uint4*)((const device T*)source + d);
      continue;
    }
    MFA_UNROLL
    for (short e = 0; e < kChunk; e += 4) {
      *(threadgroup vec<T, 4>*)(target + e) = cache.quad(source, is_valid, d + e);
    }
  }
}

}  // namespace mfa
