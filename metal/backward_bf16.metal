// Backward kernels, bf16.
#define MFA_INSTANCES_WITHOUT_F16
#define MFA_INSTANCES_WITHOUT_F32
#include "backward_dbias.h"
#include "backward_delta.h"
#include "backward_dkdv.h"
#include "backward_dkdv_team.h"
#include "backward_dq.h"
#include "backward_dq_from_ds.h"
#include "backward_dq_team.h"

namespace mfa {
#include "instances.def"
}
