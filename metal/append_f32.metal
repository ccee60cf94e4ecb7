// Append kernels, f32.
#define MFA_INSTANCES_WITHOUT_F16
#define MFA_INSTANCES_WITHOUT_BF16
#include "append.h"

namespace mfa {
#include "instances.def"
}
