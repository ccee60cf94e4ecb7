// Forward kernels, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#define MFA_INSTANCES_WITHOUT_F32
#include "forward.h"

namespace mfa {
#include "instances.def"
}
