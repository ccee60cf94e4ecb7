// Force-included before every translated kernel: MSL's keywords, our metal_stdlib, and the words that MSL lacks.
//
// Address spaces are clang attributes in ordinary C++: fully type-checked, yet all of them lower to plain pointers.
#pragma once
#pragma GCC system_header

#include "../engine.h"

extern "C" {  // the optimiser must neither merge nor move these
__attribute__((convergent)) void mfa_sim_collective(mfa_sim_operation operation, void* argument, int cls, uint64_t key,
                                                    const char* name, const char* file, int line);
__attribute__((convergent)) void mfa_sim_threadgroup_barrier(uint32_t mem_flags, const char* file, int line);
__attribute__((convergent)) void mfa_sim_simdgroup_barrier(uint32_t mem_flags, const char* file, int line);
}

#ifdef MFA_SIM_FLAT  // third-party code only: nothing is checked
#define device
#define threadgroup
#define constant const
#else
#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant const __attribute__((opencl_constant))
#endif
#define thread
#define METAL_FUNC inline __attribute__((always_inline))

// Shim internals: never instrumented, since they touch other lanes' memory. Outlined where instrumentation would
// otherwise follow them into the kernel; inlined in fast mode, where a call per lane costs more.
#define MFA_SIM_UNCHECKED __attribute__((no_sanitize("thread", "address", "undefined")))
#if defined(MFA_SIM_COUNT) || defined(MFA_SIM_ASAN)
#define MFA_SIM_OUTLINED inline MFA_SIM_UNCHECKED __attribute__((noinline, nodebug, convergent))
#else
#define MFA_SIM_OUTLINED inline MFA_SIM_UNCHECKED __attribute__((always_inline, nodebug, convergent))
#endif
// What kernels call: no line of its own, so that debug information names the kernel's.
#define MFA_SIM_INLINE inline __attribute__((always_inline, nodebug))
#define MFA_SIM_COLLECTIVE inline __attribute__((always_inline, nodebug, convergent))
#define MFA_SIM_SITE const char *mfa_sim_file = __builtin_FILE(), int mfa_sim_line = __builtin_LINE()
#define MFA_SIM_HERE mfa_sim_file, mfa_sim_line

#ifdef MFA_SIM_COUNT
#define MFA_SIM_COUNT_EXP(n) mfa_sim_count_exp(n)
#else
#define MFA_SIM_COUNT_EXP(n) ((void)0)
#define mfa_sim_count_fragment_load() ((void)0)
#define mfa_sim_count_conversion(n) ((void)0)
#endif

// clang-format off
#include "traits.h"
#include "types.h"
#include "limits.h"
#include "math.h"
#include "relational.h"
#include "uniform.h"
#include "simd.h"
#include "matrix.h"
#ifdef MFA_SIM_UNIT_LAYOUT  // Metal 4
#include "unit_product.h"
#include "tensor_ops.h"
#endif
#include "atomic.h"
#include "kernel.h"
// clang-format on

#define double msl_has_no_double
#define goto msl_has_no_goto
#define new msl_has_no_new
#define delete msl_has_no_delete
#define virtual msl_has_no_virtual
#define dynamic_cast msl_has_no_dynamic_cast
#define typeid msl_has_no_typeid
#define try msl_has_no_try
#define catch msl_has_no_catch
#define throw msl_has_no_throw
