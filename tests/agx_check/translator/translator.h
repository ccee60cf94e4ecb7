// LLVM IR of one kernel -> NIR, Mesa's IR. State of the one translation that a process makes.
#pragma once

#include <llvm-c/Core.h>
#include <llvm-c/Target.h>
#include <stdbool.h>
#include <stdint.h>
#undef LLVM_ATTRIBUTE  // Mesa's macro of that name
#include "nir.h"
#include "nir_builder.h"
#include "util/hash_table.h"

enum { kMaxBlocks = 4096, kMaxElements = 16, kBuffers = 31, kThreadgroupSpace = 3 };

extern nir_builder* b;
extern LLVMTargetDataRef data_layout;
extern LLVMValueRef argument;  // the kernel's only one: addresses of buffers by index, by value

extern unsigned params_index;  // of the buffer in Metal's constant address space

_Noreturn void die(const char* what, LLVMValueRef value);  // value: printed with it, or NULL

// types.c: vectors have several components.
bool is_bfloat(LLVMTypeRef type);
unsigned bits_of(LLVMTypeRef type);
unsigned components_of(LLVMTypeRef type);

// values.c
void define(LLVMValueRef value, nir_def* def);
nir_def* value_of(LLVMValueRef value);
nir_def* operand(LLVMValueRef instruction, unsigned index);
unsigned threadgroup_bytes(void);  // of the variables met so far

// NIR has no bfloat: its bits are 16-bit integers, and arithmetic is in float32.
nir_def* widen_bfloat(nir_def* bits);
nir_def* narrow_to_bfloat(nir_def* value);

// addresses.c
nir_def* address_of(LLVMValueRef get_element_pointer);
bool is_of_argument(LLVMValueRef pointer);
nir_def* split_address(LLVMValueRef pointer, int64_t* offset);  // without the constant part, which goes to `offset`

// passes.c
void prepare(LLVMModuleRef module);

// instructions.c, calls.c: NULL for what yields nothing
nir_def* translate_instruction(LLVMValueRef instruction);
nir_def* translate_call(LLVMValueRef instruction);

// control_flow.c
void translate_function(LLVMValueRef function);
bool dominates(int block, int other);
int current_block(void);
