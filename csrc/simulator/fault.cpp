#include "fault.h"

#include <pthread.h>
#include <sys/ucontext.h>

#include <cstring>

#include "failure.h"
#include "scheduler.h"

namespace mfa::sim {
namespace {

constexpr int kCount = sizeof FaultGuard::kSignals / sizeof(int);
struct sigaction old_actions[kCount];
pthread_t dispatching;
alignas(64) char signal_stack[64 << 10];

struct Registers {
  uintptr_t pc;
  void set(uintptr_t new_pc, uintptr_t new_sp);
  explicit Registers(void* context);

 private:
  ucontext_t* context_;
};

#if defined(__linux__) && defined(__x86_64__)
#define PC context_->uc_mcontext.gregs[REG_RIP]
#define SP context_->uc_mcontext.gregs[REG_RSP]
#elif defined(__linux__) && defined(__aarch64__)
#define PC context_->uc_mcontext.pc
#define SP context_->uc_mcontext.sp
#elif defined(__APPLE__) && defined(__x86_64__)
#define PC context_->uc_mcontext->__ss.__rip
#define SP context_->uc_mcontext->__ss.__rsp
#elif defined(__APPLE__) && defined(__aarch64__)
#define PC context_->uc_mcontext->__ss.__pc
#define SP context_->uc_mcontext->__ss.__sp
#endif

Registers::Registers(void* context) : context_(static_cast<ucontext_t*>(context)) { pc = static_cast<uintptr_t>(PC); }

void Registers::set(uintptr_t new_pc, uintptr_t new_sp) {
  PC = new_pc;
  SP = new_sp;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  int i = 0;
  while (FaultGuard::kSignals[i] != signal) ++i;
  const struct sigaction& old = old_actions[i];
  if ((old.sa_flags & SA_SIGINFO) != 0) {
    old.sa_sigaction(signal, info, context);
  } else if (old.sa_handler == SIG_DFL || old.sa_handler == SIG_IGN) {
    sigaction(signal, &old, nullptr);  // the instruction faults again, and ends the process
  } else {
    old.sa_handler(signal);
  }
}

void handle(int signal, siginfo_t* info, void* context) {
  const Lane* lane = scheduler.current();
  if (!pthread_equal(pthread_self(), dispatching) || lane == nullptr) return pass_on(signal, info, context);

  Registers registers(context);
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  failure.clear();
  if (signal == SIGFPE) {
    failure.add("integer division by zero");
  } else if (signal == SIGILL) {
    failure.add("illegal instruction, or code that the compiler proved unreachable");
  } else if (scheduler.stacks().in_guard_page(address)) {
    failure.add("stack overflow: a thread has %zu bytes", kStackSize);
  } else {
    failure.add("invalid memory access: %s at address 0x%zx", signal == SIGSEGV ? "SIGSEGV" : "SIGBUS",
                static_cast<size_t>(address));
  }
  failure.at(reinterpret_cast<const void*>(registers.pc));
  failure.by(lane->frame->position);
  // Returning from the handler restores the signal mask; what it returns to is the host's suspended run().
  const auto host = reinterpret_cast<uintptr_t>(scheduler.give_up());
  registers.set(reinterpret_cast<uintptr_t>(mfa_sim_resume_fiber), host);
}

}  // namespace

FaultGuard::FaultGuard() {
  dispatching = pthread_self();
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &old_actions[i]);
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace mfa::sim
