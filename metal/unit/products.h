// The two products that attention is made of, on the matrix unit of M5 (Metal 4); included by tile.h.
//
// The unit multiplies tiles of 16x16. Of a tile a lane holds eight elements: in rows lane.row and lane.row + 8 each
// four neighbours, from 2 * lane.column on. That is so for left, right and transposed operands and for results, always
// of the matrix as it is stored. Hence a quad of neighbours is two Fragments, two row tiles of 8 are one of the unit's,
// an octet is the quads of two tiles, and P is its own left operand, without a move. test_simulator_unit.py pins the
// layout.
#pragma once

#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

namespace mfa {

// Four neighbours of a row.
template <typename T>
inline vec<T, 4> quad_at(thread const Fragment<T>* pair) {
  return vec<T, 4>(pair[0], pair[1]);
}

// sums += left right, of 16 x kColumns x kDepth, one of which is 32. left and right: a lane's quads, tile after tile
// and in each the one of rows 8 .. 15 last. sums[h][..]: fragments of row tile h.
template <int kColumns, int kDepth, bool kTransposed, typename A, typename B>
inline void multiply_tiles(thread Fragment<float>* first_rows, thread Fragment<float>* last_rows,
                           thread const vec<A, 4>* left, thread const vec<B, 4>* right) {
  constexpr auto kShape = mpp::tensor_ops::matmul2d_descriptor(
      16, kColumns, kDepth, false, kTransposed, true, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<kShape, execution_simdgroup> product;
  auto a = product.template get_left_input_cooperative_tensor<A, B, float>();
  auto b = product.template get_right_input_cooperative_tensor<A, B, float>();
  auto sum = product.template get_destination_cooperative_tensor<remove_addrspace_t<decltype(a)>,
                                                                 remove_addrspace_t<decltype(b)>, float>();
  MFA_UNROLL
  for (short i = 0; i < kDepth / 2; ++i) {
    a[i] = left[i / 4][i % 4];
  }
  MFA_UNROLL
  for (short i = 0; i < kColumns * kDepth / 32; ++i) {
    b[i] = right[i / 4][i % 4];
  }
  MFA_UNROLL
  for (short n = 0; n < kColumns / kFragment; ++n) {
    MFA_UNROLL
    for (short e = 0; e < 2; ++e) {
      sum[n / 2 * 8 + n % 2 * 2 + e] = first_rows[n][e];
      sum[n / 2 * 8 + n % 2 * 2 + e + 4] = last_rows[n][e];
    }
  }
  product.run(a, b, sum);
  MFA_UNROLL
  for (short n = 0; n < kColumns / kFragment; ++n) {
    MFA_UNROLL
    for (short e = 0; e < 2; ++e) {
      first_rows[n][e] = sum[n / 2 * 8 + n % 2 * 2 + e];
      last_rows[n][e] = sum[n / 2 * 8 + n % 2 * 2 + e + 4];
    }
  }
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
