// Forward kernels on the matrix unit, f16.
#define MFA_INSTANCES_WITHOUT_BF16
#include "forward_team.h"

namespace mfa {
#include "instances.def"
}
