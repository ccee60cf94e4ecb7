// Backward kernels on the matrix unit, f16.
#define MFA_INSTANCES_WITHOUT_BF16
#include "backward_dbias.h"
#include "backward_dkdv.h"
#include "backward_dq.h"

namespace mfa {
#include "instances.def"
}
