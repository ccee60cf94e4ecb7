// Decode kernels, f16.
#define MFA_INSTANCES_WITHOUT_BF16
#define MFA_INSTANCES_WITHOUT_F32
#include "combine.h"
#include "decode.h"

namespace mfa {
#include "instances.def"
}
