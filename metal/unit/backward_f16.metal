// Backward kernels on the matrix unit, f16.
#define MFA_INSTANCES_WITHOUT_BF16
#include "backward_dbias.h"
#include "backward_dkdv_team.h"
#include "backward_dq_team.h"

namespace mfa {
#include "instances.def"
}
