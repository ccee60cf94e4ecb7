#pragma once

#include "object.h"

namespace mfa::driver {

class Device final : public Object {
 public:
  Device() : Object("MTLDevice") { immortal = true; }
};

Device* default_device();

struct Size {
  std::uint64_t width, height, depth;
};

}  // namespace mfa::driver
