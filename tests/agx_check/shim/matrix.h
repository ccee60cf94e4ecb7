// 8x8 matrices with Apple's lane layout, multiplied by one instruction of the GPU.
#pragma once

#include "msl/elements.h"

namespace mfa_sim {

template <typename T>
MFA_SIM_INLINE auto bits_of(Elements<T> x) {
  if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(agx_ushort2, x);
  } else {
    return __builtin_bit_cast(agx_float2, x);
  }
}

MFA_SIM_COLLECTIVE agx_float2 multiply(agx_ushort2 a, agx_ushort2 b, agx_float2 c) { return agx_mma_16_16(a, b, c); }
MFA_SIM_COLLECTIVE agx_float2 multiply(agx_ushort2 a, agx_float2 b, agx_float2 c) { return agx_mma_16_32(a, b, c); }
MFA_SIM_COLLECTIVE agx_float2 multiply(agx_float2 a, agx_ushort2 b, agx_float2 c) { return agx_mma_32_16(a, b, c); }
MFA_SIM_COLLECTIVE agx_float2 multiply(agx_float2 a, agx_float2 b, agx_float2 c) { return agx_mma_32_32(a, b, c); }

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
  const agx_float2 sum = {float(c.elements.at[0]), float(c.elements.at[1])};
  const agx_float2 result = ::mfa_sim::multiply(::mfa_sim::bits_of(a.elements), ::mfa_sim::bits_of(b.elements), sum);
  d.elements.at[0] = D(result.x);
  d.elements.at[1] = D(result.y);
}

}  // namespace metal
