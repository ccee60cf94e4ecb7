// Tiles of fragments and the two products that attention is made of. S = A B' contracts over the head dimension, a set
// at a time; C += P B contracts over rows, and takes P straight from the registers that S was computed in.
#pragma once

#include "loader.h"

namespace mfa {

// Left operands. fill() gives set s (32 values of the head dimension) of row tile r.

// Rows kept in registers.
template <typename T, int kRowTiles, int kSets>
struct HeldRows {
  Fragment<T> fragments[kRowTiles][kSets * kSetFragments];

  template <typename Rows>
  void load(Rows rows, Lane lane) {
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (short s = 0; s < kSets; ++s) {
        fill_left(&fragments[r][s * kSetFragments], rows.octet(r, lane.row, s * kSetWidth + 4 * lane.column));
      }
    }
  }

  void fill(thread Fragment<T>* set, short r, short s, Lane) const {
#pragma unroll
    for (short j = 0; j < kSetFragments; ++j) {
      set[j] = fragments[r][s * kSetFragments + j];
    }
  }
};

// Rows read again for every product: they cost no registers.
template <typename T, typename Rows>
struct ReadRows {
  Rows rows;

  void fill(thread Fragment<T>* set, short r, short s, Lane lane) const {
    fill_left(set, rows.octet(r, lane.row, s * kSetWidth + 4 * lane.column));
  }
};

template <int kRowTiles, int kColumnTiles>
inline void clear(thread Fragment<float> (&tile)[kRowTiles][kColumnTiles]) {
#pragma unroll
  for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (short n = 0; n < kColumnTiles; ++n) {
      elements(tile[r][n]) = float2(0);
    }
  }
}

// In float32 a long sum is made of parts, each summed by itself first: one chain would lose more than PyTorch's own
// matrix products do. In 16-bit types the rounding of the inputs hides that.
template <typename T>
constant constexpr bool kSumsInParts = sizeof(T) == 4;

// Adds to the columns `first` ... of the result.
template <int kRowTiles, int kColumnTiles, int kPartTiles>
inline void add_part(thread Fragment<float> (&result)[kRowTiles][kColumnTiles],
                     thread Fragment<float> (&part)[kRowTiles][kPartTiles], short first) {
#pragma unroll
  for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (short c = 0; c < kPartTiles; ++c) {
      elements(result[r][first + c]) += elements(part[r][c]);
    }
  }
}

// S = A B': kSets * 32 values of the head dimension, kColumnTiles * 8 rows of B.
template <typename T, int kSets, int kRowTiles, int kColumnTiles, typename Left, typename Rows>
inline void multiply_transposed(thread Fragment<float> (&result)[kRowTiles][kColumnTiles], thread const Left& left,
                                Rows rows, Lane lane) {
  // Column tiles loaded together: with two row tiles, four independent accumulation chains hide the latency of an MMA.
  constexpr int kTogether = kColumnTiles % 2 == 0 ? 2 : 1;
  clear(result);
#pragma unroll
  for (short s = 0; s < kSets; ++s) {
    const short d = s * kSetWidth + 4 * lane.row;
    Fragment<T> a[kRowTiles][kSetFragments];
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
      left.fill(a[r], r, s, lane);
    }
#pragma unroll
    for (short first = 0; first < kColumnTiles; first += kTogether) {
      Fragment<T> b[kTogether][kSetFragments];
#pragma unroll
      for (short c = 0; c < kTogether; ++c) {
        fill_right_transposed(b[c], rows.quad(first + c, lane.column, d), rows.quad(first + c, lane.column + 1, d));
      }
      Fragment<float> part[kRowTiles][kTogether];
      clear(part);
#pragma unroll
      for (short j = 0; j < kSetFragments; ++j) {
#pragma unroll
        for (short c = 0; c < kTogether; ++c) {
#pragma unroll
          for (short r = 0; r < kRowTiles; ++r) {
            thread Fragment<float>& sum = kSumsInParts<T> ? part[r][c] : result[r][first + c];
            simdgroup_multiply_accumulate(sum, a[r][j], b[c][j], sum);
          }
        }
      }
      if (kSumsInParts<T>) {
        add_part(result, part, first);
      }
    }
  }
}

// C += P B: kInnerTiles * 8 rows of B, kSets * 32 of its columns.
template <typename T, int kSets, int kRowTiles, int kInnerTiles, typename Rows>
inline void multiply_accumulate(thread Fragment<float> (&result)[kRowTiles][kSets * kSetFragments],
                                thread Fragment<float> (&left)[kRowTiles][kInnerTiles], Rows rows, Lane lane) {
#pragma unroll
  for (short s = 0; s < kSets; ++s) {
    const short first = s * kSetFragments;
    Fragment<float> part[kRowTiles][kSetFragments];
    clear(part);
#pragma unroll
    for (short k = 0; k < kInnerTiles; ++k) {
      Fragment<T> b[kSetFragments];
      fill_right(b, rows.octet(k, lane.row, s * kSetWidth + 4 * lane.column));
#pragma unroll
      for (short j = 0; j < kSetFragments; ++j) {
#pragma unroll
        for (short r = 0; r < kRowTiles; ++r) {
          thread Fragment<float>& sum = kSumsInParts<T> ? part[r][j] : result[r][first + j];
          simdgroup_multiply_accumulate(sum, left[r][k], b[j], sum);
        }
      }
    }
    if (kSumsInParts<T>) {
      add_part(result, part, first);
    }
  }
}

// Writes rows of a result accumulated by multiply_accumulate, each scaled by factor[r], to device memory.
template <typename T, int kSets, int kRowTiles>
inline void store_rows(device T* rows, long stride, int valid, int dim,
                       thread Fragment<float> (&tile)[kRowTiles][kSets * kSetFragments], thread const float* factor,
                       Lane lane) {
#pragma unroll
  for (short r = 0; r < kRowTiles; ++r) {
    const int row = r * kFragment + lane.row;
    if (row < valid) {
#pragma unroll
      for (short s = 0; s < kSets; ++s) {
        Octet<float> x = octet_of(&tile[r][s * kSetFragments]);
        x.low *= factor[r];
        x.high *= factor[r];
        store_octet_guarded(rows + row * stride, x, s * kSetWidth + 4 * lane.column, dim);
      }
    }
  }
}

}  // namespace mfa
