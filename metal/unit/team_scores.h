// What a team of SIMD-groups on the matrix unit, which share rows and each have a slice of D and of Dv, tell each
// other: scores are the sum of what the members make of their slices. Only these go through threadgroup memory.
#pragma once

#include "../tile.h"

namespace mfa {

// The members' parts of a team's scores, or of dP, one quad of each lane after another.
template <int kMembers, int kRowTiles, int kKeyTiles>
struct UnitTeamScores {
  static constant constexpr bool kIsTeam = true;
  static constant constexpr bool kByPairs = (kMembers & (kMembers - 1)) == 0;
  static constant constexpr int kQuads = kRowTiles * kKeyTiles / 2 * 32;  // of a member

  threadgroup float4* base;  // of the team
  short next;                // from there on, the team's other place
  short member;
  ushort lane_index;

  // Of the other members, counted by pairs or in a circle.
  threadgroup float4* part(short other) const {
    const short owner = kByPairs ? member ^ other : (member + other) % kMembers;
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

  // Two, four or eight members have the same bits: (0 + 1) + (2 + 3), in whatever order of the two of each sum. Others
  // may differ in the last one, which is as good.
  float4 sum_of_parts(float4 own, short i) const {
    float4 total = own + part(1)[i];
    if (!kByPairs) {
      MFA_UNROLL
      for (short other = 2; other < kMembers; ++other) {
        total += part(other)[i];
      }
    }
    if (kByPairs && kMembers >= 4) {
      total += part(2)[i] + part(3)[i];
    }
    if (kByPairs && kMembers == 8) {
      total += (part(4)[i] + part(5)[i]) + (part(6)[i] + part(7)[i]);
    }
    return total;
  }

  void sum(thread Fragment<float> (&score)[kRowTiles][kKeyTiles]) const {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; n += 2) {
        const float4 total = sum_of_parts(quad_at(&score[r][n]), (r * kKeyTiles + n) * 16);
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
