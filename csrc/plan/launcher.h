// The border between the ops and whatever runs a plan: Metal on a Mac, the simulator elsewhere.
#pragma once

#include <array>
#include <cstdint>

#include "plan/plan.h"

namespace mfa {

// A tensor as a kernel argument. On MPS `storage` is the id<MTLBuffer>, never to be dereferenced; elsewhere the address
// of the storage. `extent` bytes from `offset` are all that a kernel may touch.
struct Buffer {
  void* storage = nullptr;
  std::uint64_t offset = 0;
  std::uint64_t extent = 0;
};

// By Argument. kParams and kFirstUnit stay empty: a launcher binds the plan's params and the launch's first_unit
// itself.
using Arguments = std::array<Buffer, kArgumentCount>;

class Launcher {
 public:
  virtual ~Launcher() = default;
  virtual Family family() const = 0;
  virtual void run(const Plan& plan, const Arguments& arguments) = 0;  // throws std::runtime_error
};

// The launcher for CPU tensors: null unless mfa.simulate() is active.
Launcher* simulated_launcher();

// The launcher for MPS tensors. Throws std::runtime_error that says what is missing.
Launcher& metal_launcher();

}  // namespace mfa

// The one symbol through which _native installs the simulator (null to remove it); returns the launcher that it
// replaces. Not thread-safe against running ops: whoever replaces a launcher waits for them before it is destroyed.
extern "C" __attribute__((visibility("default"))) mfa::Launcher* mfa_set_simulated_launcher(mfa::Launcher* launcher);
