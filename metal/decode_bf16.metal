// Decode kernels, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#define MFA_INSTANCES_WITHOUT_F32
#include "combine.h"
#include "decode.h"

namespace mfa {
#include "instances.def"
}
