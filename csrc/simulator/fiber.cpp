#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"

namespace mfa::sim {
namespace {

#ifndef MAP_NORESERVE
constexpr int MAP_NORESERVE = 0;
#endif

}  // namespace

bool Stacks::reserve(int count) {
  const size_t page = sysconf(_SC_PAGESIZE);
  if (base_ == nullptr) {
    const size_t bytes = (MFA_SIM_MAX_THREADS + 1) * kStackSize;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
#ifdef MADV_NOHUGEPAGE
    madvise(memory, bytes, MADV_NOHUGEPAGE);  // otherwise every lane could commit 2 MiB
#endif
    base_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + kStackSize - 1) & ~(kStackSize - 1));
  }
  for (; guarded_ < count; ++guarded_) mprotect(base_ + guarded_ * kStackSize, page, PROT_NONE);
  return true;
}

uint8_t* Stacks::top(int index) const {
  // Staggered: frames of equal depth would otherwise fall into the same cache set in all lanes.
  return base_ + (index + 1) * kStackSize - (index % 61) * 192;
}

bool Stacks::contains(uintptr_t address) const {
  return base_ != nullptr && address - reinterpret_cast<uintptr_t>(base_) < MFA_SIM_MAX_THREADS * kStackSize;
}

bool Stacks::in_guard_page(uintptr_t address) const {
  return contains(address) && (address & (kStackSize - 1)) < static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace mfa::sim

#ifdef __APPLE__
#define SYMBOL(name) "_" #name
#define HIDDEN(name) ".private_extern _" #name "\n"
#else
#define SYMBOL(name) #name
#define HIDDEN(name) ".hidden " #name "\n"
#endif
#define FUNCTION(name) ".globl " SYMBOL(name) "\n" HIDDEN(name) SYMBOL(name) ":\n"

// The switch ends in `ret` on purpose: lanes wait at equal call depth, so the return predictor stays right.
#if defined(__x86_64__)

asm(".text\n.p2align 4\n"
    FUNCTION(mfa_sim_switch_fiber)
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    FUNCTION(mfa_sim_resume_fiber)
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");

void* mfa::sim::prepare_fiber(uint8_t* top, void (*entry)()) {
  void** slots = reinterpret_cast<void**>(top) - 8;  // six registers, entry, and entry's own return address
  for (int i = 0; i < 8; ++i) slots[i] = nullptr;
  slots[6] = reinterpret_cast<void*>(entry);
  return slots;
}

#elif defined(__aarch64__)

asm(".text\n.p2align 4\n"
    FUNCTION(mfa_sim_switch_fiber)
    "  stp x19, x20, [sp, #-160]!\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    FUNCTION(mfa_sim_resume_fiber)
    "  ldp d14, d15, [sp, #144]\n  ldp d12, d13, [sp, #128]\n  ldp d10, d11, [sp, #112]\n  ldp d8, d9, [sp, #96]\n"
    "  ldp x29, x30, [sp, #80]\n  ldp x27, x28, [sp, #64]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x23, x24, [sp, #32]\n  ldp x21, x22, [sp, #16]\n  ldp x19, x20, [sp], #160\n"
    "  ret\n");

void* mfa::sim::prepare_fiber(uint8_t* top, void (*entry)()) {
  void** slots = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) slots[i] = nullptr;
  slots[11] = reinterpret_cast<void*>(entry);  // x30
  return slots;
}

#else
#error "the simulator's fibers know x86-64 and arm64"
#endif
