#include "checks.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "failure.h"

namespace mfa::sim {

Checks checks;
ThreadgroupShadow threadgroup_shadow;

namespace {

constexpr size_t kKeptStamps = 32 << 20;  // shadow kept between dispatches: 128 MiB

void each_stamp(uint32_t* stamps, size_t count, const std::vector<uint32_t>& ticks) {
  for (size_t i = 0; i < count; ++i) {
    if (stamps[i] == 0) continue;  // do not commit pages that nobody touched
    const uint32_t rank = std::upper_bound(ticks.begin(), ticks.end(), stamps[i]) - ticks.begin();
    stamps[i] = rank == 0 ? 0 : rank * stamp::kTick | (stamps[i] & stamp::kThread);
  }
}

}  // namespace

bool Checks::begin(const mfa_sim_library* library_in, uint32_t enabled) {
  library = library_in;
  races = (enabled & MFA_SIM_CHECK_RACES) != 0;
  bounds = (enabled & MFA_SIM_CHECK_BOUNDS) != 0;
  uninitialised = (enabled & MFA_SIM_CHECK_UNINITIALISED) != 0;
  last = &nowhere;
  group_starts_.clear();
  if (!map_shadow()) return false;
  tick();
  dispatch = now;
  return true;
}

void Checks::end() {
  library = nullptr;
  races = bounds = uninitialised = false;
  last = &nowhere;
  if (pool_used_ > kKeptStamps) {
    munmap(pool_, pool_size_ * sizeof(uint32_t));
    pool_ = nullptr;
    pool_size_ = pool_used_ = 0;
  }
}

bool Checks::map_shadow() {
  size_t needed = 0;
  for (Region& region : regions.all()) {
    if (races && region.writable) needed += 3 * region.size;
  }
  if (needed > pool_size_) {
    if (pool_ != nullptr) munmap(pool_, pool_size_ * sizeof(uint32_t));
    pool_size_ = std::max(needed, kKeptStamps);
    pool_used_ = 0;
    void* memory = mmap(nullptr, pool_size_ * sizeof(uint32_t), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      pool_ = nullptr;
      pool_size_ = 0;
      failure.add("no memory for the race detector's shadow of %zu bytes", needed * sizeof(uint32_t));
      return false;
    }
    pool_ = static_cast<uint32_t*>(memory);
  }
  size_t used = 0;
  for (Region& region : regions.all()) {
    if (!races || !region.writable) continue;
    region.cells = pool_ + used;
    used += 3 * region.size;
  }
  pool_used_ = std::max(pool_used_, used);
  return true;
}

void Checks::begin_group(mfa_sim_uint3 position) {
  tick();
  group = now;
  group_starts_.push_back({now, position});
  for (Order* order : {&threadgroup, &device}) {
    order->epoch = now;
    std::fill_n(order->simd, 32, now);
  }
}

void Checks::order_threadgroup(uint32_t mem_flags) {
  if ((mem_flags & (MFA_SIM_MEM_THREADGROUP | MFA_SIM_MEM_DEVICE)) == 0) return;
  tick();
  for (auto [order, flag] : {std::pair{&threadgroup, MFA_SIM_MEM_THREADGROUP}, {&device, MFA_SIM_MEM_DEVICE}}) {
    if ((mem_flags & flag) == 0) continue;
    order->epoch = now;
    std::fill_n(order->simd, 32, now);
  }
}

void Checks::order_simd(uint32_t simd, uint32_t mem_flags) {
  if ((mem_flags & (MFA_SIM_MEM_THREADGROUP | MFA_SIM_MEM_DEVICE)) == 0) return;
  tick();
  if ((mem_flags & MFA_SIM_MEM_THREADGROUP) != 0) threadgroup.simd[simd] = now;
  if ((mem_flags & MFA_SIM_MEM_DEVICE) != 0) device.simd[simd] = now;
}

const mfa_sim_uint3* Checks::group_of(uint32_t stamp) const {
  auto after = std::upper_bound(group_starts_.begin(), group_starts_.end(), stamp,
                                [](uint32_t s, const GroupStart& start) { return s < start.tick; });
  return after == group_starts_.begin() ? nullptr : &after[-1].group;
}

void Checks::tick() {
  now += stamp::kTick;
  if (now > ~0u - 2 * stamp::kTick) compress();
}

// Ticks have run out. Stamps are only ever compared with the starts below, so each becomes its rank among them.
void Checks::compress() {
  std::vector<uint32_t> ticks{dispatch, group, threadgroup.epoch, device.epoch};
  ticks.insert(ticks.end(), threadgroup.simd, threadgroup.simd + 32);
  ticks.insert(ticks.end(), device.simd, device.simd + 32);
  std::sort(ticks.begin(), ticks.end());
  ticks.erase(std::unique(ticks.begin(), ticks.end()), ticks.end());

  each_stamp(threadgroup_shadow.write, 3 * Arena::kBytes, ticks);
  each_stamp(pool_, pool_used_, ticks);
  uint32_t* starts[] = {&dispatch, &group, &threadgroup.epoch, &device.epoch};
  for (uint32_t* start : starts) each_stamp(start, 1, ticks);
  each_stamp(threadgroup.simd, 32, ticks);
  each_stamp(device.simd, 32, ticks);
  now = (ticks.size() + 1) * stamp::kTick;
  group_starts_.clear();
}

}  // namespace mfa::sim
