// One product of the matrix unit of M5 (Metal 4).
//
// The unit multiplies tiles of 16x16. Of a tile a lane holds eight elements: in rows lane.row and lane.row + 8 each
// four neighbours, from 2 * lane.column on. That is so for left, right and transposed operands and for results, always
// of the matrix as it is stored. Hence a quad of neighbours is two Fragments, two row tiles of 8 are one of the unit's,
// an octet is the quads of two tiles, and P is its own left operand, without a move. test_simulator_unit.py pins the
// layout, layout.metal asks the GPU.
#pragma once

#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

#include "../fragment.h"

namespace mfa {

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

}  // namespace mfa
