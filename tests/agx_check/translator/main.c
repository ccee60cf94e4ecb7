// translator KERNEL.ll THREADS PARAMS_INDEX [rematerialise]: compiles a kernel for G13 with Mesa's AGX backend.
//
// Prints each block with its successors and instructions, and then a line of numbers: `demand`, the most 16-bit
// registers alive before anything is spilled; `registers`, of the machine code; bytes of the stack and of threadgroup
// memory.
#include <llvm-c/IRReader.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "asahi/compiler/agx_compile.h"
#include "asahi/compiler/agx_nir.h"
#include "compiler/glsl_types.h"
#include "translator.h"

static nir_builder builder;
nir_builder* b = &builder;
LLVMTargetDataRef data_layout;
LLVMValueRef argument;
unsigned params_index;

void die(const char* what, LLVMValueRef value) {
  fprintf(stderr, "%s%s%s\n", what, value ? ": " : "", value ? LLVMPrintValueToString(value) : "");
  exit(1);
}

static LLVMModuleRef read_module(const char* path) {
  LLVMContextRef context = LLVMContextCreate();
  LLVMMemoryBufferRef buffer;
  LLVMModuleRef module;
  char* error;
  if (LLVMCreateMemoryBufferWithContentsOfFile(path, &buffer, &error) ||
      LLVMParseIRInContext(context, buffer, &module, &error))
    die(error, NULL);
  return module;
}

static LLVMValueRef kernel_of(LLVMModuleRef module) {
  LLVMValueRef function = LLVMGetFirstFunction(module);
  while (function && (LLVMIsDeclaration(function) || LLVMCountParams(function) != 1))
    function = LLVMGetNextFunction(function);
  if (!function) die("no kernel", NULL);
  return function;
}

static void optimise(nir_shader* nir) {
  bool progress;
  do {
    progress = false;
    NIR_PASS(progress, nir, nir_copy_prop);
    NIR_PASS(progress, nir, nir_opt_remove_phis);
    NIR_PASS(progress, nir, nir_lower_phis_to_scalar, true);
    NIR_PASS(progress, nir, nir_opt_dce);
    NIR_PASS(progress, nir, nir_opt_dead_cf);
    NIR_PASS(progress, nir, nir_opt_cse);
    NIR_PASS(progress, nir, nir_opt_if, 0);
    NIR_PASS(progress, nir, nir_opt_algebraic);
    NIR_PASS(progress, nir, nir_opt_constant_folding);
    NIR_PASS(progress, nir, nir_opt_undef);
    NIR_PASS(progress, nir, nir_opt_loop);
  } while (progress);
}

static nir_shader* translate(LLVMModuleRef module, unsigned threads) {
  data_layout = LLVMCreateTargetData(LLVMGetDataLayoutStr(module));
  LLVMValueRef kernel = kernel_of(module);
  argument = LLVMGetParam(kernel, 0);
  builder = nir_builder_init_simple_shader(MESA_SHADER_COMPUTE, &agx_nir_options, "mfa");
  nir_shader* nir = b->shader;
  nir->info.workgroup_size[0] = threads, nir->info.workgroup_size[1] = nir->info.workgroup_size[2] = 1;
  nir->info.subgroup_size = SUBGROUP_SIZE_FULL_SUBGROUPS;
  translate_function(kernel);
  nir->info.shared_size = threadgroup_bytes();
  nir_metadata_preserve(b->impl, nir_metadata_none);
  nir_validate_shader(nir, "after translation");
  NIR_PASS(_, nir, nir_lower_reg_intrinsics_to_ssa);
  optimise(nir);
  NIR_PASS(_, nir, nir_lower_system_values);
  const nir_lower_compute_system_values_options options = {0};
  NIR_PASS(_, nir, nir_lower_compute_system_values, &options);
  nir_shader_gather_info(nir, b->impl);
  return nir;
}

int main(int argc, char** argv) {
  if (argc < 4) die("usage: translator KERNEL.ll THREADS PARAMS_INDEX [rematerialise]", NULL);
  params_index = atoi(argv[3]);
  LLVMModuleRef module = read_module(argv[1]);
  prepare(module);
  glsl_type_singleton_init_or_ref();
  nir_shader* nir = translate(module, atoi(argv[2]));
  nir_builder library = nir_builder_init_simple_shader(MESA_SHADER_COMPUTE, &agx_nir_options, "no library");
  agx_preprocess_nir(nir, library.shader);
  const struct agx_shader_key key = {
      .libagx = library.shader,
      .promote_constants = true,
      .has_scratch = true,
      .dev.soft_fault = true,  // loads may run where nothing needs them: parameters hoist to the preamble
      .reserved_preamble = kBuffers * 4 + 6,  // 16-bit uniforms: addresses, and threadgroups per grid
      .rematerialise_uniforms = argc > 4,
      .statistics = stdout,
  };
  struct agx_shader_part part;
  agx_compile_shader_nir(nir, (struct agx_shader_key*)&key, NULL, &part);
  printf("RESULT registers %u stack %u threadgroup %u\n", part.info.nr_gprs, part.info.scratch_size,
         part.info.local_size);
  return 0;
}
