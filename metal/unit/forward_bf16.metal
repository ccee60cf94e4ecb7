// Forward kernels on the matrix unit, bf16.
#include "forward.h"

namespace mfa {
FORWARD(bf16, unit, split, 64, 64, 4, 2, 32)
FORWARD(bf16, unit, shared, 80, 80, 4, 2, 32)
FORWARD(bf16, unit, shared, 96, 96, 4, 2, 32)
FORWARD(bf16, unit, shared, 128, 128, 4, 2, 32)
}  // namespace mfa
