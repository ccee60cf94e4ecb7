// The two products that attention is made of, on the matrix unit (product.h); included by tile.h.
#pragma once

#include "product.h"

namespace mfa {

// Four neighbours of a row.
template <typename T>
inline vec<T, 4> quad_at(thread const Fragment<T>* pair) {
  return vec<T, 4>(pair[0], pair[1]);
}

// S = A B': kDim values of the head dimension, kColumnTiles * 8 rows of B.
template <typename T, int kDim, int kRowTiles, int kColumnTiles, typename Left, typename Rows>
inline void multiply_transposed(thread Fragment<float> (&result)[kRowTiles][kColumnTiles], thread const Left& left,
                                Rows rows, Lane lane) {
  static_assert(kRowTiles % 2 == 0 && kColumnTiles % 4 == 0, "products are of 16 rows and 32 columns");
  clear(result);
  MFA_UNROLL
  for (short s = 0; s < sets_of(kDim); ++s) {
    Fragment<T> a[kRowTiles][kSetFragments];
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      left.fill(a[r], r, s, lane);
    }
    MFA_UNROLL
    for (short first = 0; first < kColumnTiles; first += 4) {
      Fragment<T> b[4][kSetFragments];
      MFA_UNROLL
      for (short c = 0; c < 4; ++c) {
        load_right_transposed<kDim>(b[c], rows, first + c, s, lane);
      }
      MFA_UNROLL
      for (short j = 0; j < kSetFragments; j += 2) {
        if (j >= fragments_of<kDim>(s)) {
          continue;
        }
        const vec<T, 4> right[4] = {quad_at(b[0] + j), quad_at(b[1] + j), quad_at(b[2] + j), quad_at(b[3] + j)};
        MFA_UNROLL
        for (short r = 0; r < kRowTiles; r += 2) {
          const vec<T, 4> own[2] = {quad_at(a[r] + j), quad_at(a[r + 1] + j)};
          multiply_tiles<32, 16, true>(&result[r][first], &result[r + 1][first], own, right);
        }
      }
    }
  }
}

// The unit cuts the low 13 bits of a float32 operand off. Half of the last bit that it keeps, added before, makes that
// rounding: cut, P would lose on average, and O with it.
inline float rounded(float x) { return as_type<float>((as_type<uint>(x) + 0x1000u) & 0xffffe000u); }

// Fragments as left operands: the quads of row tiles r and r + 1 in column tiles k .. k + 3, rounded; or what rounding
// took.
template <bool kIsRest, int kRowTiles, int kInnerTiles>
inline void fill_left(thread float4* quads, thread Fragment<float> (&left)[kRowTiles][kInnerTiles], short r, short k) {
  MFA_UNROLL
  for (short i = 0; i < 4; ++i) {
    MFA_UNROLL
    for (short e = 0; e < 4; ++e) {
      const float x = left[r + i % 2][k + i / 2 * 2 + e / 2][e % 2];
      quads[i][e] = kIsRest ? x - rounded(x) : rounded(x);
    }
  }
}

// Of row tiles r and r + 1: one set of columns of C += P B, where `left` are the quads of 32 columns of P.
template <int kDim, typename T>
inline void multiply_accumulate_set(thread Fragment<float>* first_rows, thread Fragment<float>* last_rows,
                                    thread const float4* left, thread Fragment<T> (&b)[4][kSetFragments], short set) {
  if (!is_whole<kDim>(set)) {
    const vec<T, 4> right[4] = {quad_at(b[0]), quad_at(b[1]), quad_at(b[2]), quad_at(b[3])};
    multiply_tiles<16, 32, false>(first_rows, last_rows, left, right);
    return;
  }
  MFA_UNROLL
  for (short k = 0; k < 4; k += 2) {
    const vec<T, 4> right[4] = {quad_at(b[k]), quad_at(b[k + 1]), quad_at(b[k] + 2), quad_at(b[k + 1] + 2)};
    multiply_tiles<32, 16, false>(first_rows, last_rows, left + k, right);
  }
}

// C += P B: kInnerTiles * 8 rows of B, kDim of its columns. refines, which is the same for all lanes: P counts with 22
// bits, in a second product, instead of 11.
template <typename T, int kDim, int kRowTiles, int kInnerTiles, typename Rows>
inline void multiply_accumulate(thread Fragment<float> (&result)[kRowTiles][kDim / kFragment],
                                thread Fragment<float> (&left)[kRowTiles][kInnerTiles], Rows rows, Lane lane,
                                bool refines = false) {
  static_assert(kRowTiles % 2 == 0 && kInnerTiles % 4 == 0, "products are of 16 rows and up to 32 deep");
  MFA_UNROLL
  for (short s = 0; s < sets_of(kDim); ++s) {
    const short first = s * kSetFragments;
    MFA_UNROLL
    for (short k = 0; k < kInnerTiles; k += 4) {
      Fragment<T> b[4][kSetFragments];
      MFA_UNROLL
      for (short c = 0; c < 4; ++c) {
        load_right<kDim>(b[c], rows, k + c, s, lane);
      }
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; r += 2) {
        float4 quads[4];
        fill_left<false>(quads, left, r, k);
        multiply_accumulate_set<kDim>(&result[r][first], &result[r + 1][first], quads, b, s);
        if (refines) {
          fill_left<true>(quads, left, r, k);
          multiply_accumulate_set<kDim>(&result[r][first], &result[r + 1][first], quads, b, s);
        }
      }
    }
  }
}

}  // namespace mfa
