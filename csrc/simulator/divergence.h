// Messages for lanes and SIMD-groups that do not meet where they must.
#pragma once

#include <cstdint>

#include "scheduler.h"

namespace mfa::sim {

// Lanes of one SIMD-group wait at different sites, or some have returned.
[[noreturn]] void fail_divergence(const Simd& simd);
// Lanes `mask` want an operation that needs all 32.
[[noreturn]] void fail_missing_lanes(const Simd& simd, const Site& site, uint32_t mask);
// SIMD-groups wait at different barriers, or some have returned (`finished`).
[[noreturn]] void fail_threadgroup_barrier(const Simd* simds, int count, uint32_t finished);

}  // namespace mfa::sim
