// One dispatch: what is bound, whether Metal would take it, and its run in the engine.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "buffer.h"
#include "device.h"
#include "pipeline.h"

namespace mfa::driver {

struct Slot {
  Ref<Buffer> buffer;
  std::uint64_t offset = 0;
  Bytes bytes;  // of setBytes
  bool bound = false;
  std::uint64_t op = 0;  // in which op of a shared encoder it was set

  const std::uint8_t* address() const;
  std::uint64_t size() const { return buffer ? buffer->length - offset : bytes.size(); }
};

struct Bindings {
  Ref<Pipeline> pipeline;
  std::uint64_t pipeline_op = 0;
  std::array<Slot, MFA_SIM_BUFFERS> slots;
  std::array<std::uint64_t, MFA_SIM_BUFFERS> threadgroup_memory{};
};

struct Dispatch {
  Bindings bindings;
  Size groups, threads;
};

// Reports the first thing that is wrong; true when the dispatch may run. `op`: the current one, 0 when nobody shares.
bool validate(const Bindings& bindings, const Size& groups, const Size& threads, std::uint64_t op);

// Runs it. The engine's message when the kernel did something wrong.
std::optional<std::string> execute(const Bindings& bindings, const Size& groups, const Size& threads);

struct LaunchRecord {
  std::string kernel;
  Size groups, threads;
  std::uint64_t threadgroup_memory;
  mfa_sim_counters counters;
};
std::vector<LaunchRecord> launches();
void clear_launches();

}  // namespace mfa::driver
