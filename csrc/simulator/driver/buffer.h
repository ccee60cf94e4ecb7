// MTLBuffer. Its handle is the start of unreadable memory as long as the contents, so that host code which takes
// `data_ptr()` for an address faults at once, and a handle with a storage offset in it can be told for what it is.
#pragma once

#include "block.h"
#include "device.h"
#include "object.h"

namespace mfa::driver {

class Buffer final : public Object {
 public:
  // `memory` null: fresh memory, all 0xFF (NaN in every float format), which ends at a guard page, up to 16 bytes of
  // slack.
  Buffer(Device* of, std::uint64_t size, std::uint64_t resource_options, void* memory, HeldBlock deallocator);
  ~Buffer() override;

  void* handle() override { return handle_; }
  std::uint64_t extent() const override { return extent_; }
  void dispose() override;

  Device* const device;
  const std::uint64_t length, options;
  char* contents;  // also of private buffers: the GPU's view
  std::string label;
  bool is_private() const { return (options >> 4 & 15) == 2; }

 private:
  char* handle_;
  std::uint64_t extent_, mapped_;
  HeldBlock deallocator_;
  bool owns_contents_;
};

std::uint64_t allocated_bytes();  // of all live buffers

}  // namespace mfa::driver
