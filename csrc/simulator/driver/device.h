#pragma once

#include "object.h"

namespace mfa::driver {

class Device final : public Object {
 public:
  explicit Device(int number) : Object("MTLDevice"), index(number) { immortal = true; }
  const int index;
};

Device* default_device();  // the system's, of index 0
Device* torch_device();    // that of torch's stream and buffers: the last of Settings::devices

struct Size {
  std::uint64_t width, height, depth;
};

}  // namespace mfa::driver
