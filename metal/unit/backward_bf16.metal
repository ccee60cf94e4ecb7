// Backward kernels on the matrix unit, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#include "backward_dbias.h"
#include "backward_dkdv.h"
#include "backward_dq.h"

namespace mfa {
#include "instances.def"
}
