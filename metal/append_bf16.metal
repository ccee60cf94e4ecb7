// Append kernels, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#define MFA_INSTANCES_WITHOUT_F32
#include "append.h"

namespace mfa {
#include "instances.def"
}
