// Metal's keywords, for clang's target of NVIDIA GPUs.
#pragma once

// What the compiler makes of these on this target: global, shared, and global again. `constant` is a space of its own,
// since kernels overload on it; CUDA's constant memory is bound to symbols, not to addresses.
#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant const __attribute__((opencl_global_device))
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define MFA_SIM_UNCHECKED
#define MFA_SIM_INLINE inline __attribute__((always_inline))
#define MFA_SIM_COLLECTIVE inline __attribute__((always_inline, convergent))
#define MFA_SIM_SITE const char *mfa_sim_file = nullptr, int mfa_sim_line = 0
#define MFA_SIM_HERE mfa_sim_file, mfa_sim_line
#define MFA_SIM_COUNT_EXP(n) ((void)0)
#define mfa_sim_count_fragment_load() ((void)0)
#define mfa_sim_count_conversion(n) ((void)0)
#define mfa_sim_fail(...) __builtin_trap()

#include "../msl/freestanding/stddef.h"
#include "../msl/freestanding/stdint.h"
