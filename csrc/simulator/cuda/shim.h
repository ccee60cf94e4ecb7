// Force-included before a translated kernel that is compiled as CUDA, for an NVIDIA GPU: a warp is as wide as a SIMD-group,
// so the same source runs there, in true parallel and at full size. Types and arithmetic are those of ../msl; what lanes do
// together is here. Nothing is checked or counted: compute-sanitizer and Nsight Compute do that.
#pragma once
#pragma GCC system_header

#define MFA_SIM_DEVICE __attribute__((__device__))  // `device` is a word of MSL
#define MFA_SIM_FLAT  // CUDA has address spaces of its own, which clang infers
#define device
#define threadgroup
#define constant const
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define MFA_SIM_UNCHECKED
#define MFA_SIM_INLINE inline __attribute__((always_inline))
#define MFA_SIM_COLLECTIVE inline __attribute__((always_inline, convergent))
#define MFA_SIM_COUNT_EXP(n) ((void)0)
#define mfa_sim_count_fragment_load() ((void)0)
#define mfa_sim_count_conversion(n) ((void)0)

typedef __SIZE_TYPE__ size_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __INT16_TYPE__ int16_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __INT8_TYPE__ int8_t;

#pragma clang force_cuda_host_device begin
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
  // Near zero 1 - e cancels: the series is exact there to the last bits.
  const float y = __builtin_fabsf(x) < 0.03f ? x - x * x * x / 3 : __builtin_copysignf((1 - e) / (1 + e), x);
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
#include "simd.h"
#include "matrix.h"
#include "kernel.h"
// clang-format on
