// Force-included before a translated kernel that is compiled for Mesa's AGX backend: the shim of csrc/simulator/cuda
// with other lanes and matrices. exp2 and the like stay LLVM's intrinsics.
#pragma once
#pragma GCC system_header

#include "cuda/language.h"

// clang-format off
#include "msl/traits.h"
#include "msl/types.h"
#include "msl/limits.h"
#include "msl/math.h"
#include "msl/relational.h"
#include "lanes.h"
#include "cuda/simd.h"
#include "matrix.h"
#include "unit_product.h"
#include "msl/tensor_ops.h"
#include "cuda/kernel.h"
// clang-format on
