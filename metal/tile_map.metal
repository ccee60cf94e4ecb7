// Work lists of packed sequences.
#define MFA_INSTANCES_WITHOUT_BF16
#define MFA_INSTANCES_WITHOUT_F32
#include "tile_map.h"

namespace mfa {
#include "instances.def"
}
