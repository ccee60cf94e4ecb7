// A team of SIMD-groups that shares rows whose head dimension is too long for the registers of one: each member has a
// slice of D and of Dv. S is the sum of what the members make of their slices, which they exchange through threadgroup
// memory; then each has S whole, does softmax as its neighbours do, and keeps its slice of O.
#pragma once

#include "forward_rows.h"

namespace mfa {

constant constexpr int kTeam = kTeamMembers;

// One row tile's partial scores, a fragment after another, a lane's two elements together.
template <int kKeyTiles>
struct PartialScores {
  static constant constexpr int kFloats = kKeyTiles * kFragment * kFragment;

  threadgroup float2* base;  // of the team: kTeam * kFloats
  ushort lane_index;

  void write(thread Fragment<float> (&score)[1][kKeyTiles], short member) const {
    threadgroup float2* own = base + member * (kFloats / 2) + lane_index;
    MFA_UNROLL
    for (short n = 0; n < kKeyTiles; ++n) {
      own[n * 32] = score[0][n];
    }
  }

  // In the members' order, so that all of them have the same bits.
  void sum(thread Fragment<float> (&score)[1][kKeyTiles]) const {
    MFA_UNROLL
    for (short n = 0; n < kKeyTiles; ++n) {
      float2 total = base[n * 32 + lane_index];
      MFA_UNROLL
      for (short member = 1; member < kTeam; ++member) {
        total += base[member * (kFloats / 2) + n * 32 + lane_index];
      }
      score[0][n] = total;
    }
  }
};

// O += P V of a member's slice of the V that a team has staged, or of the K.
template <typename T, int kHeadDim, int kValueDim, typename Rows>
inline void add_team_values(thread Rows& rows, const threadgroup T* staged_rows, int first_dim) {
  if (value_is_key && kHeadDim != kValueDim) {
    rows.add_values(StagedRows<T, kHeadDim, quads>{staged_rows + first_dim});
  } else {
    rows.add_values(StagedRows<T, kValueDim, octets>{staged_rows + first_dim});
  }
}

// Rows from a slice on.
template <typename T>
inline GuardedRows<T> sliced(GuardedRows<T> rows, int first_dim) {
  return {rows.base + first_dim, rows.stride, rows.valid, rows.dim - first_dim};
}

}  // namespace mfa
