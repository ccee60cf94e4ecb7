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

}  // namespace mfa

#ifdef MFA_MATRIX_UNIT
#include "unit/products.h"
#else
#include "products.h"
#endif

namespace mfa {

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
