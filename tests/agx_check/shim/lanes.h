// What the translator (../translator/calls.c) knows, under the names that csrc/simulator/cuda/simd.h and kernel.h use.
#pragma once

typedef float agx_float2 __attribute__((ext_vector_type(2)));
typedef unsigned short agx_ushort2 __attribute__((ext_vector_type(2)));

#define AGX_VALUE __attribute__((const, nothrow))
#define AGX_LANES __attribute__((const, nothrow, convergent))
extern "C" {
AGX_VALUE unsigned agx_thread_x();
AGX_VALUE unsigned agx_thread_y();
AGX_VALUE unsigned agx_thread_z();
AGX_VALUE unsigned agx_threadgroup_index_x();
AGX_VALUE unsigned agx_threadgroup_index_y();
AGX_VALUE unsigned agx_threadgroup_index_z();
AGX_VALUE unsigned agx_threadgroups_x();
AGX_VALUE unsigned agx_threadgroups_y();
AGX_VALUE unsigned agx_threadgroups_z();
AGX_VALUE unsigned agx_lane();
AGX_VALUE unsigned agx_simdgroup();
AGX_LANES int agx_shuffle(int, unsigned short);
AGX_LANES int agx_shuffle_xor(int, unsigned short);
AGX_LANES int agx_shuffle_up(int, unsigned short);
AGX_LANES int agx_shuffle_down(int, unsigned short);
AGX_LANES bool agx_any(bool);
AGX_LANES bool agx_all(bool);
// By the sizes of A's and B's elements: half and bfloat are both 16 bits of a register.
AGX_LANES agx_float2 agx_mma_16_16(agx_ushort2, agx_ushort2, agx_float2);
AGX_LANES agx_float2 agx_mma_16_32(agx_ushort2, agx_float2, agx_float2);
AGX_LANES agx_float2 agx_mma_32_16(agx_float2, agx_ushort2, agx_float2);
AGX_LANES agx_float2 agx_mma_32_32(agx_float2, agx_float2, agx_float2);
void agx_threadgroup_barrier() __attribute__((convergent));
void agx_simdgroup_barrier() __attribute__((convergent));
}
#undef AGX_VALUE
#undef AGX_LANES

constexpr unsigned agx_threads_x = AGX_THREADS, agx_threads_y = 1, agx_threads_z = 1;  // of a threadgroup
#define MFA_SIM_THREAD(axis) agx_thread_##axis()
#define MFA_SIM_THREADS(axis) agx_threads_##axis
#define MFA_SIM_THREADGROUP(axis) agx_threadgroup_index_##axis()
#define MFA_SIM_THREADGROUPS(axis) agx_threadgroups_##axis()

namespace mfa_sim::hardware {

MFA_SIM_INLINE int lane() { return agx_lane(); }
MFA_SIM_INLINE int simdgroup() { return agx_simdgroup(); }
MFA_SIM_COLLECTIVE int shuffle(int x, int lane) { return agx_shuffle(x, lane); }
MFA_SIM_COLLECTIVE int shuffle_xor(int x, int mask) { return agx_shuffle_xor(x, mask); }
MFA_SIM_COLLECTIVE int shuffle_up(int x, int delta) { return agx_shuffle_up(x, delta); }
MFA_SIM_COLLECTIVE int shuffle_down(int x, int delta) { return agx_shuffle_down(x, delta); }
MFA_SIM_COLLECTIVE bool any(bool x) { return agx_any(x); }
MFA_SIM_COLLECTIVE bool all(bool x) { return agx_all(x); }
MFA_SIM_COLLECTIVE void threadgroup_barrier() { agx_threadgroup_barrier(); }
MFA_SIM_COLLECTIVE void simdgroup_barrier() { agx_simdgroup_barrier(); }

}  // namespace mfa_sim::hardware
