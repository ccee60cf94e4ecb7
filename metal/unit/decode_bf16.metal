// Decode kernels on the matrix unit, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#include "decode_team.h"

namespace mfa {
#include "instances.def"
}
