// Force-included before a translated kernel that is compiled for an NVIDIA GPU: a warp is as wide as a SIMD-group, so
// the same source runs there, in true parallel and at full size. Types and arithmetic are those of ../msl; what lanes
// do together is here. Nothing is checked or counted: compute-sanitizer and Nsight Compute do that.
#pragma once
#pragma GCC system_header

#include "language.h"

namespace mfa_sim {
// The hardware's own approximations, as Metal's fast:: functions are; the rest from them.
MFA_SIM_INLINE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MFA_SIM_INLINE float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MFA_SIM_INLINE float tanh_of(float x) {
  const float e = exp2_approx(-2.8853900817779268f * __builtin_fabsf(x));  // exp(-2|x|)
  float quotient;
  asm volatile("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(1 - e), "f"(1 + e));  // volatile: never in a branch
  // Near zero 1 - e cancels: the series is exact there to the last bits.
  const float y = __builtin_fabsf(x) < 0.03f ? x - x * x * x / 3 : __builtin_copysignf(quotient, x);
  return x == x ? y : x;
}
}  // namespace mfa_sim
#define __builtin_exp2f(x) ::mfa_sim::exp2_approx(x)
#define __builtin_log2f(x) ::mfa_sim::log2_approx(x)
#define __builtin_logf(x) (::mfa_sim::log2_approx(x) * 0.69314718055994531f)
#define __builtin_expf(x) ::mfa_sim::exp2_approx((x) * 1.4426950408889634f)
#define __builtin_tanhf(x) ::mfa_sim::tanh_of(x)

// clang-format off
#include "../msl/traits.h"
#include "../msl/types.h"
#include "../msl/limits.h"
#include "../msl/math.h"
#include "../msl/relational.h"
#include "lanes.h"
#include "simd.h"
#include "matrix.h"
#include "unit_product.h"
#include "../msl/tensor_ops.h"
#include "kernel.h"
// clang-format on
