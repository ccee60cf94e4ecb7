// Tiles of fragments and the two products that attention is made of. S = A B' contracts over the head dimension, a set
// at a time; C += P B contracts over rows, and takes P straight from the registers that S was computed in.
#pragma once

#include "staged.h"

namespace mfa {

// Left operands, of kDim columns. fill() gives set s of row tile r.

// Rows kept in registers.
template <typename T, int kRowTiles, int kDim>
struct HeldRows {
  Fragment<T> fragments[kRowTiles][kDim / kFragment];

  template <typename Rows>
  void load(Rows rows, Lane lane) {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short s = 0; s < sets_of(kDim); ++s) {
        load_left<kDim>(&fragments[r][s * kSetFragments], rows, r, s, lane);
      }
    }
  }

  void fill(thread Fragment<T>* set, short r, short s, Lane) const {
    MFA_UNROLL
    for (short j = 0; j < kSetFragments; ++j) {
      if (j < fragments_of<kDim>(s)) {
        set[j] = fragments[r][s * kSetFragments + j];
      }
    }
  }
};

// Rows read again for every product: they cost no registers.
template <typename T, int kDim, typename Rows>
struct ReadRows {
  Rows rows;

  void fill(thread Fragment<T>* set, short r, short s, Lane lane) const { load_left<kDim>(set, rows, r, s, lane); }
};

// A SIMD-group's own rows: one or the other.
template <typename T, Own kOwn, int kRowTiles, int kDim, typename Rows>
struct OwnOperand {
  HeldRows<T, kRowTiles, kDim> operand;

  OwnOperand(Rows rows, Lane lane) { operand.load(rows, lane); }
};

template <typename T, int kRowTiles, int kDim, typename Rows>
struct OwnOperand<T, reread, kRowTiles, kDim, Rows> {
  ReadRows<T, kDim, Rows> operand;

  OwnOperand(Rows rows, Lane) : operand{rows} {}
};

template <int kRowTiles, int kColumnTiles>
inline void clear(thread Fragment<float> (&tile)[kRowTiles][kColumnTiles]) {
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    MFA_UNROLL
    for (short n = 0; n < kColumnTiles; ++n) {
      tile[r][n] = float2(0);
    }
  }
}

// In float32 a long sum is made of parts, each summed by itself first: one chain would lose more than PyTorch's own
// matrix products do. In 16-bit types the rounding of the inputs hides that.
template <typename T>
constant constexpr bool kSumsInParts = sizeof(T) == 4;

// Adds `columns` of a part to the columns `first` ... of the result.
template <int kRowTiles, int kColumnTiles, int kPartTiles>
inline void add_part(thread Fragment<float> (&result)[kRowTiles][kColumnTiles],
                     thread Fragment<float> (&part)[kRowTiles][kPartTiles], short first, short columns) {
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    MFA_UNROLL
    for (short c = 0; c < kPartTiles; ++c) {
      if (c < columns) {
        result[r][first + c] += part[r][c];
      }
    }
  }
}

// Column tiles of S that are loaded together: with two row tiles, four independent accumulation chains hide the latency
// of an MMA.
template <typename Left>
constant constexpr int kMostTogether = 2;

// S = A B': kDim values of the head dimension, kColumnTiles * 8 rows of B.
template <typename T, int kDim, int kRowTiles, int kColumnTiles, typename Left, typename Rows>
inline void multiply_transposed(thread Fragment<float> (&result)[kRowTiles][kColumnTiles], thread const Left& left,
                                Rows rows, Lane lane) {
  constexpr int kTogether = kColumnTiles % 2 == 0 ? kMostTogether<Left> : 1;
  clear(result);
  MFA_UNROLL
  for (short s = 0; s < sets_of(kDim); ++s) {
    Fragment<T> a[kRowTiles][kSetFragments];
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      left.fill(a[r], r, s, lane);
    }
    MFA_UNROLL
    for (short first = 0; first < kColumnTiles; first += kTogether) {
      Fragment<T> b[kTogether][kSetFragments];
      MFA_UNROLL
      for (short c = 0; c < kTogether; ++c) {
        load_right_transposed<kDim>(b[c], rows, first + c, s, lane);
      }
      Fragment<float> part[kRowTiles][kTogether];
      clear(part);
      MFA_UNROLL
      for (short j = 0; j < kSetFragments; ++j) {
        if (j >= fragments_of<kDim>(s)) {
          continue;
        }
        MFA_UNROLL
        for (short c = 0; c < kTogether; ++c) {
          MFA_UNROLL
          for (short r = 0; r < kRowTiles; ++r) {
            thread Fragment<float>& sum = kSumsInParts<T> ? part[r][c] : result[r][first + c];
            sum = multiply_add(a[r][j], b[c][j], sum);
          }
        }
      }
      if (kSumsInParts<T>) {
        add_part(result, part, first, kTogether);
      }
    }
  }
}

// C += P B: kInnerTiles * 8 rows of B, kDim of its columns.
template <typename T, int kDim, int kRowTiles, int kInnerTiles, typename Rows>
inline void multiply_accumulate(thread Fragment<float> (&result)[kRowTiles][kDim / kFragment],
                                thread Fragment<float> (&left)[kRowTiles][kInnerTiles], Rows rows, Lane lane) {
  MFA_UNROLL
  for (short s = 0; s < sets_of(kDim); ++s) {
    const short first = s * kSetFragments;
    Fragment<float> part[kRowTiles][kSetFragments];
    clear(part);
    MFA_UNROLL
    for (short k = 0; k < kInnerTiles; ++k) {
      Fragment<T> b[kSetFragments];
      load_right<kDim>(b, rows, k, s, lane);
      MFA_UNROLL
      for (short j = 0; j < kSetFragments; ++j) {
        if (j >= fragments_of<kDim>(s)) {
          continue;
        }
        MFA_UNROLL
        for (short r = 0; r < kRowTiles; ++r) {
          thread Fragment<float>& sum = kSumsInParts<T> ? part[r][j] : result[r][first + j];
          sum = multiply_add(left[r][k], b[j], sum);
        }
      }
    }
    if (kSumsInParts<T>) {
      add_part(result, part, first, fragments_of<kDim>(s));
    }
  }
}

// Writes this lane's part of set s of a result accumulated by multiply_accumulate, times factor, to a row in device
// memory.
template <int kDim, typename T>
inline void store_set(device T* row, int dim, thread Fragment<float>* set, short s, float factor, Lane lane) {
  if (is_whole<kDim>(s)) {
    Octet<float> x = octet_of(set);
    x.low *= factor;
    x.high *= factor;
    store_octet_guarded(row, x, s * kSetWidth + 4 * lane.column, dim);
  } else {
    store_quad_guarded(row, quad_of(set) * factor, s * kSetWidth + 2 * lane.column, dim);
  }
}

// All sets of rows first_row ... of `length`, each scaled by factor[r]. Rows are counted from where `rows` points, so
// that nothing of what a kernel loads its own rows with has to outlive the main loop.
template <typename T, int kDim, int kRowTiles>
inline void store_rows(device T* rows, long stride, int first_row, int length, int dim,
                       thread Fragment<float> (&tile)[kRowTiles][kDim / kFragment], thread const float* factor,
                       Lane lane) {
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    const int row = first_row + lane.row + r * kFragment;
    if (row < length) {
      MFA_UNROLL
      for (short s = 0; s < sets_of(kDim); ++s) {
        store_set<kDim>(rows + uint(row) * stride, dim, &tile[r][s * kSetFragments], s, factor[r], lane);
      }
    }
  }
}

}  // namespace mfa
