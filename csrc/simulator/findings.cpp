#include "findings.h"

#include "checks.h"
#include "failure.h"
#include "scheduler.h"
#include "shadow.h"

namespace mfa::sim {
namespace {

const char* verb(Access access) { return access == kWrite ? "write" : "read"; }

void add_access(const char* rule, Access access, size_t size) {
  failure.add("%s: %s of %zu byte%s at ", rule, verb(access), size, size == 1 ? "" : "s");
}

[[noreturn]] void fail_at(const void* pc) {
  failure.at(static_cast<const char*>(pc) - 1);  // the call, not what follows it
  fail();
}

void add_variable(uint32_t offset) {
  if (arena.count() == 0) {
    failure.add("threadgroup memory, of which the kernel has none");
    return;
  }
  const Variable& variable = arena.variable_near(offset);
  failure.add("byte %lld of threadgroup variable '%s', %u bytes", static_cast<long long>(offset) - variable.offset,
              variable.name, variable.size);
}

// The stamp that conflicts with an access, as `write` or `reader` of some byte. Known to exist.
template <bool Device>
void add_conflict(const uint32_t* write, const uint32_t* reader, const uint32_t* other, size_t size, Access access) {
  const Now now = now_in(Device ? checks.device : checks.threadgroup);
  for (size_t i = 0; i < size; ++i) {
    for (const uint32_t* stamps : {write, reader, other}) {
      const uint32_t earlier = stamps[i];
      if ((stamps != write && access == kRead) || !unordered<Device>(earlier, now)) continue;
      failure.add(", not ordered after a %s by ", stamps == write ? "write" : "read");
      if ((earlier & stamp::kSeveral) != 0) failure.add("several lanes");
      if ((earlier & stamp::kSeveral) == 0) failure.add("lane %u", earlier & stamp::kLane);
      failure.add(" of SIMD-group %u", (earlier & stamp::kThread) / stamp::kOtherSimd);
      if (Device && earlier < checks.group) {
        const mfa_sim_uint3* group = checks.group_of(earlier);
        if (group == nullptr) failure.add(" of another threadgroup");
        if (group != nullptr) failure.add(" of threadgroup (%u, %u, %u)", group->x, group->y, group->z);
      }
      return;
    }
  }
}

}  // namespace

void fail_threadgroup_race(uint32_t offset, size_t size, Access access, const void* pc) {
  add_access("data race", access, size);
  add_variable(offset);
  add_conflict<false>(threadgroup_shadow.write + offset, threadgroup_shadow.reader + offset,
                      threadgroup_shadow.other + offset, size, access);
  fail_at(pc);
}

void fail_device_race(uintptr_t address, size_t size, Access access, const void* pc) {
  const Region& region = *checks.last;
  const uint32_t* write = region.cells + (address - region.begin);
  add_access("data race", access, size);
  regions.describe(region, address);
  add_conflict<true>(write, write + region.size, write + 2 * region.size, size, access);
  fail_at(pc);
}

void fail_uninitialised(uint32_t offset, size_t size, const void* pc) {
  add_access("uninitialised threadgroup memory", kRead, size);
  while (threadgroup_shadow.write[offset] >= checks.group) ++offset;
  add_variable(offset);
  fail_at(pc);
}

void fail_threadgroup_bounds(uint32_t offset, size_t size, Access access, const void* pc) {
  add_access("out of bounds", access, size);
  add_variable(offset);
  fail_at(pc);
}

void fail_device_bounds(uintptr_t address, size_t size, Access access, const void* pc) {
  add_access("out of bounds", access, size);
  if (address < 4096) {
    failure.add("address 0x%zx, a null pointer", static_cast<size_t>(address));
  } else if (scheduler.stacks().contains(address)) {
    failure.add("another thread's private memory");
  } else if (!regions.describe_nearest(address)) {
    failure.add("address 0x%zx, with no buffer bound", static_cast<size_t>(address));
  }
  fail_at(pc);
}

void fail_constant_write(uintptr_t address, size_t size, const void* pc) {
  add_access("write to constant memory", kWrite, size);
  regions.describe(*checks.last, address);
  fail_at(pc);
}

}  // namespace mfa::sim
