#include "divergence.h"

#include "failure.h"

namespace mfa::sim {
namespace {

uint32_t to_lanes(const Simd& simd, uint32_t places) {
  uint32_t lanes = 0;
  for (; places != 0; places &= places - 1) lanes |= 1u << simd.order[__builtin_ctz(places)]->index;
  return lanes;
}

void add_lanes(uint32_t lanes, const char* what) { failure.add("\n  lanes 0x%08x: %s", lanes, what); }

// One line of one name can still be two sites: the lanes then passed different arguments.
bool differs_by_key(const Simd& simd, const Site& site) {
  for (uint32_t left = simd.waiting(); left != 0; left &= left - 1) {
    const Site& other = simd.site_of(*simd.order[__builtin_ctz(left)]);
    if (other.line == site.line && other.key != site.key && strcmp(other.name, site.name) == 0) return true;
  }
  return false;
}

void add_sites(const Simd& simd) {
  for (uint32_t left = simd.waiting(); left != 0;) {
    uint32_t lowest = left & -left;  // by lane, so that the order of lines does not depend on the seed
    for (uint32_t rest = left; rest != 0; rest &= rest - 1) {
      if (to_lanes(simd, rest & -rest) < to_lanes(simd, lowest)) lowest = rest & -rest;
    }
    const Site& site = simd.site_of(*simd.order[__builtin_ctz(lowest)]);
    const uint32_t mask = simd.waiting_at(site);
    failure.add("\n  lanes 0x%08x: at %s %s:%d", to_lanes(simd, mask), site.name, base_name(site.file), site.line);
    if (differs_by_key(simd, site)) failure.add(" (arguments 0x%llx)", static_cast<unsigned long long>(site.key));
    left &= ~mask;
  }
}

[[noreturn]] void finish() {
  const mfa_sim_uint3 group = scheduler.current()->frame->position.threadgroup_position_in_grid;
  failure.add("\n  in threadgroup (%u, %u, %u)", group.x, group.y, group.z);
  scheduler.abandon();
}

}  // namespace

void fail_divergence(const Simd& simd) {
  const Site& first = simd.site_of(*simd.order[__builtin_ctz(simd.waiting())]);
  const bool together = simd.waiting_at(first) == simd.waiting();
  failure.add("%s in SIMD-group %u:", together ? "SIMD operation with lanes missing" : "divergent synchronisation",
              simd.index);
  add_sites(simd);
  if (simd.returned != 0) add_lanes(to_lanes(simd, simd.returned), "returned");
  finish();
}

void fail_missing_lanes(const Simd& simd, const Site& site, uint32_t mask) {
  failure.add("SIMD operation with lanes missing in SIMD-group %u:", simd.index);
  failure.add("\n  lanes 0x%08x: at %s %s:%d", to_lanes(simd, mask), site.name, base_name(site.file), site.line);
  if (const uint32_t elsewhere = simd.waiting() & ~mask) add_lanes(to_lanes(simd, elsewhere), "elsewhere");
  if (simd.returned != 0) add_lanes(to_lanes(simd, simd.returned), "returned");
  if (simd.existing != ~0u) add_lanes(~to_lanes(simd, simd.existing), "not in the threadgroup");
  finish();
}

void fail_threadgroup_barrier(const Simd* simds, int count, uint32_t finished) {
  failure.add("%s:", finished != 0 ? "threadgroup_barrier with SIMD-groups missing" : "mismatched threadgroup_barrier");
  for (int s = 0; s < count; ++s) {
    const Site& site = simds[s].site;
    if ((finished >> s & 1) != 0) {
      failure.add("\n  SIMD-group %d: returned", s);
    } else {
      failure.add("\n  SIMD-group %d: at %s %s:%d (mem_flags %u)", s, site.name, base_name(site.file), site.line,
                  static_cast<unsigned>(site.key));
    }
  }
  finish();
}

}  // namespace mfa::sim
