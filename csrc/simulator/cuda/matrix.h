// 8x8 matrices with Apple's lane layout. Every operand type takes the same path, 24 shuffles and 16 FMAs in float32, in
// the order of ../msl/matrix.h: times compare kernels, and are not distorted by an emulation that favours a type.
#pragma once

#include "../msl/elements.h"

namespace mfa_sim {

// The lane that owns (row, column) and (row, column + 1), `column` even.
MFA_SIM_INLINE constexpr int lane_of(int row, int column) {
  return 16 * (row >> 2) + 8 * (column >> 2) + 4 * ((row >> 1) & 1) + 2 * (row & 1) + ((column >> 1) & 1);
}

MFA_SIM_COLLECTIVE float from_lane(float x, int lane) {
  return __builtin_bit_cast(float, __nvvm_shfl_sync_idx_i32(~0u, __builtin_bit_cast(int, x), lane, 31));
}

}  // namespace mfa_sim

namespace metal {

template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  MFA_SIM_INLINE ::mfa_sim::Elements<T>& thread_elements() { return elements; }
  MFA_SIM_INLINE const ::mfa_sim::Elements<T>& thread_elements() const { return elements; }

  ::mfa_sim::Elements<T> elements;
};

template <typename D, typename A, typename B, typename C>
MFA_SIM_COLLECTIVE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                                      simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  const int lane = ::mfa_sim::lane_index();
  const int row = ::mfa_sim::row_of(lane), column = ::mfa_sim::column_of(lane);
  const float a0 = float(a.elements.at[0]), a1 = float(a.elements.at[1]);
  const float b0 = float(b.elements.at[0]), b1 = float(b.elements.at[1]);
  float x = float(c.elements.at[0]), y = float(c.elements.at[1]);
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    const int left = ::mfa_sim::lane_of(row, k);
    const float even = ::mfa_sim::from_lane(a0, left), odd = ::mfa_sim::from_lane(a1, left);
    const int upper = ::mfa_sim::lane_of(k, column), lower = ::mfa_sim::lane_of(k + 1, column);
    x = __builtin_fmaf(even, ::mfa_sim::from_lane(b0, upper), x);
    y = __builtin_fmaf(even, ::mfa_sim::from_lane(b1, upper), y);
    x = __builtin_fmaf(odd, ::mfa_sim::from_lane(b0, lower), x);
    y = __builtin_fmaf(odd, ::mfa_sim::from_lane(b1, lower), y);
  }
  d.elements.at[0] = D(x);
  d.elements.at[1] = D(y);
}

}  // namespace metal
