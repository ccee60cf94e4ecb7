// Element types, as instances.def and host names spell them.
#pragma once

#include <metal_stdlib>

namespace mfa {

typedef half f16;
typedef bfloat bf16;
typedef float f32;

}  // namespace mfa
