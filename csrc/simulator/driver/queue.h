// MTLCommandQueue and MTLCommandBuffer.
#pragma once

#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "block.h"
#include "execute.h"
#include "foundation.h"

namespace mfa::driver {

class CommandBuffer;
class Encoder;

class CommandQueue final : public Object {
 public:
  explicit CommandQueue(Device* of) : Object("MTLCommandQueue"), device(of) {}
  void dispose() override;

  // Runs what was committed, up to and with `last`; null: everything.
  void run_until(const CommandBuffer* last);

  Device* const device;
  std::mutex mutex;
  std::deque<Ref<CommandBuffer>> committed;  // not yet run
  std::string label;
};

class CommandBuffer final : public Object {
 public:
  enum Status : std::uint64_t { not_enqueued, enqueued, committed, scheduled, completed, failed };

  CommandBuffer(CommandQueue* of) : Object("MTLCommandBuffer"), queue(of) {}
  void add(const Bindings& bindings, const Size& groups, const Size& threads);  // runs it now, or keeps it
  void run();

  Ref<CommandQueue> queue;
  Encoder* open = nullptr;  // at most one encodes at a time
  Status status = not_enqueued;
  std::string label, error;

  std::vector<Dispatch> dispatches;  // lazy ones
  std::vector<HeldBlock> scheduled_handlers, completed_handlers;
};

}  // namespace mfa::driver
