// Decode kernels on the matrix unit, f16.
#define MFA_INSTANCES_WITHOUT_BF16
#include "decode_team.h"

namespace mfa {
#include "instances.def"
}
