// What a team of SIMD-groups on the matrix unit, which share rows and each have a slice of D and of Dv, tell each
// other: scores are the sum of what the members make of their slices. Only these go through threadgroup memory.
#pragma once

#include "../tile.h"

namespace mfa {

// The members' parts of a team's scores, or of dP, one quad of each lane after another.
template <int kMembers, int kRowTiles, int kKeyTiles>
struct UnitTeamScores {
  static_assert(kMembers >= 2 && kMembers <= 4, "see sum()");
  static constant constexpr bool kIsTeam = true;
  static constant constexpr int kQuads = kRowTiles * kKeyTiles / 2 * 32;  // of a member

  threadgroup float4* base;  // of the team
  short next;                // from there on, the team's other place
  short member;
  ushort lane_index;

  // Of one of two or four members by pairs; of three, in a circle.
  threadgroup float4* part(short other) const {
    const short owner = kMembers == 3 ? (member + other) % 3 : member ^ other;
    return base + owner * kQuads + lane_index;
  }

  void write(thread Fragment<float> (&score)[kRowTiles][kKeyTiles]) const {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; n += 2) {
        part(0)[(r * kKeyTiles + n) * 16] = quad_at(&score[r][n]);
      }
    }
  }

  // (0 + 1) + (2 + 3) in whatever order of the two of each sum, so that two or four members have the same bits. Three
  // may differ in the last one, which is as good.
  void sum(thread Fragment<float> (&score)[kRowTiles][kKeyTiles]) const {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; n += 2) {
        const short i = (r * kKeyTiles + n) * 16;
        float4 total = quad_at(&score[r][n]) + part(1)[i];
        if (kMembers > 2) {
          total += kMembers == 3 ? part(2)[i] : part(2)[i] + part(3)[i];
        }
        score[r][n] = total.xy;
        score[r][n + 1] = total.zw;
      }
    }
  }

  // `score` becomes the sum of the parts that the members have there. All SIMD-groups of a threadgroup come here, but
  // of a team none need take part. They meet once, because two exchanges take turns in two places.
  void exchange(thread Fragment<float> (&score)[kRowTiles][kKeyTiles], bool takes_part) {
    if (takes_part) {
      write(score);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (takes_part) {
      sum(score);
    }
    base += next;
    next = -next;
  }
};

// A SIMD-group that has its rows by itself.
struct NoTeam {
  static constant constexpr bool kIsTeam = false;

  template <typename Score>
  void exchange(thread Score&, bool) const {}
};

}  // namespace mfa
