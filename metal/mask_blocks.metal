// Classes of masks.
#include "mask_blocks.h"

namespace mfa {
#include "instances.def"
}
