// The matrix unit's self-test.
#pragma once

#include <string>

#include "metal/metal.h"

namespace mfa::metal {

// Runs the kernel unit_layout of `library` (metal/unit/layout.metal) and waits for it. Returns what is wrong; empty if
// the unit has its data where the kernels take them to be.
std::string test_unit_layout(MTL::Device& device, MTL::Library& library);

}  // namespace mfa::metal
