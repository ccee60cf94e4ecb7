// Rows of a tensor on their way to fragments: guarded loads from device memory, and copies into threadgroup memory.
// Each kind of rows has pair(), quad() and octet(): two, four or eight elements from d on of a row, which is given as a
// tile of eight and a row in it, since tiles are known when a kernel is compiled. load_left() and its like fill sets of
// fragments from them.
#pragma once

#include "fragment.h"
#include "geometry.h"
#include "layout.h"

namespace mfa {

// A tile of rows in threadgroup memory. Tails are zeros already, so loads need no guard.
template <typename T, int kDim, Loads kLoads>
struct StagedRows {
  static constant constexpr int kStride = padded_row_bytes(kDim, sizeof(T), kLoads) / sizeof(T);

  const threadgroup T* base;

  vec<T, 2> pair(short tile, short row, short d) const {
    return load_pair(base + (tile * kFragment + row) * kStride + d);
  }
  vec<T, 4> quad(short tile, short row, short d) const {
    return load_quad(base + (tile * kFragment + row) * kStride + d);
  }
  Octet<T> octet(short tile, short row, short d) const {
    return load_octet(base + (tile * kFragment + row) * kStride + d);
  }
};

// The pair at d, of the quad that it lies in.
template <typename T>
inline vec<T, 2> pair_of_quad(vec<T, 4> x, short d) {
  return (d & 2) != 0 ? x.zw : x.xy;
}

// Rows in device memory of any alignment and any head dimension: zeros where the rows or the dimension end.
template <typename T>
struct GuardedRows {
  const device T* base;
  long stride;
  int valid, dim;

  vec<T, 2> pair(short tile, short row, short d) const { return pair_of_quad(quad(tile, row, d & ~3), d); }

  vec<T, 4> quad(short tile, short row_in_tile, short d) const {
    const int row = tile * kFragment + row_in_tile;
    const device T* source = base + row * stride + d;
    if (is_aligned && row < valid && d + 4 <= dim) {
      return load_quad(source);
    }
    vec<T, 4> x;
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      x[e] = row < valid && d + e < dim ? source[e] : T(0);
    }
    return x;
  }

  Octet<T> octet(short tile, short row_in_tile, short d) const {
    const int row = tile * kFragment + row_in_tile;
    const device T* source = base + row * stride + d;
    if (is_aligned && row < valid && d + 8 <= dim) {
      return load_octet(source);
    }
    Octet<T> x;
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      x.low[e] = row < valid && d + e < dim ? source[e] : T(0);
      x.high[e] = row < valid && d + 4 + e < dim ? source[4 + e] : T(0);
    }
    return x;
  }
};

// Set `set` of kDim columns of a tile of rows: as right operand,
template <int kDim, typename T, typename Rows>
inline void load_right(thread Fragment<T>* fragments, Rows rows, short tile, short set, Lane lane) {
  const short d = set * kSetWidth;
  if (is_whole<kDim>(set)) {
    fill_right(fragments, rows.octet(tile, lane.row, d + 4 * lane.column));
  } else {
    fill_right(fragments, rows.quad(tile, lane.row, d + 2 * lane.column));
  }
}

// and as left one or, transposed, as right one. The matrix unit takes all of them as they are stored.
#ifdef MFA_MATRIX_UNIT
template <int kDim, typename T, typename Rows>
inline void load_left(thread Fragment<T>* fragments, Rows rows, short tile, short set, Lane lane) {
  load_right<kDim>(fragments, rows, tile, set, lane);
}

template <int kDim, typename T, typename Rows>
inline void load_right_transposed(thread Fragment<T>* fragments, Rows rows, short tile, short set, Lane lane) {
  load_right<kDim>(fragments, rows, tile, set, lane);
}
#else
template <int kDim, typename T, typename Rows>
inline void load_left(thread Fragment<T>* fragments, Rows rows, short tile, short set, Lane lane) {
  const short d = set * kSetWidth;
  if (is_whole<kDim>(set)) {
    fill_left(fragments, rows.octet(tile, lane.row, d + 4 * lane.column));
  } else {
    fill_left(fragments, rows.quad(tile, lane.row, d + 2 * lane.column));
  }
}

template <int kDim, typename T, typename Rows>
inline void load_right_transposed(thread Fragment<T>* fragments, Rows rows, short tile, short set, Lane lane) {
  if (is_whole<kDim>(set)) {
    const short d = set * kSetWidth + 4 * lane.row;
    fill_right_transposed(fragments, rows.quad(tile, lane.column, d), rows.quad(tile, lane.column + 1, d));
  } else {
    const short d = set * kSetWidth + 2 * lane.row;
    fill_right_transposed(fragments, rows.pair(tile, lane.column, d), rows.pair(tile, lane.column + 1, d));
  }
}
#endif

// All rows of one head of a sequence.
template <typename T>
struct HeadRows {
  const device T* base;
  long stride;
  int length, dim;

  HeadRows(const device T* tensor, constant long* strides, int batch, int head, int first, int length_, int dim_)
      : base(tensor + (uint(batch) * strides[0] + uint(head) * strides[1] + uint(first) * strides[2])),
        stride(strides[2]),
        length(length_),
        dim(dim_) {}

  GuardedRows<T> from(int row) const { return {base + uint(row) * stride, stride, length - row, dim}; }
};

// Those of Q, or of what is laid out like it; and those of K or V.
template <typename T>
inline HeadRows<T> query_rows(const device T* tensor, constant long* strides, Sequence sequence, int head, int dim) {
  return {tensor, strides, sequence.index, head, sequence.first_query, sequence.query_length, dim};
}

template <typename T>
inline HeadRows<T> key_rows(const device T* tensor, constant long* strides, Sequence sequence, int head, int dim) {
  return {tensor, strides, sequence.index, head, sequence.first_key, sequence.key_length, dim};
}

template <typename T>
inline void store_octet_guarded(device T* row, Octet<float> x, int d, int dim) {
  const Octet<T> y = {vec<T, 4>(x.low), vec<T, 4>(x.high)};
  if (is_aligned && d + 8 <= dim) {
    store_octet(row + d, y);
    return;
  }
  MFA_UNROLL
  for (short e = 0; e < 4; ++e) {
    if (d + e < dim) {
      row[d + e] = y.low[e];
    }
    if (d + 4 + e < dim) {
      row[d + 4 + e] = y.high[e];
    }
  }
}

template <typename T>
inline void store_quad_guarded(device T* row, float4 x, int d, int dim) {
  const vec<T, 4> y = vec<T, 4>(x);
  if (is_aligned && d + 4 <= dim) {
    *(device vec<T, 4>*)(row + d) = y;
    return;
  }
  MFA_UNROLL
  for (short e = 0; e < 4; ++e) {
    if (d + e < dim) {
      row[d + e] = y[e];
    }
  }
}

template <typename T>
inline void store_pair_guarded(device T* row, float2 x, int d, int dim) {
  MFA_UNROLL
  for (short e = 0; e < 2; ++e) {
    if (d + e < dim) {
      row[d + e] = T(x[e]);
    }
  }
}

// 16 bytes of a row from d on, with zeros from element `dim` on.
template <typename T>
inline void copy_chunk(threadgroup T* target, const device T* source, bool is_valid, int d, int dim) {
  constexpr int kChunk = 16 / sizeof(T);
  if (is_aligned && is_valid && d + kChunk <= dim) {
    *(threadgroup uint4*)target = *(const device uint4*)source;
    return;
  }
  MFA_UNROLL
  for (short e = 0; e < kChunk; ++e) {
    target[e] = is_valid && d + e < dim ? source[e] : T(0);
  }
}

// Copies kRows rows of up to kDim elements into a padded tile, with zeros from row `valid` and element `dim` on. Walks
// 16-byte chunks, not rows: kThreads does not divide every row length.
template <typename T, int kRows, int kDim, Loads kLoads, int kThreads>
inline void stage_rows(threadgroup T* tile, GuardedRows<T> rows, ushort thread_index) {
  constexpr int kChunk = 16 / sizeof(T);
  constexpr int kChunksPerRow = kDim / kChunk;
  for (int chunk = thread_index; chunk < kRows * kChunksPerRow; chunk += kThreads) {
    const int row = chunk / kChunksPerRow;
    const int d = chunk % kChunksPerRow * kChunk;
    copy_chunk(tile + row * StagedRows<T, kDim, kLoads>::kStride + d, rows.base + row * rows.stride + d,
               row < rows.valid, d, rows.dim);
  }
}

}  // namespace mfa
