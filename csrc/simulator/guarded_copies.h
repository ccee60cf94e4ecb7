// Copies of the bound buffers, far apart: the host's own may lie side by side, and what overran one would then be a
// legal access to the next.
#pragma once

#include <cstddef>
#include <vector>

#include "memory.h"
#include "scheduler.h"

namespace mfa::sim {

class GuardedCopies {
 public:
  // Moves the regions, and what the launch has of them, to copies. False, with the reason in `failure`, without memory.
  bool make(Regions& regions, Launch& launch);
  // Brings back what the kernel may have written.
  ~GuardedCopies();

 private:
  struct Copy {
    void* original;
    void* copy;
    size_t size;
    bool writable;
  };
  std::vector<Copy> copies_;
  void* pages_ = nullptr;
  size_t size_ = 0;
};

}  // namespace mfa::sim
