// Append kernels, f16.
#define MFA_INSTANCES_WITHOUT_BF16
#define MFA_INSTANCES_WITHOUT_F32
#include "append.h"

namespace mfa {
#include "instances.def"
}
