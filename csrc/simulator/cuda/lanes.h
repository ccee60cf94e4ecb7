// What NVIDIA's hardware offers to lanes, under the names that simd.h, matrix.h and kernel.h use. tests/agx_check/shim
// has the same for another compiler.
#pragma once

#define MFA_SIM_THREAD(axis) __nvvm_read_ptx_sreg_tid_##axis()
#define MFA_SIM_THREADS(axis) __nvvm_read_ptx_sreg_ntid_##axis()
#define MFA_SIM_THREADGROUP(axis) __nvvm_read_ptx_sreg_ctaid_##axis()
#define MFA_SIM_THREADGROUPS(axis) __nvvm_read_ptx_sreg_nctaid_##axis()

namespace mfa_sim::hardware {

MFA_SIM_INLINE int lane() { return MFA_SIM_THREAD(x) % 32; }
MFA_SIM_COLLECTIVE int shuffle(int x, int lane) { return __nvvm_shfl_sync_idx_i32(~0u, x, lane, 31); }
MFA_SIM_COLLECTIVE int shuffle_xor(int x, int mask) { return __nvvm_shfl_sync_bfly_i32(~0u, x, mask, 31); }
MFA_SIM_COLLECTIVE int shuffle_up(int x, int delta) { return __nvvm_shfl_sync_up_i32(~0u, x, delta, 0); }
MFA_SIM_COLLECTIVE int shuffle_down(int x, int delta) { return __nvvm_shfl_sync_down_i32(~0u, x, delta, 31); }
MFA_SIM_COLLECTIVE bool any(bool x) { return __nvvm_vote_any_sync(~0u, x); }
MFA_SIM_COLLECTIVE bool all(bool x) { return __nvvm_vote_all_sync(~0u, x); }
MFA_SIM_COLLECTIVE void threadgroup_barrier() { __syncthreads(); }
MFA_SIM_COLLECTIVE void simdgroup_barrier() { __nvvm_bar_warp_sync(~0u); }
// Through a shuffle, so that the assembler knows it to be the same in all lanes: where it can't tell that a branch is
// taken by whole warps, it spills all registers around each shuffle.
MFA_SIM_COLLECTIVE int simdgroup() { return shuffle(MFA_SIM_THREAD(x) / 32, 0); }

}  // namespace mfa_sim::hardware
