// MTLComputeCommandEncoder.
#pragma once

#include <string>

#include "queue.h"

namespace mfa::driver {

class Encoder final : public Object {
 public:
  explicit Encoder(CommandBuffer* to) : Object("MTLComputeCommandEncoder"), buffer(to) {}
  void dispose() override;
  void end();
  Device* device() const { return buffer->queue->device; }

  Ref<CommandBuffer> buffer;
  Bindings bindings;
  std::string label;
  int debug_groups = 0;
  bool ended = false;
  bool concurrent = false;
  // Torch keeps one encoder open for many ops, and only torch ends it. The op number tells what an op has set itself.
  bool shared = false;
  std::uint64_t op = 0;
};

}  // namespace mfa::driver
