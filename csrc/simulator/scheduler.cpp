#include "scheduler.h"

#include <cstring>
#include <utility>

#include "asan.h"
#include "checks.h"
#include "divergence.h"
#include "failure.h"

namespace mfa::sim {

std::mutex engine_lock;
mfa_sim_counters counters;
Scheduler scheduler;

namespace {

constexpr uint32_t kHopOdds = 16;  // a seeded run leaves a SIMD-group after one collective in so many

[[noreturn]] void run_lane() {
  scheduler.launch().entry(scheduler.current()->frame->arguments);
  scheduler.lane_returned();
}

}  // namespace

void fail() {
  failure.by(scheduler.current()->frame->position);
  scheduler.abandon();
}

uint32_t Scheduler::random(uint32_t bound) {  // splitmix64
  uint64_t z = random_ += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

bool Scheduler::begin(const Launch& launch) {
  launch_ = launch;
  random_ = launch.seed;
  const int threads = launch.threads.x * launch.threads.y * launch.threads.z;
  simd_count_ = (threads + MFA_SIM_LANES - 1) / MFA_SIM_LANES;
  if (!stacks_.reserve(threads)) return false;
  asan_unpoison(stacks_.bottom(0), threads * kStackSize);  // a dispatch that failed left its frames behind
  for (int t = 0; t < threads; ++t) {
    Lane& lane = lanes_[t];
    lane.simd = &simds_[t / MFA_SIM_LANES];
    lane.index = t % MFA_SIM_LANES;
    lane.thread = t / MFA_SIM_LANES * stamp::kOtherSimd + lane.index;
    lane.frame = reinterpret_cast<Frame*>(stacks_.top(t) - (sizeof(Frame) + 63) / 64 * 64);
    const auto [x, y, z] = launch.threads;
    const uint32_t i = t;
    mfa_sim_position& p = lane.frame->position;
    p.threads_per_grid = {launch.groups.x * x, launch.groups.y * y, launch.groups.z * z};
    p.threadgroups_per_grid = launch.groups;
    p.thread_position_in_threadgroup = {i % x, i / x % y, i / x / y};
    p.threads_per_threadgroup = launch.threads;
    p.thread_index_in_threadgroup = i;
    p.thread_index_in_simdgroup = lane.index;
    p.simdgroup_index_in_threadgroup = i / MFA_SIM_LANES;
    p.simdgroups_per_threadgroup = simd_count_;
    p.threads_per_simdgroup = MFA_SIM_LANES;
    memcpy(lane.frame->arguments, launch.arguments, launch.argument_count * sizeof(void*));
  }
  return true;
}

void Scheduler::place_lanes(mfa_sim_uint3 group) {
  const auto [x, y, z] = launch_.threads;
  const int threads = x * y * z;
  for (int s = 0; s < simd_count_; ++s) {
    Simd& simd = simds_[s];
    const int lanes = s == simd_count_ - 1 ? threads - s * MFA_SIM_LANES : MFA_SIM_LANES;
    simd.index = s;
    simd.existing = simd.runnable = lanes == MFA_SIM_LANES ? ~0u : (1u << lanes) - 1;
    simd.returned = simd.agreeing = 0;
    memset(simd.arguments, 0, sizeof simd.arguments);
    for (int i = 0; i < lanes; ++i) simd.order[i] = &lanes_[s * MFA_SIM_LANES + i];
    if (launch_.seed != 0) {
      for (int i = lanes - 1; i > 0; --i) std::swap(simd.order[i], simd.order[random(i + 1)]);
    }
    for (int i = 0; i < lanes; ++i) {
      Lane& lane = *simd.order[i];
      lane.bit = 1u << i;
      lane.stack_pointer = prepare_fiber(reinterpret_cast<uint8_t*>(lane.frame), run_lane);
      mfa_sim_position& p = lane.frame->position;
      const mfa_sim_uint3& in_group = p.thread_position_in_threadgroup;
      p.threadgroup_position_in_grid = group;
      p.thread_position_in_grid = {group.x * x + in_group.x, group.y * y + in_group.y, group.z * z + in_group.z};
    }
  }
  ready_ = simd_count_ == kMaxSimds ? ~0u : (1u << simd_count_) - 1;
  arrived_ = finished_ = 0;
  in_operation_ = false;
}

bool Scheduler::run(mfa_sim_uint3 group) {
  place_lanes(group);
  checks.begin_group(group);
  current_ = choose_simd().order[0];
  mfa_sim_switch_fiber(&host_, current_->stack_pointer);
  return !failure.happened();
}

void* Scheduler::give_up() {
  current_ = nullptr;
  return host_;
}

void Scheduler::abandon() {
  void* unused;
  mfa_sim_switch_fiber(&unused, give_up());
  __builtin_unreachable();
}

// One of the SIMD-groups that can run.
Simd& Scheduler::choose_simd() {
  uint32_t choices = ready_;
  if (launch_.seed != 0) {
    for (uint32_t skip = random(__builtin_popcount(choices)); skip > 0; --skip) choices &= choices - 1;
  }
  return simds_[__builtin_ctz(choices)];
}

void Scheduler::switch_to(Simd& simd, Lane& from) {
  Lane& next = *simd.order[__builtin_ctz(simd.runnable)];
  if (&next == &from) return;
  current_ = &next;
  mfa_sim_switch_fiber(&from.stack_pointer, next.stack_pointer);
}

// Not the lane's SIMD-group's first arrival at this very site with the same literals: the rare half of arrive().
__attribute__((noinline)) void Scheduler::arrive_elsewhere(const Site& site) {
  Lane& lane = *current_;
  Simd& simd = *lane.simd;
  if (simd.agreeing == 0) {
    simd.site = site;
    simd.agreeing = lane.bit;
  } else if (same_site(simd.site, site)) {
    simd.agreeing |= lane.bit;
  } else {
    lane.site = site;
  }
  if (simd.runnable != 0) {
    switch_to(simd, lane);
  } else {
    resolve(lane);
  }
}

void Scheduler::lane_returned() {
  Lane& lane = *current_;
  Simd& simd = *lane.simd;
  simd.runnable &= ~lane.bit;
  simd.returned |= lane.bit;
  simd.arguments[lane.index] = nullptr;
  if (simd.returned == simd.existing) {
    ready_ &= ~(1u << simd.index);
    finished_ |= 1u << simd.index;
    if (ready_ == 0 && arrived_ != 0) release_threadgroup_barrier();
    if (ready_ == 0) abandon();  // the group is done
    switch_to(choose_simd(), lane);
  } else if (simd.runnable != 0) {
    switch_to(simd, lane);
  } else {
    resolve(lane);
  }
  __builtin_unreachable();
}

// Every lane of the SIMD-group waits or has returned.
void Scheduler::resolve(Lane& last) {
  Simd& simd = *last.simd;
  const bool barrier = simd.site.cls == kThreadgroupBarrier;
  if (simd.agreeing == simd.existing) {
    execute(simd, simd.site, simd.existing);
  } else {
    diverged(simd);
  }
  const bool stay = simd.runnable != 0 && !barrier && (launch_.seed == 0 || random(kHopOdds) != 0);
  switch_to(stay ? simd : choose_simd(), last);
}

void Scheduler::wake(Simd& simd, uint32_t mask) {
  // Lanes that stay behind lose the shared description of where they wait.
  for (uint32_t left = simd.agreeing & ~mask; left != 0; left &= left - 1) {
    simd.order[__builtin_ctz(left)]->site = simd.site;
  }
  simd.agreeing = 0;
  simd.runnable |= mask;
  ready_ |= 1u << simd.index;
}

void Scheduler::execute(Simd& simd, const Site& site, uint32_t mask) {
  if (site.cls == kThreadgroupBarrier) {
    ++counters.threadgroup_barriers;
    arrived_ |= 1u << simd.index;
    ready_ &= ~(1u << simd.index);
    if (ready_ == 0) release_threadgroup_barrier();
    return;
  }
  if (site.cls == kSimdgroupBarrier) {
    ++counters.simdgroup_barriers;
    checks.order_simd(simd.index, static_cast<uint32_t>(site.key));
    wake(simd, mask);
    return;
  }
  const bool matrix = site.cls == MFA_SIM_MMA || site.cls == MFA_SIM_UNIT || site.cls == MFA_SIM_MATRIX;
  if (matrix && mask != ~0u) fail_missing_lanes(simd, site, mask);
  switch (site.cls) {
    case MFA_SIM_MMA: ++counters.mma; break;
    case MFA_SIM_UNIT: counters.unit_mma += site.key; break;
    case MFA_SIM_SHUFFLE: ++counters.shuffles; break;
    case MFA_SIM_REDUCTION: ++counters.reductions; break;
  }
  in_operation_ = true;
  if (mask == simd.existing) {
    site.operation(simd.arguments);
  } else {
    void* arguments[MFA_SIM_LANES] = {};
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      const uint32_t lane = simd.order[__builtin_ctz(left)]->index;
      arguments[lane] = simd.arguments[lane];
    }
    site.operation(arguments);
  }
  in_operation_ = false;
  wake(simd, mask);
}

uint32_t Simd::waiting_at(const Site& where) const {
  uint32_t mask = 0;
  for (uint32_t left = waiting(); left != 0; left &= left - 1) {
    const Lane& lane = *order[__builtin_ctz(left)];
    if (same_site(where, site_of(lane))) mask |= lane.bit;
  }
  return mask;
}

// Not all lanes wait at one site: an error, unless divergence is allowed and some of them can go on by themselves.
void Scheduler::diverged(Simd& simd) {
  Site site = simd.site_of(*simd.order[__builtin_ctz(simd.waiting())]);
  if (simd.waiting_at(site) == simd.existing) {  // they came to it one subset after the other
    simd.site = site;
    simd.agreeing = simd.existing;
    return execute(simd, site, simd.existing);
  }
  if (!launch_.allow_divergence) fail_divergence(simd);

  bool found = false;
  for (uint32_t left = simd.waiting(); left != 0; left &= left - 1) {
    const Site& candidate = simd.site_of(*simd.order[__builtin_ctz(left)]);
    if (candidate.cls == kThreadgroupBarrier || (found && candidate.line >= site.line)) continue;
    site = candidate;
    found = true;
  }
  if (!found) fail_divergence(simd);
  execute(simd, site, simd.waiting_at(site));
}

void Scheduler::release_threadgroup_barrier() {
  const Site& site = simds_[__builtin_ctz(arrived_)].site;
  bool together = finished_ == 0;
  for (int s = 0; s < simd_count_; ++s) together = together && same_site(site, simds_[s].site);
  if (!together) fail_threadgroup_barrier(simds_, simd_count_, finished_);
  checks.order_threadgroup(static_cast<uint32_t>(site.key));
  arrived_ = 0;
  for (int s = 0; s < simd_count_; ++s) wake(simds_[s], simds_[s].existing);
}

}  // namespace mfa::sim

using namespace mfa::sim;

void mfa_sim_collective(mfa_sim_operation operation, void* argument, int cls, uint64_t key, const char* name,
                        const char* file, int line) {
  scheduler.arrive(operation, argument, cls, key, name, file, line);
}

void mfa_sim_threadgroup_barrier(uint32_t mem_flags, const char* file, int line) {
  scheduler.arrive(nullptr, nullptr, kThreadgroupBarrier, mem_flags, "threadgroup_barrier", file, line);
}

void mfa_sim_simdgroup_barrier(uint32_t mem_flags, const char* file, int line) {
  scheduler.arrive(nullptr, nullptr, kSimdgroupBarrier, mem_flags, "simdgroup_barrier", file, line);
}

const mfa_sim_position* mfa_sim_current_position(void) { return &scheduler.current()->frame->position; }

void mfa_sim_fail(const char* message, const char* file, int line) {
  failure.add("%s", message);
  failure.at(file, line);
  fail();
}

void mfa_sim_count_exp(uint32_t lanes_elements) { counters.exp += lanes_elements; }
void mfa_sim_count_fragment_load(void) { ++counters.fragment_loads; }
void mfa_sim_count_conversion(uint32_t elements) { counters.conversions += elements; }
