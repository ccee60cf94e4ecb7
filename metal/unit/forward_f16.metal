// Forward kernels on the matrix unit, f16.
#include "forward.h"

namespace mfa {
FORWARD(f16, unit, split, 64, 64, 4, 2, 32)
FORWARD(f16, unit, shared, 80, 80, 4, 2, 32)
FORWARD(f16, unit, shared, 96, 96, 4, 2, 32)
FORWARD(f16, unit, shared, 128, 128, 4, 2, 32)
}  // namespace mfa
