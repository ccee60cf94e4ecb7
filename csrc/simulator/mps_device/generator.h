// Random numbers: an mps generator is a CPU generator under another name, so a seed gives what it gives on the CPU.
#pragma once

#include <ATen/core/Generator.h>

namespace mfa::stand_in {

const at::Generator& default_generator();
at::Generator new_generator();
at::Generator cpu_generator(const at::Generator& generator);

}  // namespace mfa::stand_in
