#include "translator.h"

static nir_def* compare_floats(LLVMRealPredicate predicate, nir_def* x, nir_def* y) {
  switch (predicate) {
    case LLVMRealOEQ: return nir_feq(b, x, y);
    case LLVMRealOGT: return nir_flt(b, y, x);
    case LLVMRealOGE: return nir_fge(b, x, y);
    case LLVMRealOLT: return nir_flt(b, x, y);
    case LLVMRealOLE: return nir_fge(b, y, x);
    case LLVMRealUNE: return nir_fneu(b, x, y);
    case LLVMRealUGT: return nir_inot(b, nir_fge(b, y, x));
    case LLVMRealUGE: return nir_inot(b, nir_flt(b, x, y));
    case LLVMRealULT: return nir_inot(b, nir_fge(b, x, y));
    case LLVMRealULE: return nir_inot(b, nir_flt(b, y, x));
    case LLVMRealORD: return nir_iand(b, nir_feq(b, x, x), nir_feq(b, y, y));
    case LLVMRealUNO: return nir_ior(b, nir_fneu(b, x, x), nir_fneu(b, y, y));
    case LLVMRealONE: return nir_ior(b, nir_flt(b, x, y), nir_flt(b, y, x));
    case LLVMRealUEQ: return nir_inot(b, nir_ior(b, nir_flt(b, x, y), nir_flt(b, y, x)));
    default: die("comparison of floats", NULL);
  }
}

static nir_def* compare_integers(LLVMIntPredicate predicate, nir_def* x, nir_def* y) {
  switch (predicate) {
    case LLVMIntEQ: return nir_ieq(b, x, y);
    case LLVMIntNE: return nir_ine(b, x, y);
    case LLVMIntUGT: return nir_ult(b, y, x);
    case LLVMIntUGE: return nir_uge(b, x, y);
    case LLVMIntULT: return nir_ult(b, x, y);
    case LLVMIntULE: return nir_uge(b, y, x);
    case LLVMIntSGT: return nir_ilt(b, y, x);
    case LLVMIntSGE: return nir_ige(b, x, y);
    case LLVMIntSLT: return nir_ilt(b, x, y);
    case LLVMIntSLE: return nir_ige(b, y, x);
  }
  die("comparison of integers", NULL);
}

static nir_def* resize(nir_def* value, unsigned width, bool is_signed) {
  if (value->bit_size == width) return value;
  if (width == 1) return nir_ine_imm(b, nir_iand_imm(b, value, 1), 0);
  if (value->bit_size == 1) {
    nir_def* one = nir_b2iN(b, value, width);
    return is_signed ? nir_ineg(b, one) : one;
  }
  return is_signed ? nir_i2iN(b, value, width) : nir_u2uN(b, value, width);
}

static LLVMValueRef stripped(LLVMValueRef pointer) {
  while (LLVMIsAInstruction(pointer)) {
    const LLVMOpcode opcode = LLVMGetInstructionOpcode(pointer);
    if (opcode != LLVMGetElementPtr && opcode != LLVMAddrSpaceCast) break;
    pointer = LLVMGetOperand(pointer, 0);
  }
  return pointer;
}

static unsigned argument_offset(LLVMValueRef pointer) {
  return pointer == argument ? 0 : LLVMConstIntGetZExtValue(LLVMGetOperand(pointer, 1));
}

// What is read of Metal's constant address space may be hoisted to a shader's preamble, as Apple's compiler does.
static bool is_of_params(LLVMValueRef pointer) {
  LLVMValueRef base = stripped(pointer);
  if (!LLVMIsAInstruction(base) || LLVMGetInstructionOpcode(base) != LLVMLoad) return false;
  LLVMValueRef slot = LLVMGetOperand(base, 0);
  return is_of_argument(slot) && argument_offset(slot) == 8 * params_index;
}

static nir_def* load(LLVMValueRef instruction) {
  LLVMValueRef pointer = LLVMGetOperand(instruction, 0);
  LLVMTypeRef type = LLVMTypeOf(instruction);
  const unsigned count = components_of(type), bits = bits_of(type), align = LLVMGetAlignment(instruction);
  if (is_of_argument(pointer)) return nir_load_preamble(b, count, bits, .base = argument_offset(pointer) / 2);
  int64_t offset;
  nir_def* base = split_address(pointer, &offset);
  if (LLVMGetPointerAddressSpace(LLVMTypeOf(pointer)) == kThreadgroupSpace)
    return nir_load_shared(b, count, bits, base, .base = offset, .align_mul = align);
  base = nir_iadd_imm(b, base, offset);
  return is_of_params(pointer) ? nir_load_global_constant(b, base, align, count, bits)
                               : nir_load_global(b, base, align, count, bits);
}

static void store(LLVMValueRef instruction) {
  LLVMValueRef pointer = LLVMGetOperand(instruction, 1);
  nir_def* value = operand(instruction, 0);
  const unsigned mask = BITFIELD_MASK(value->num_components), align = LLVMGetAlignment(instruction);
  int64_t offset;
  nir_def* base = split_address(pointer, &offset);
  if (LLVMGetPointerAddressSpace(LLVMTypeOf(pointer)) == kThreadgroupSpace)
    nir_store_shared(b, value, base, .base = offset, .write_mask = mask, .align_mul = align);
  else
    nir_store_global(b, nir_iadd_imm(b, base, offset), align, value, mask);
}

static nir_def* shuffle_elements(LLVMValueRef instruction) {
  nir_def *x = operand(instruction, 0), *y = operand(instruction, 1), *elements[kMaxElements];
  const unsigned count = LLVMGetNumMaskElements(instruction);
  for (unsigned i = 0; i < count; ++i) {
    const int from = LLVMGetMaskValue(instruction, i);
    if (from < 0)
      elements[i] = nir_undef(b, 1, x->bit_size);
    else
      elements[i] = from < x->num_components ? nir_channel(b, x, from) : nir_channel(b, y, from - x->num_components);
  }
  return nir_vec(b, elements, count);
}

static nir_def* convert(LLVMValueRef instruction) {
  LLVMTypeRef type = LLVMTypeOf(instruction), from = LLVMTypeOf(LLVMGetOperand(instruction, 0));
  nir_def* value = operand(instruction, 0);
  const unsigned bits = bits_of(type);
  switch (LLVMGetInstructionOpcode(instruction)) {
    case LLVMFPTrunc: return is_bfloat(type) ? narrow_to_bfloat(value) : nir_f2fN(b, value, bits);
    case LLVMFPExt: return is_bfloat(from) ? widen_bfloat(value) : nir_f2fN(b, value, bits);
    case LLVMSIToFP: return is_bfloat(type) ? narrow_to_bfloat(nir_i2f32(b, value)) : nir_i2fN(b, value, bits);
    case LLVMUIToFP:
      if (is_bfloat(type)) return narrow_to_bfloat(nir_u2f32(b, value));
      return value->bit_size == 1 ? nir_b2fN(b, value, bits) : nir_u2fN(b, value, bits);
    case LLVMFPToSI: return nir_f2iN(b, is_bfloat(from) ? widen_bfloat(value) : value, bits);
    case LLVMFPToUI: return nir_f2uN(b, is_bfloat(from) ? widen_bfloat(value) : value, bits);
    case LLVMSExt: return resize(value, bits, true);
    case LLVMBitCast: return value->bit_size == bits ? value : nir_bitcast_vector(b, value, bits);
    default: return resize(value, bits, false);
  }
}

nir_def* translate_instruction(LLVMValueRef instruction) {
  LLVMTypeRef type = LLVMTypeOf(instruction);
#define X operand(instruction, 0)
#define Y operand(instruction, 1)
#define FLOATS(function) \
  (is_bfloat(type) ? narrow_to_bfloat(function(b, widen_bfloat(X), widen_bfloat(Y))) : function(b, X, Y))
  switch (LLVMGetInstructionOpcode(instruction)) {
    case LLVMAdd: return nir_iadd(b, X, Y);
    case LLVMSub: return nir_isub(b, X, Y);
    case LLVMMul: return nir_imul(b, X, Y);
    case LLVMSDiv: return nir_idiv(b, X, Y);
    case LLVMUDiv: return nir_udiv(b, X, Y);
    case LLVMSRem: return nir_irem(b, X, Y);
    case LLVMURem: return nir_umod(b, X, Y);
    case LLVMShl: return nir_ishl(b, X, nir_u2u32(b, Y));
    case LLVMLShr: return nir_ushr(b, X, nir_u2u32(b, Y));
    case LLVMAShr: return nir_ishr(b, X, nir_u2u32(b, Y));
    case LLVMAnd: return nir_iand(b, X, Y);
    case LLVMOr: return nir_ior(b, X, Y);
    case LLVMXor: return nir_ixor(b, X, Y);
    case LLVMFAdd: return FLOATS(nir_fadd);
    case LLVMFSub: return FLOATS(nir_fsub);
    case LLVMFMul: return FLOATS(nir_fmul);
    case LLVMFDiv: return FLOATS(nir_fdiv);
    case LLVMFNeg: return is_bfloat(type) ? nir_ixor(b, X, nir_imm_intN_t(b, 0x8000, 16)) : nir_fneg(b, X);
    case LLVMICmp: return compare_integers(LLVMGetICmpPredicate(instruction), X, Y);
    case LLVMFCmp: {
      const bool widens = is_bfloat(LLVMTypeOf(LLVMGetOperand(instruction, 0)));
      return compare_floats(LLVMGetFCmpPredicate(instruction), widens ? widen_bfloat(X) : X,
                            widens ? widen_bfloat(Y) : Y);
    }
    case LLVMSelect: return nir_bcsel(b, X, Y, operand(instruction, 2));
    case LLVMFreeze: return X;
    case LLVMZExt:
    case LLVMSExt:
    case LLVMTrunc:
    case LLVMFPTrunc:
    case LLVMFPExt:
    case LLVMSIToFP:
    case LLVMUIToFP:
    case LLVMFPToSI:
    case LLVMFPToUI:
    case LLVMBitCast:
    case LLVMPtrToInt:
    case LLVMIntToPtr:
    case LLVMAddrSpaceCast: return convert(instruction);
    case LLVMGetElementPtr:  // loads of an argument look at it themselves
      return is_of_argument(instruction) ? nir_undef(b, 1, 64) : address_of(instruction);
    case LLVMExtractElement: {
      LLVMValueRef index = LLVMGetOperand(instruction, 1);
      if (!LLVMIsAConstantInt(index)) return nir_vector_extract(b, X, Y);
      return nir_channel(b, X, LLVMConstIntGetZExtValue(index));
    }
    case LLVMInsertElement: {
      LLVMValueRef index = LLVMGetOperand(instruction, 2);
      if (!LLVMIsAConstantInt(index)) return nir_vector_insert(b, X, Y, operand(instruction, 2));
      return nir_vector_insert_imm(b, X, Y, LLVMConstIntGetZExtValue(index));
    }
    case LLVMShuffleVector: return shuffle_elements(instruction);
    case LLVMLoad: return load(instruction);
    case LLVMStore: store(instruction); return NULL;
    case LLVMCall: return translate_call(instruction);
    default: die("instruction", instruction);
  }
}
