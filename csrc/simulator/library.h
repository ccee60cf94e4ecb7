// Kernel libraries: loading, what they registered, and which source line an instruction comes from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"

struct mfa_sim_library {
  std::string path;
  void* handle = nullptr;
  uintptr_t load_bias = 0;       // address at run time minus address in the file
  uintptr_t begin = 0, end = 0;  // code, constants and function constants
  std::vector<mfa_sim_kernel> kernels;
  std::vector<mfa_sim_function_constant> constants;       // one row per name and index, for listing
  std::vector<mfa_sim_function_constant> every_constant;  // each translation unit has its own copy to be set
  bool instrumented = false;

  const mfa_sim_kernel* find_kernel(const char* name) const;
  const mfa_sim_function_constant* find_constant(const char* name) const;
  bool contains(uintptr_t address) const { return address - begin < end - begin; }
};

namespace mfa::sim {

// Called by the module constructor that -fsanitize=thread adds.
void library_is_instrumented();

// "file.h:120", or "libkernels.so+0x1234" where no line is known. Starts a process; for error paths only.
std::string source_location(const void* pc);

}  // namespace mfa::sim
