// Intrinsics of LLVM, and what shim/lanes.h declares.
#include <string.h>

#include "translator.h"

static nir_def* arithmetic(const char* name, LLVMValueRef call) {
#define ARGUMENT(index) operand(call, index)
#define STARTS(prefix) (!strncmp(name, prefix, strlen(prefix)))
  if (STARTS("llvm.exp2")) return nir_fexp2(b, ARGUMENT(0));
  if (STARTS("llvm.log2")) return nir_flog2(b, ARGUMENT(0));
  if (STARTS("llvm.exp.")) return nir_fexp2(b, nir_fmul_imm(b, ARGUMENT(0), 1.4426950408889634));
  if (STARTS("llvm.log.")) return nir_fmul_imm(b, nir_flog2(b, ARGUMENT(0)), 0.6931471805599453);
  if (STARTS("llvm.sqrt")) return nir_fsqrt(b, ARGUMENT(0));
  if (STARTS("llvm.fabs")) return nir_fabs(b, ARGUMENT(0));
  if (STARTS("llvm.floor")) return nir_ffloor(b, ARGUMENT(0));
  if (STARTS("llvm.rint") || STARTS("llvm.roundeven") || STARTS("llvm.nearbyint"))
    return nir_fround_even(b, ARGUMENT(0));
  if (STARTS("llvm.maxnum")) return nir_fmax(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.minnum")) return nir_fmin(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.fma") || STARTS("llvm.fmuladd")) {
    if (!is_bfloat(LLVMTypeOf(call))) return nir_ffma(b, ARGUMENT(0), ARGUMENT(1), ARGUMENT(2));
    return narrow_to_bfloat(
        nir_ffma(b, widen_bfloat(ARGUMENT(0)), widen_bfloat(ARGUMENT(1)), widen_bfloat(ARGUMENT(2))));
  }
  if (STARTS("llvm.umin")) return nir_umin(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.umax")) return nir_umax(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.smin")) return nir_imin(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.smax")) return nir_imax(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.abs")) return nir_iabs(b, ARGUMENT(0));
  if (STARTS("llvm.usub.sat")) return nir_usub_sat(b, ARGUMENT(0), ARGUMENT(1));
  if (STARTS("llvm.ctlz")) return nir_isub_imm(b, 31, nir_ufind_msb(b, ARGUMENT(0)));
  if (STARTS("llvm.copysign"))
    return nir_ior(b, nir_iand_imm(b, ARGUMENT(0), 0x7fffffff), nir_iand_imm(b, ARGUMENT(1), 0x80000000u));
  die(name, call);
}

nir_def* translate_call(LLVMValueRef call) {
  size_t length;
  const char* name = LLVMGetValueName2(LLVMGetCalledValue(call), &length);
#define IS(text) (!strcmp(name, text))
  if (STARTS("agx_mma")) return nir_cmat_muladd_agx(b, 32, ARGUMENT(0), ARGUMENT(1), ARGUMENT(2));
  if (STARTS("agx_thread_")) return nir_channel(b, nir_load_local_invocation_id(b), name[11] - 'x');
  if (STARTS("agx_threadgroup_index_")) return nir_channel(b, nir_load_workgroup_id(b), name[22] - 'x');
  if (STARTS("agx_threadgroups_"))  // behind the addresses of buffers
    return nir_load_preamble(b, 1, 32, .base = kBuffers * 4 + 2 * (name[17] - 'x'));
  if (IS("agx_lane")) return nir_load_subgroup_invocation(b);
  if (IS("agx_simdgroup")) return nir_load_subgroup_id(b);
  if (IS("agx_threadgroup_barrier")) {
    nir_barrier(b, .execution_scope = SCOPE_WORKGROUP, .memory_scope = SCOPE_WORKGROUP,
                .memory_semantics = NIR_MEMORY_ACQ_REL, .memory_modes = nir_var_mem_shared);
    return NULL;
  }
  if (IS("agx_simdgroup_barrier")) {
    nir_barrier(b, .execution_scope = SCOPE_NONE, .memory_scope = SCOPE_SUBGROUP,
                .memory_semantics = NIR_MEMORY_ACQ_REL, .memory_modes = nir_var_mem_shared);
    return NULL;
  }
  if (IS("agx_shuffle")) return nir_shuffle(b, ARGUMENT(0), nir_u2u32(b, ARGUMENT(1)));
  if (IS("agx_shuffle_xor"))
    return nir_simd_shuffle_xor_agx(b, ARGUMENT(0)->bit_size, ARGUMENT(0), nir_u2u16(b, ARGUMENT(1)));
  if (IS("agx_shuffle_up")) return nir_shuffle_up(b, ARGUMENT(0), nir_u2u32(b, ARGUMENT(1)));
  if (IS("agx_shuffle_down")) return nir_shuffle_down(b, ARGUMENT(0), nir_u2u32(b, ARGUMENT(1)));
  if (IS("agx_any")) return nir_vote_any(b, 1, ARGUMENT(0));
  if (IS("agx_all")) return nir_vote_all(b, 1, ARGUMENT(0));
  if (STARTS("llvm.lifetime") || STARTS("llvm.assume") || STARTS("llvm.dbg") || STARTS("llvm.experimental.noalias"))
    return NULL;
  return arithmetic(name, call);
}
