// Turns a CPU fault inside a kernel (wild pointer, stack overflow, integer division by zero) into a failed dispatch.
#pragma once

#include <csignal>

namespace mfa::sim {

// While one lives, faults on the dispatching thread's fibers continue on the host's stack; all others go where they
// went before.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;

  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

 private:
  stack_t old_stack_;
};

}  // namespace mfa::sim
