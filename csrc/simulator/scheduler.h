// Runs one threadgroup: a fiber per lane, SIMD-groups of 32, collectives and barriers.
#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>

#include "engine.h"
#include "fiber.h"

namespace mfa::sim {

// Held while a dispatch runs and while a library's constructors run.
extern std::mutex engine_lock;
extern mfa_sim_counters counters;

inline constexpr int kMaxSimds = MFA_SIM_MAX_THREADS / MFA_SIM_LANES;
inline constexpr int kMaxParameters = 64;

// Continues mfa_sim_class for the sites that this file knows itself.
enum { kSimdgroupBarrier = MFA_SIM_REDUCTION + 1, kThreadgroupBarrier };

// Where a lane waits. Lanes meet when all fields agree.
struct Site {
  mfa_sim_operation operation;
  uint64_t key;
  const char* name;
  const char* file;
  int line, cls;
};

inline bool same_site(const Site& a, const Site& b) {
  const auto same_text = [](const char* x, const char* y) { return x == y || strcmp(x, y) == 0; };
  return a.line == b.line && a.operation == b.operation && a.key == b.key && a.cls == b.cls &&
         same_text(a.file, b.file) && same_text(a.name, b.name);
}

// Lies at the top of the lane's own stack, so that reading a position needs no bounds check of its own.
struct Frame {
  mfa_sim_position position;
  void* arguments[kMaxParameters];
};

struct Simd;

struct Lane {
  void* stack_pointer;
  Simd* simd;
  Frame* frame;
  uint32_t bit;     // 1 << place in the SIMD-group's running order
  uint32_t index;   // thread_index_in_simdgroup
  uint32_t thread;  // as in a stamp (checks.h)
  Site site;        // valid while it waits elsewhere than simd->site
};

// Masks go by place in the running order, which the seed shuffles; only messages translate them to lanes.
struct Simd {
  uint32_t runnable, returned, existing;
  uint32_t agreeing;  // lanes waiting at `site`
  Site site;
  Lane* order[MFA_SIM_LANES];
  void* arguments[MFA_SIM_LANES];  // by lane
  uint32_t index;

  uint32_t waiting() const { return existing & ~runnable & ~returned; }
  uint32_t waiting_at(const Site& where) const;
  const Site& site_of(const Lane& lane) const { return (agreeing & lane.bit) != 0 ? site : lane.site; }
};

// What all threadgroups of a dispatch share.
struct Launch {
  mfa_sim_entry entry;
  void* arguments[kMaxParameters];
  int argument_count;
  mfa_sim_uint3 groups, threads;  // grid in threadgroups; threads per threadgroup
  uint64_t seed;
  bool allow_divergence;
};

class Scheduler {
 public:
  // False when stacks cannot be had.
  bool begin(const Launch& launch);
  // False when the dispatch failed; the reason is in `failure`.
  bool run(mfa_sim_uint3 group);
  uint32_t random(uint32_t bound);

  Lane* current() const { return current_; }  // null on the host's stack
  const Launch& launch() const { return launch_; }
  bool in_operation() const { return in_operation_; }
  const Stacks& stacks() const { return stacks_; }

  void arrive(mfa_sim_operation operation, void* argument, int cls, uint64_t key, const char* name, const char* file,
              int line);
  [[noreturn]] void lane_returned();
  // Gives the dispatch up: continues on the host's stack, leaving every fiber where it stands.
  [[noreturn]] void abandon();
  // For a signal handler, which cannot call abandon(): the host's stack pointer. The host runs next.
  void* give_up();

 private:
  void arrive_elsewhere(const Site& site);
  void place_lanes(mfa_sim_uint3 group);
  Simd& choose_simd();
  void switch_to(Simd& simd, Lane& from);
  void resolve(Lane& last);
  void execute(Simd& simd, const Site& site, uint32_t mask);
  void diverged(Simd& simd);
  void release_threadgroup_barrier();
  void wake(Simd& simd, uint32_t mask);

  Lane* current_ = nullptr;
  bool in_operation_ = false;
  uint32_t ready_ = 0;     // SIMD-groups with a runnable lane
  uint32_t arrived_ = 0;   // ... that wait at a threadgroup barrier
  uint32_t finished_ = 0;  // ... whose lanes have all returned
  void* host_ = nullptr;
  int simd_count_ = 0;
  uint64_t random_ = 0;
  Launch launch_{};
  Stacks stacks_;
  Simd simds_[kMaxSimds];
  Lane lanes_[MFA_SIM_MAX_THREADS];
};

extern Scheduler scheduler;

// Runs for every lane at every collective, so it must inline to code that saves no register of its own.
__attribute__((always_inline)) inline void Scheduler::arrive(mfa_sim_operation operation, void* argument, int cls,
                                                             uint64_t key, const char* name, const char* file,
                                                             int line) {
  Lane& lane = *current_;
  Simd& simd = *lane.simd;
  simd.arguments[lane.index] = argument;
  const uint32_t runnable = simd.runnable &= ~lane.bit;
  const Site& site = simd.site;
  if (simd.agreeing == 0 || site.line != line || site.operation != operation || site.key != key || site.cls != cls ||
      site.file != file || site.name != name) {
    return arrive_elsewhere({operation, key, name, file, line, cls});
  }
  simd.agreeing |= lane.bit;
  if (runnable == 0) return resolve(lane);
  Lane& next = *simd.order[__builtin_ctz(runnable)];
  current_ = &next;
  mfa_sim_switch_fiber(&lane.stack_pointer, next.stack_pointer);
}

// Fails the dispatch with what `failure` says, blaming the running lane.
[[noreturn]] void fail();

}  // namespace mfa::sim
