// Races, bounds and uninitialised memory: what the __tsan_* hooks find out about each access.
//
// Every byte of threadgroup memory, and of each buffer that the kernel may write, has three stamps: its last write, its
// last read, and one more read by another SIMD-group (or, for buffers, another threadgroup). A stamp is
//   tick:21  SIMD-group:5  several:1  lane:5
// where `several` marks more than one reading lane. The tick advances at every ordering barrier and never goes back,
// so whether two accesses are ordered is a comparison of their ticks with that of the last barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine.h"
#include "library.h"
#include "memory.h"

namespace mfa::sim {

namespace stamp {
inline constexpr uint32_t kLane = 0x1f, kSeveral = 0x20, kThread = 0x7ff, kTick = 0x800;
inline constexpr uint32_t kOtherSimd = 0x40;  // (a ^ b) & kThread is at least this when a and b differ in SIMD-group
}  // namespace stamp

// What one address space's barriers have ordered, as stamps without a thread.
struct Order {
  uint32_t epoch;     // since the last threadgroup_barrier
  uint32_t simd[32];  // ... or simdgroup_barrier, for accesses of one SIMD-group; never before epoch
};

inline constexpr Region nowhere{};

class Checks {
 public:
  // After regions.merge(). False, with the reason in `failure`, when the shadow cannot be had.
  bool begin(const mfa_sim_library* library, uint32_t enabled);
  void end();
  void begin_group(mfa_sim_uint3 group);
  void order_threadgroup(uint32_t mem_flags);
  void order_simd(uint32_t simd, uint32_t mem_flags);
  // The threadgroup that made a stamp; null when no longer known.
  const mfa_sim_uint3* group_of(uint32_t stamp) const;

  // Read by the hooks.
  const Region* last = &nowhere;  // the buffer touched last
  const mfa_sim_library* library = nullptr;
  bool races = false, bounds = false, uninitialised = false;
  uint32_t now = stamp::kTick;  // the tick
  uint32_t dispatch = 0;        // stamps before this are from earlier dispatches
  uint32_t group = 0;           // ... from earlier threadgroups
  Order threadgroup, device;

 private:
  void tick();
  void compress();
  bool map_shadow();

  // Shadow of buffers, in stamps. Never cleared between dispatches: what is left there is older than `dispatch`.
  uint32_t* pool_ = nullptr;
  size_t pool_size_ = 0, pool_used_ = 0;
  struct GroupStart {
    uint32_t tick;
    mfa_sim_uint3 group;
  };
  std::vector<GroupStart> group_starts_;
};

extern Checks checks;

// Stamps of threadgroup memory, by offset in the arena.
struct ThreadgroupShadow {
  uint32_t write[Arena::kBytes], reader[Arena::kBytes], other[Arena::kBytes];
};
extern ThreadgroupShadow threadgroup_shadow;

}  // namespace mfa::sim
