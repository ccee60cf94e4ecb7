// metal-cpp's selectors and classes: exactly one source defines them.
#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#include "metal/metal.h"
