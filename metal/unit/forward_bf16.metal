// Forward kernels on the matrix unit, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#include "forward_team.h"

namespace mfa {
#include "instances.def"
}
