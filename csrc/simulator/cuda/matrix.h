// 8x8 matrices with Apple's lane layout, multiplied in one of two ways:
// - By shuffles: 24 of them and 16 FMAs in float32, in the order of ../msl/matrix.h. It takes every mix of types at the
//   same cost, so that times and counters compare kernels, and not how well a type is emulated.
// - On the tensor core, if MFA_SIM_TENSOR_CORE and both A and B are half or both bfloat: a matrix unit's own rounding.
#pragma once

#include "../msl/elements.h"

namespace mfa_sim {

// The lane that owns (row, column) and (row, column + 1), `column` even.
MFA_SIM_INLINE constexpr int lane_of(int row, int column) {
  return 16 * (row >> 2) + 8 * (column >> 2) + 4 * ((row >> 1) & 1) + 2 * (row & 1) + ((column >> 1) & 1);
}

MFA_SIM_COLLECTIVE float from_lane(float x, int lane) {
  return __builtin_bit_cast(float, hardware::shuffle(__builtin_bit_cast(int, x), lane));
}

// A B on the tensor core, whose A has 16 rows: the lower 8 are zero. C is the caller's to add: the tensor core
// truncates its sums, where float32 rounds to nearest.
//
// Its lane l has row l / 4, columns 2 (l % 4) and the next one, of A, of B transposed and of A B.
template <typename T>
MFA_SIM_COLLECTIVE Elements<float> multiply(Elements<T> a, Elements<T> b) {
  const int lane = lane_index();
  const int source = lane_of(lane / 4, 2 * (lane % 4));
  const int left = metal::simd_shuffle(__builtin_bit_cast(int, a), source);
  int right = metal::simd_shuffle(__builtin_bit_cast(int, b), source);
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(right));
  Elements<float> upper, lower;
#define MFA_SIM_MULTIPLY(type)                                                                                         \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};" \
      : "=f"(upper.at[0]), "=f"(upper.at[1]), "=f"(lower.at[0]), "=f"(lower.at[1])                                     \
      : "r"(left), "r"(0), "r"(right), "f"(0.0f))
  if constexpr (__is_same(T, half)) {
    MFA_SIM_MULTIPLY("f16");
  } else {
    MFA_SIM_MULTIPLY("bf16");
  }
#undef MFA_SIM_MULTIPLY
  return metal::simd_shuffle(upper, 4 * row_of(lane) + column_of(lane) / 2);
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
  if constexpr (MFA_SIM_TENSOR_CORE && __is_same(A, B) && sizeof(A) == 2) {
    const auto product = ::mfa_sim::multiply(a.elements, b.elements);
    for (int i = 0; i < 2; ++i) d.elements.at[i] = D(float(c.elements.at[i]) + product.at[i]);
    return;
  }
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
