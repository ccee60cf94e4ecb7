// The rule of the race detector, for one byte's stamps (checks.h).
#pragma once

#include <cstdint>

#include "checks.h"
#include "scheduler.h"

namespace mfa::sim {

// The running lane, now, and what is ordered before it. In threadgroup memory of an earlier group nothing is left,
// so `group` only matters for buffers, where nothing orders threadgroups.
struct Now {
  uint32_t self, epoch, simd_epoch, dispatch, group;
};

inline Now now_in(const Order& order) {
  const Lane& lane = *scheduler.current();
  return {checks.now | lane.thread, order.epoch, order.simd[lane.simd->index], checks.dispatch, checks.group};
}

template <bool Device>
inline uint32_t unordered(uint32_t earlier, const Now& now) {
  const uint32_t difference = (earlier ^ now.self) & stamp::kThread;  // 0: this very lane
  uint32_t found = (earlier >= now.epoch) & (difference >= stamp::kOtherSimd);
  found |= (earlier >= now.simd_epoch) & (difference != 0);
  if (Device) found |= earlier - now.dispatch < now.group - now.dispatch;
  return found;
}

// Records a read. The second reader is kept only to stand for others than the first, so the one that conflicts with
// most later writes stays: of another threadgroup, else of another SIMD-group.
template <bool Device>
inline void record_read(uint32_t& reader, uint32_t& other, const Now& now) {
  const uint32_t before = reader, kept = other;
  const uint32_t difference = (before ^ now.self) & stamp::kThread;
  const bool same_simd = (difference < stamp::kOtherSimd) & (!Device | (before >= now.group));
  const bool stays = same_simd | (Device & (kept - now.dispatch < now.group - now.dispatch));
  const bool several = (difference != 0) & (difference < stamp::kOtherSimd) & (before >= now.simd_epoch);
  reader = now.self | (several ? stamp::kSeveral : 0);
  other = stays ? kept : before;
}

}  // namespace mfa::sim
