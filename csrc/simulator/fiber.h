// Fibers: one stack per lane, and the switch between them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mfa::sim {

inline constexpr size_t kStackSize = 256 << 10;

// Stacks live until the process ends; pages are committed when first touched. Each stack is aligned to its size, so
// "is this address on my own stack?" is one xor and one shift (checks.cpp).
class Stacks {
 public:
  // False when the address space cannot be had.
  bool reserve(int count);
  // Highest usable address, aligned to 64 bytes.
  uint8_t* top(int index) const;
  uint8_t* bottom(int index) const { return base_ + index * kStackSize; }
  bool contains(uintptr_t address) const;
  bool in_guard_page(uintptr_t address) const;

 private:
  uint8_t* base_ = nullptr;
  int guarded_ = 0;
};

inline uintptr_t stack_pointer() {
  uintptr_t value;
#ifdef __x86_64__
  asm("mov %%rsp, %0" : "=r"(value));
#else
  asm("mov %0, sp" : "=r"(value));
#endif
  return value;
}

// A suspended context that calls entry() on the given stack when first switched to. entry() must not return.
void* prepare_fiber(uint8_t* top, void (*entry)());

extern "C" {
// Saves the running context, stores it in *from, and continues `to`.
void mfa_sim_switch_fiber(void** from, void* to);
// Continues the context in the stack pointer. Only a label: the signal handler enters here (fault.cpp).
void mfa_sim_resume_fiber();
}

}  // namespace mfa::sim
