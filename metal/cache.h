// K or V of one (batch entry, key head) in a cache: dense or paged, of the query's dtype or quantized to 8 bits with a
// scale per token. Pages are found through a block table that is not trusted, and nothing from `length` on is read.
#pragma once

#include "layout.h"
#include "loader.h"

namespace mfa {

// float8_e4m3fn: its exponent and mantissa, moved into a half, are the value / 256; 0x7f is NaN.
inline float float8_value(uchar x) {
  const half magnitude = as_type<half>(ushort((x & 0x7f) << 7)) * half(256);
  const half value = (x & 0x80) != 0 ? -magnitude : magnitude;
  return (x & 0x7f) == 0x7f ? NAN : float(value);
}

template <typename T>
struct Cache {
  const device uchar* base;    // the head's row 0, of the batch entry or of page 0
  constant int* table;         // the entry's pages
  const device float* scales;  // as base
  long page_stride, row_stride, scale_page_stride, scale_row_stride;
  int page_size, pages;
  int length, dim;

  Cache(constant AttentionParams& params, const device uchar* cache, constant int* block_table,
        const device float* scales_, constant long* strides, constant long* scale_strides, int batch, int head,
        int length_, int dim_)
      : base(cache + ((is_paged ? 0 : batch * strides[0]) + head * strides[1]) * element_size()),
        table(is_paged ? block_table + long(batch) * params.pages_per_sequence : nullptr),
        scales(is_quantized ? scales_ + ((is_paged ? 0 : batch * scale_strides[0]) + head * scale_strides[1])
                            : nullptr),
        page_stride(strides[0]),
        row_stride(strides[2]),
        scale_page_stride(is_quantized ? scale_strides[0] : 0),
        scale_row_stride(is_quantized ? scale_strides[2] : 0),
        page_size(params.page_size),
        pages(params.pages),
        length(length_),
        dim(dim_) {}

  static int element_size() { return is_quantized ? 1 : sizeof(T); }

  // Of a key before `length`.
  long offset(int key, long page_step, long row_step) const {
    if (is_paged) {
      const int page = min(max(table[key / page_size], 0), pages - 1);
      return page * page_step + key % page_size * row_step;
    }
    return key * row_step;
  }

  const device uchar* row(int key) const { return base + offset(key, page_stride, row_stride) * element_size(); }
  float scale(int key) const { return key < length ? scales[offset(key, scale_page_stride, scale_row_stride)] : 0; }

  // Four values from d on of a row, without their scale; zeros where the dimension ends, or the row isn't valid.
  static vec<T, 4> quad(const device uchar* row, bool is_valid, int d, int dim) {
    if (is_aligned && is_valid && d + 4 <= dim) {
      return wide_quad(row, d);
    }
    vec<T, 4> x;
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      x[e] = is_valid && d + e < dim ? element(row, d + e) : T(0);
    }
    return x;
  }

  static vec<T, 4> wide_quad(const device uchar* row, int d) {
    if (!is_quantized) {
      return load_quad((const device T*)row + d);
    }
    MFA_COUNT_FRAGMENT_LOAD();
    if (is_int8) {
      return vec<T, 4>(float4(*(const device char4*)(row + d)));  // bfloat has no constructor from integers
    }
    const uchar4 x = *(const device uchar4*)(row + d);
    return vec<T, 4>(T(float8_value(x.x)), T(float8_value(x.y)), T(float8_value(x.z)), T(float8_value(x.w)));
  }

  static T element(const device uchar* row, int d) {
    if (is_quantized) {
      return is_int8 ? T(((const device char*)row)[d]) : T(float8_value(row[d]));
    }
    return ((const device T*)row)[d];
  }
};

// Those of K and V.
template <typename T>
struct Caches {
  Cache<T> keys, values;

  Caches(constant AttentionParams& params, const device uchar* key, const device uchar* value,
         constant int* block_table, const device float* key_scale, const device float* value_scale, Sequence sequence,
         int head, int head_dim, int value_dim)
      : keys(params, key, block_table, key_scale, params.key_strides, params.key_scale_strides, sequence.index, head,
             sequence.key_length, head_dim),
        values(params, value, block_table, value_scale, params.value_strides, params.value_scale_strides,
               sequence.index, head, sequence.key_length, value_dim) {}
};

// A block of keys. Page sizes are multiples of eight, so that a tile lies in one page, which is looked up once.
template <typename T, int kTiles>
struct CacheRows {
  const device uchar* tiles[kTiles];
  long row_bytes;
  int valid, dim;

  CacheRows(Cache<T> cache, int first_key)
      : row_bytes(cache.row_stride * Cache<T>::element_size()), valid(cache.length - first_key), dim(cache.dim) {
    MFA_UNROLL
    for (short t = 0; t < kTiles; ++t) {
      tiles[t] = t * kFragment < valid ? cache.row(first_key + t * kFragment) : cache.base;
    }
  }

  vec<T, 4> quad(short tile, short row, short d) const {
    return Cache<T>::quad(tiles[tile] + row * row_bytes, tile * kFragment + row < valid, d, dim);
  }

  vec<T, 2> pair(short tile, short row, short d) const { return pair_of_quad(quad(tile, row, d & ~3), d); }

  Octet<T> octet(short tile, short row, short d) const {
    if (!is_quantized && is_aligned && tile * kFragment + row < valid && d + 8 <= dim) {
      return load_octet((const device T*)(tiles[tile] + row * row_bytes) + d);
    }
    return {quad(tile, row, d), quad(tile, row, d + 4)};
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
    if (!is_quantized && is_aligned && is_valid && d + kChunk <= cache.dim) {
      *(threadgroup uint4*)target = *(const device uint4*)((const device T*)source + d);
      continue;
    }
    MFA_UNROLL
    for (short e = 0; e < kChunk; e += 4) {
      *(threadgroup vec<T, 4>*)(target + e) = Cache<T>::quad(source, is_valid, d + e, cache.dim);
    }
  }
}

}  // namespace mfa
