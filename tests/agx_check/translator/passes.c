// LLVM's own passes over a kernel, before it is translated: constants into addresses, structured control flow.
#include <llvm-c/Support.h>
#include <llvm-c/TargetMachine.h>
#include <llvm-c/Transforms/PassBuilder.h>
#include <string.h>

#include "translator.h"

static const char* const kOptions[] = {
    "translator",
    // As Apple's compiler does: everything inline, loops of known length unrolled.
    "-inline-threshold=1000000",
    "-unroll-threshold=100000",
    "-pragma-unroll-threshold=1000000",
    "-unroll-max-count=4096",
    "-unroll-allow-peeling=false",
    "-vectorize-loops=false",
    "-vectorize-slp=false",
};

static const char kStructure[] =
    "function(separate-const-offset-from-gep,slsr,early-cse,nary-reassociate,early-cse,instcombine,lower-switch,"
    "fix-irreducible,loop-simplify,lcssa,structurizecfg)";

static LLVMTargetMachineRef target_machine(LLVMModuleRef module) {
  LLVMInitializeNVPTXTargetInfo();
  LLVMInitializeNVPTXTarget();
  LLVMInitializeNVPTXTargetMC();
  LLVMTargetRef target;
  char* error;
  if (LLVMGetTargetFromTriple(LLVMGetTarget(module), &target, &error)) die(error, NULL);
  return LLVMCreateTargetMachine(target, LLVMGetTarget(module), "", "", LLVMCodeGenLevelDefault, LLVMRelocDefault,
                                 LLVMCodeModelDefault);
}

static bool has_allocas(LLVMModuleRef module) {
  for (LLVMValueRef f = LLVMGetFirstFunction(module); f; f = LLVMGetNextFunction(f))
    for (LLVMBasicBlockRef block = LLVMGetFirstBasicBlock(f); block; block = LLVMGetNextBasicBlock(block))
      for (LLVMValueRef i = LLVMGetFirstInstruction(block); i; i = LLVMGetNextInstruction(i))
        if (LLVMGetInstructionOpcode(i) == LLVMAlloca) return true;
  return false;
}

static void inline_all(LLVMModuleRef module) {
  const char name[] = "alwaysinline";
  const unsigned kind = LLVMGetEnumAttributeKindForName(name, strlen(name));
  LLVMAttributeRef attribute = LLVMCreateEnumAttribute(LLVMGetModuleContext(module), kind, 0);
  for (LLVMValueRef f = LLVMGetFirstFunction(module); f; f = LLVMGetNextFunction(f))
    if (!LLVMIsDeclaration(f)) LLVMAddAttributeAtIndex(f, LLVMAttributeFunctionIndex, attribute);
}

static void run(LLVMModuleRef module, const char* passes, LLVMTargetMachineRef machine) {
  LLVMPassBuilderOptionsRef options = LLVMCreatePassBuilderOptions();
  LLVMErrorRef error = LLVMRunPasses(module, passes, machine, options);
  if (error) die(LLVMGetErrorMessage(error), NULL);
  LLVMDisposePassBuilderOptions(options);
}

void prepare(LLVMModuleRef module) {
  LLVMParseCommandLineOptions(ARRAY_SIZE(kOptions), kOptions, NULL);
  LLVMTargetMachineRef machine = target_machine(module);
  // An array of fragments may need its loops unrolled before it is known to need no memory: twice more does.
  if (has_allocas(module)) inline_all(module);
  for (int i = 0; i < 2 && has_allocas(module); ++i) run(module, "default<O3>", machine);
  run(module, kStructure, machine);
}
