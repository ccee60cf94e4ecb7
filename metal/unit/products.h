// The two products that attention is made of, on the matrix unit (product.h); included by tile.h.
#pragma once

#include "product.h"
#include "rows.h"

namespace mfa {

// Four neighbours of a row.
template <typename T>
inline vec<T, 4> quad_at(thread const Fragment<T>* pair) {
  return vec<T, 4>(pair[0], pair[1]);
}

// Sets of a left operand that a step of a loop takes: all of one that lies in registers. Of one that is read again,
// MLX's 64 columns or fewer, so that it remains a loop: unrolled, it would be read ahead of the loop over blocks, and
// all loads of a block at once, into registers that are not there.
template <typename Left, int kDim>
constant constexpr int kSetsPerStep = sets_of(kDim);
template <typename T, int kDim, typename Rows>
constant constexpr int kSetsPerStep<ReadRows<T, kDim, Rows>, kDim> = kDim >= 4 * kSetWidth ? 2 : 1;

// Row tiles of B that C += P B takes at a time.
constexpr int tiles_together(int tiles) { return tiles % 4 == 0 ? 4 : 2; }

// S += A B' of one set: 16 columns at a time, so that few of B's registers are on their way; of a half set, which is 16
// deep, 32.
template <typename T, int kDim, int kRowTiles, int kColumnTiles, typename Left, typename Rows>
inline void multiply_transposed_set(thread Fragment<float> (&result)[kRowTiles][kColumnTiles], thread const Left& left,
                                    Rows rows, short set, Lane lane) {
  Fragment<T> a[kRowTiles][kSetFragments];
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    left.fill(a[r], r, set, lane);
  }
  if (is_whole<kDim>(set)) {
    MFA_UNROLL
    for (short first = 0; first < kColumnTiles; first += 2) {
      Fragment<T> b[2][kSetFragments];
      load_right_transposed<kDim>(b[0], rows, first, set, lane);
      load_right_transposed<kDim>(b[1], rows, first + 1, set, lane);
      const vec<T, 4> right[4] = {quad_at(b[0]), quad_at(b[1]), quad_at(b[0] + 2), quad_at(b[1] + 2)};
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; r += 2) {
        const vec<T, 4> own[4] = {quad_at(a[r]), quad_at(a[r + 1]), quad_at(a[r] + 2), quad_at(a[r + 1] + 2)};
        multiply_tiles<16, 32, true>(&result[r][first], &result[r + 1][first], own, right);
      }
    }
  } else if constexpr (kColumnTiles % 4 == 0) {
    MFA_UNROLL
    for (short first = 0; first < kColumnTiles; first += 4) {
      vec<T, 4> right[4];
      MFA_UNROLL
      for (short c = 0; c < 4; ++c) {
        Fragment<T> b[kSetFragments];
        load_right_transposed<kDim>(b, rows, first + c, set, lane);
        right[c] = quad_at(b);
      }
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; r += 2) {
        const vec<T, 4> own[2] = {quad_at(a[r]), quad_at(a[r + 1])};
        multiply_tiles<32, 16, true>(&result[r][first], &result[r + 1][first], own, right);
      }
    }
  }
}

// S = A B': kDim values of the head dimension, kColumnTiles * 8 rows of B.
template <typename T, int kDim, int kRowTiles, int kColumnTiles, typename Left, typename Rows>
inline void multiply_transposed(thread Fragment<float> (&result)[kRowTiles][kColumnTiles], thread const Left& left,
                                Rows rows, Lane lane) {
  static_assert(kRowTiles % 2 == 0 && kColumnTiles % 2 == 0, "products are of 16 rows and 16 or 32 columns");
  static_assert(kColumnTiles % 4 == 0 || kDim % kSetWidth == 0, "those of 16 columns are 32 deep");
  constexpr short kWhole = kDim / kSetWidth;
  constexpr short kStep = kSetsPerStep<Left, kDim>;
  clear(result);
  if constexpr (kStep >= kWhole) {
    MFA_UNROLL
    for (short set = 0; set < kWhole; ++set) {
      multiply_transposed_set<T, kDim>(result, left, rows, set, lane);
    }
  } else {
    static_assert(kWhole % kStep == 0, "steps are whole");
    MFA_UNROLL_BY(1)
    for (int first = 0; first < kWhole; first += kStep) {
      const Left left_part = {left.rows.from_set(first)};
      const Rows part = rows.from_set(first);
      MFA_UNROLL
      for (short set = 0; set < kStep; ++set) {
        multiply_transposed_set<T, kDim>(result, left_part, part, set, lane);
      }
    }
  }
  if (kWhole < sets_of(kDim)) {
    multiply_transposed_set<T, kDim>(result, left, rows, kWhole, lane);
  }
}

// The unit cuts the low 13 bits of a float32 operand off. Half of the last bit that it keeps, added before, makes that
// rounding: cut, P would lose on average, and O with it.
inline float to_be_cut(float x) { return as_type<float>(as_type<uint>(x) + 0x1000u); }
inline float cut(float x) { return as_type<float>(as_type<uint>(x) & 0xffffe000u); }

// Whether a tile may have to count with more bits than that, see multiply_accumulate. In bfloat the rounding of results
// hides it.
template <typename T>
constant constexpr bool kMayRefine = is_same_v<T, half>;

// The quads of row tiles r and r + 1 in kTiles column tiles from k on, as left operand: rounded by the unit, or what
// rounding takes.
template <bool kIsRest, int kTiles, int kRowTiles, int kInnerTiles>
inline void fill_left(thread float4* quads, thread Fragment<float> (&left)[kRowTiles][kInnerTiles], short r, short k) {
  MFA_UNROLL
  for (short i = 0; i < kTiles; ++i) {
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      const float x = left[r + i % 2][k + i / 2 * 2 + e / 2][e % 2];
      quads[i][e] = kIsRest ? x - cut(to_be_cut(x)) : to_be_cut(x);
    }
  }
}

// C += P B of one set of columns and kTiles row tiles of B, two or all four of 32 rows, from k on.
template <bool kIsRest, int kDim, int kTiles, typename T, int kRowTiles, int kInnerTiles, typename Rows>
inline void multiply_accumulate_set(thread Fragment<float> (&result)[kRowTiles][kDim / kFragment],
                                    thread Fragment<float> (&left)[kRowTiles][kInnerTiles], Rows rows, short set,
                                    short k, Lane lane) {
  const short first = set * kSetFragments;
  Fragment<T> b[kTiles][kSetFragments];
  MFA_UNROLL
  for (short c = 0; c < kTiles; ++c) {
    load_right<kDim>(b[c], rows, k + c, set, lane);
  }
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; r += 2) {
    float4 quads[kTiles];
    fill_left<kIsRest, kTiles>(quads, left, r, k);
    if (!is_whole<kDim>(set)) {
      const vec<T, 4> right[4] = {quad_at(b[0]), quad_at(b[1]), quad_at(b[kTiles - 2]), quad_at(b[kTiles - 1])};
      multiply_tiles<16, 32, false>(&result[r][first], &result[r + 1][first], quads, right);
      continue;
    }
    MFA_UNROLL
    for (short i = 0; i < kTiles; i += 2) {
      const vec<T, 4> right[4] = {quad_at(b[i]), quad_at(b[i + 1]), quad_at(b[i] + 2), quad_at(b[i + 1] + 2)};
      multiply_tiles<32, 16, false>(&result[r][first], &result[r + 1][first], quads + i, right);
    }
  }
}

// C += P B: kInnerTiles * 8 rows of B, kDim of its columns. refines, which is the same for all lanes: P counts with 22
// bits, in a second product, instead of 11. That one comes first, and in steps of 16 rows, so that in no place what
// rounding takes lies in registers beside all of P rounded.
template <typename T, int kDim, int kRowTiles, int kInnerTiles, typename Rows>
inline void multiply_accumulate(thread Fragment<float> (&result)[kRowTiles][kDim / kFragment],
                                thread Fragment<float> (&left)[kRowTiles][kInnerTiles], Rows rows, Lane lane,
                                bool refines = false) {
  static_assert(kRowTiles % 2 == 0 && kInnerTiles % 2 == 0, "products are of 16 rows and 16 or 32 deep");
  static_assert(kInnerTiles % 4 == 0 || kDim % kSetWidth == 0, "those 16 deep are of 32 columns");
  constexpr int kTogether = tiles_together(kInnerTiles);
  constexpr short kWhole = kDim / kSetWidth;
  if (refines) {
    MFA_UNROLL
    for (short k = 0; k < kInnerTiles; k += 2) {
      MFA_UNROLL
      for (short set = 0; set < kWhole; ++set) {
        multiply_accumulate_set<true, kDim, 2, T>(result, left, rows, set, k, lane);
      }
    }
    MFA_UNROLL
    for (short k = 0; k < kInnerTiles; k += kTogether) {
      if (kWhole < sets_of(kDim)) {
        multiply_accumulate_set<true, kDim, kTogether, T>(result, left, rows, kWhole, k, lane);
      }
    }
  }
  MFA_UNROLL
  for (short set = 0; set < sets_of(kDim); ++set) {
    MFA_UNROLL
    for (short k = 0; k < kInnerTiles; k += kTogether) {
      multiply_accumulate_set<false, kDim, kTogether, T>(result, left, rows, set, k, lane);
    }
  }
}

// A set of columns of rows, in registers.
template <typename T, int kTiles>
struct HeldSet {
  Fragment<T> fragments[kTiles][kSetFragments];
};

template <int kDim, typename T, int kTiles>
inline void load_right(thread Fragment<T>* fragments, HeldSet<T, kTiles> rows, short tile, short, Lane) {
  MFA_UNROLL
  for (short j = 0; j < kSetFragments; ++j) {
    fragments[j] = rows.fragments[tile][j];
  }
}

// S = A B' and C += P B, of at most 32 rows B, which are read once.
template <typename T, int kDim, int kRowTiles, int kTiles, typename Left, typename Rows>
inline void multiply_both(thread Fragment<float> (&result)[kRowTiles][kTiles], thread const Left& left,
                          thread Fragment<float> (&sum)[kRowTiles][kDim / kFragment],
                          thread Fragment<float> (&weights)[kRowTiles][kTiles], Rows rows, Lane lane, bool refines) {
  static_assert(kTiles == 2 || kTiles == 4, "products are of 16 or 32 columns");
  clear(result);
  MFA_UNROLL
  for (short set = 0; set < sets_of(kDim); ++set) {
    HeldSet<T, kTiles> b;
    MFA_UNROLL
    for (short c = 0; c < kTiles; ++c) {
      load_right<kDim>(b.fragments[c], rows, c, set, lane);
    }
    multiply_transposed_set<T, kDim>(result, left, b, set, lane);
    if (refines) {
      multiply_accumulate_set<true, kDim, kTiles, T>(sum, weights, b, set, 0, lane);
    }
    multiply_accumulate_set<false, kDim, kTiles, T>(sum, weights, b, set, 0, lane);
  }
}

}  // namespace mfa
