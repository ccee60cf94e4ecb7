// Addresses as root + sum of (index * size) + constant. What is not constant is computed once, where it first appears
// in a dominating block: all accesses with the same sum share its register, and the constant stays with the access, as
// an immediate offset. Of device pointers only constants are split off: sharing sums keeps more registers alive than it
// saves.
#include "translator.h"

enum { kMaxTerms = 12, kMaxAddresses = 20000 };

struct term {
  LLVMValueRef index;
  int64_t size;
};

struct address {
  LLVMValueRef root;
  unsigned term_count;
  struct term terms[kMaxTerms];
  int64_t constant;
  nir_def* sum;  // without the constant
  int block;     // where the sum is
};

static struct address* known[kMaxAddresses];
static unsigned known_count;

static bool is_get_element_pointer(LLVMValueRef value) {
  if (LLVMIsAInstruction(value)) return LLVMGetInstructionOpcode(value) == LLVMGetElementPtr;
  return LLVMIsAConstantExpr(value) && LLVMGetConstOpcode(value) == LLVMGetElementPtr;
}

bool is_of_argument(LLVMValueRef pointer) {
  return pointer == argument || (is_get_element_pointer(pointer) && LLVMGetOperand(pointer, 0) == argument);
}

// The size that index `i` counts, and through `type` the type of what it selects. A struct's fields are constants:
// their offset goes to `offset`, and 0 is returned.
static int64_t step(LLVMValueRef pointer, unsigned i, LLVMTypeRef* type, int64_t* offset) {
  if (i > 1 && LLVMGetTypeKind(*type) == LLVMStructTypeKind) {
    const unsigned field = LLVMConstIntGetZExtValue(LLVMGetOperand(pointer, i));
    *offset += LLVMOffsetOfElement(data_layout, *type, field);
    *type = LLVMStructGetTypeAtIndex(*type, field);
    return 0;
  }
  if (i > 1) *type = LLVMGetElementType(*type);
  return LLVMABISizeOfType(data_layout, *type);
}

static nir_def* scaled(LLVMValueRef index, int64_t size, unsigned width) {
  nir_def* value = value_of(index);
  if (value->bit_size < width) value = nir_i2iN(b, value, width);
  if (value->bit_size > width) value = nir_u2uN(b, value, width);
  return nir_imul_imm(b, value, size);
}

static nir_def* whole_address(LLVMValueRef pointer) {
  nir_def* address = operand(pointer, 0);
  LLVMTypeRef type = LLVMGetGEPSourceElementType(pointer);
  for (int i = 1; i < LLVMGetNumOperands(pointer); ++i) {
    int64_t offset = 0;
    const int64_t size = step(pointer, i, &type, &offset);
    LLVMValueRef index = LLVMGetOperand(pointer, i);
    if (size && LLVMIsAConstantInt(index)) offset += LLVMConstIntGetSExtValue(index) * size;
    address = nir_iadd_imm(b, address, offset);
    if (size && !LLVMIsAConstantInt(index)) address = nir_iadd(b, address, scaled(index, size, address->bit_size));
  }
  return address;
}

static bool is_split(LLVMValueRef pointer) {
  if (!is_get_element_pointer(pointer) || LLVMGetOperand(pointer, 0) == argument) return false;
  if (LLVMGetPointerAddressSpace(LLVMTypeOf(pointer)) == kThreadgroupSpace) return true;
  for (int i = 1; i < LLVMGetNumOperands(pointer); ++i)
    if (!LLVMIsAConstantInt(LLVMGetOperand(pointer, i))) return false;
  return true;
}

static void add_term(struct address* address, LLVMValueRef index, int64_t size) {
  unsigned at = address->term_count++;
  for (; at > 0 && (uintptr_t)index < (uintptr_t)address->terms[at - 1].index; --at)  // in one order, to compare
    address->terms[at] = address->terms[at - 1];
  address->terms[at] = (struct term){index, size};
}

static struct address decompose(LLVMValueRef pointer) {
  struct address address = {0};
  while (is_split(pointer) && address.term_count + LLVMGetNumOperands(pointer) < kMaxTerms) {
    LLVMTypeRef type = LLVMGetGEPSourceElementType(pointer);
    for (int i = 1; i < LLVMGetNumOperands(pointer); ++i) {
      const int64_t size = step(pointer, i, &type, &address.constant);
      LLVMValueRef index = LLVMGetOperand(pointer, i);
      if (size && LLVMIsAConstantInt(index))
        address.constant += LLVMConstIntGetSExtValue(index) * size;
      else if (size)
        add_term(&address, index, size);
    }
    pointer = LLVMGetOperand(pointer, 0);
  }
  address.root = pointer;
  if (LLVMIsAGlobalVariable(pointer)) address.constant += nir_src_as_int(nir_src_for_ssa(value_of(pointer)));
  return address;
}

static bool has_same_sum(const struct address* x, const struct address* y) {
  if (x->root != y->root || x->term_count != y->term_count) return false;
  for (unsigned i = 0; i < x->term_count; ++i)
    if (x->terms[i].index != y->terms[i].index || x->terms[i].size != y->terms[i].size) return false;
  return true;
}

static nir_def* sum_of(const struct address* address, unsigned width) {
  nir_def* sum = LLVMIsAGlobalVariable(address->root) ? NULL : value_of(address->root);
  for (unsigned i = 0; i < address->term_count; ++i) {
    nir_def* term = scaled(address->terms[i].index, address->terms[i].size, width);
    sum = sum ? nir_iadd(b, sum, term) : term;
  }
  return sum ? sum : nir_imm_intN_t(b, 0, width);
}

nir_def* split_address(LLVMValueRef pointer, int64_t* offset) {
  struct address address = decompose(pointer);
  *offset = address.constant;
  for (unsigned i = 0; i < known_count; ++i)
    if (has_same_sum(known[i], &address) && dominates(known[i]->block, current_block())) return known[i]->sum;
  address.sum = sum_of(&address, bits_of(LLVMTypeOf(pointer)));
  address.block = current_block();
  if (known_count == kMaxAddresses) die("more addresses than there is room for", NULL);
  known[known_count] = malloc(sizeof address);
  *known[known_count++] = address;
  return address.sum;
}

nir_def* address_of(LLVMValueRef pointer) {
  if (!is_split(pointer)) return whole_address(pointer);
  int64_t offset;
  nir_def* base = split_address(pointer, &offset);
  return nir_iadd_imm(b, base, offset);
}
