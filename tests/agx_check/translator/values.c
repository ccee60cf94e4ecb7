#include "translator.h"

static struct hash_table *values, *threadgroup_variables;
static unsigned threadgroup_end;

unsigned threadgroup_bytes(void) { return threadgroup_end; }

static nir_def* threadgroup_variable(LLVMValueRef variable) {
  if (!threadgroup_variables) threadgroup_variables = _mesa_pointer_hash_table_create(NULL);
  struct hash_entry* known = _mesa_hash_table_search(threadgroup_variables, variable);
  if (!known) {
    const unsigned start = ALIGN(threadgroup_end, 16);
    threadgroup_end = start + LLVMABISizeOfType(data_layout, LLVMGlobalGetValueType(variable));
    known = _mesa_hash_table_insert(threadgroup_variables, variable, (void*)(uintptr_t)start);
  }
  return nir_imm_int(b, (int)(uintptr_t)known->data);
}

static nir_def* constant(LLVMValueRef value) {
  LLVMTypeRef type = LLVMTypeOf(value);
  if (LLVMIsUndef(value) || LLVMIsPoison(value)) return nir_undef(b, components_of(type), bits_of(type));
  if (LLVMIsAGlobalVariable(value)) return threadgroup_variable(value);
  if (LLVMIsAConstantExpr(value)) {
    switch (LLVMGetConstOpcode(value)) {
      case LLVMGetElementPtr: return address_of(value);
      case LLVMAddrSpaceCast: return nir_u2u64(b, operand(value, 0));
      default: die("constant expression", value);
    }
  }
  if (LLVMGetTypeKind(type) == LLVMVectorTypeKind) {
    nir_def* elements[kMaxElements];
    for (unsigned i = 0; i < components_of(type); ++i) elements[i] = constant(LLVMGetAggregateElement(value, i));
    return nir_vec(b, elements, components_of(type));
  }
  if (LLVMIsNull(value)) return nir_imm_intN_t(b, 0, bits_of(type));
  if (LLVMIsAConstantInt(value)) return nir_imm_intN_t(b, LLVMConstIntGetSExtValue(value), bits_of(type));
  if (LLVMIsAConstantFP(value)) {
    LLVMBool is_inexact;
    const double number = LLVMConstRealGetDouble(value, &is_inexact);
    if (is_bfloat(type)) return nir_imm_intN_t(b, fui(number) >> 16, 16);
    return nir_imm_floatN_t(b, number, bits_of(type));
  }
  die("constant", value);
}

void define(LLVMValueRef value, nir_def* def) {
  if (!values) values = _mesa_pointer_hash_table_create(NULL);
  _mesa_hash_table_insert(values, value, def);
}

nir_def* value_of(LLVMValueRef value) {
  if (LLVMIsConstant(value)) return constant(value);
  struct hash_entry* known = _mesa_hash_table_search(values, value);
  if (!known) die("value before its definition", value);
  return known->data;
}

nir_def* operand(LLVMValueRef instruction, unsigned index) { return value_of(LLVMGetOperand(instruction, index)); }

nir_def* widen_bfloat(nir_def* bits) { return nir_ishl_imm(b, nir_u2u32(b, bits), 16); }

nir_def* narrow_to_bfloat(nir_def* value) {  // to nearest, ties to even
  nir_def* odd = nir_iand_imm(b, nir_ushr_imm(b, value, 16), 1);
  return nir_u2u16(b, nir_ushr_imm(b, nir_iadd(b, nir_iadd_imm(b, value, 0x7fff), odd), 16));
}
