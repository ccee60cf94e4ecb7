// The forward pass on the matrix unit for heads too long for the registers of one SIMD-group: a team of them shares 16
// rows, and each has a slice of D and of Dv. S is the sum of what the members make of their slices, the one thing that
// goes through threadgroup memory; then each has S whole, does softmax as its neighbours do, and keeps its slice of O.
#pragma once

#include "forward.h"

namespace mfa {

// The members' parts of a team's scores, one quad of each lane after another.
template <int kMembers, int kRowTiles, int kKeyTiles>
struct UnitTeamScores {
  static_assert(kMembers == 2 || kMembers == 4, "see sum()");
  static constant constexpr int kQuads = kRowTiles * kKeyTiles / 2 * 32;  // of a member

  threadgroup float4* base;  // of the team
  short next;                // from there on, the team's other place
  short member;
  ushort lane_index;

  threadgroup float4* part(short other) const { return base + (member ^ other) * kQuads + lane_index; }

  void take_turns() {
    base += next;
    next = -next;
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

  // (0 + 1) + (2 + 3) in whatever order of the two of each sum, so that all members have the same bits.
  void sum(thread Fragment<float> (&score)[kRowTiles][kKeyTiles]) const {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; n += 2) {
        const short i = (r * kKeyTiles + n) * 16;
        float4 total = quad_at(&score[r][n]) + part(1)[i];
        if (kMembers == 4) {
          total += part(2)[i] + part(3)[i];
        }
        score[r][n] = total.xy;
        score[r][n + 1] = total.zw;
      }
    }
  }
};

// One block of keys: a member's slices of K and V. sees: whether the team's rows see any of them, as they do in an open
// block. The SIMD-groups of a threadgroup meet once, because the scores of two blocks take turns in two places.
template <bool kIsOpen, int kValueDim, typename T, typename Rows, typename Queries, typename TeamScores>
inline void add_team_block(constant AttentionParams& params, thread Rows& rows, thread const Queries& queries,
                           thread TeamScores& team_scores, HeadRows<T> keys, HeadRows<T> values, Rules<T> rules,
                           int first_key, bool sees) {
  if (kIsOpen || sees) {
    rows.multiply_keys(queries, unit_rows<kIsOpen>(keys.from(first_key)));
    team_scores.write(rows.score);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (kIsOpen || sees) {
    team_scores.sum(rows.score);
    add_values<kIsOpen, kValueDim>(params, rows, values.from(first_key), rules, first_key);
  }
  team_scores.take_turns();
}

// A member's slice.
template <typename T>
inline HeadRows<T> sliced(HeadRows<T> rows, int first_dim) {
  rows.base += first_dim;
  return rows;
}

// All SIMD-groups of a threadgroup walk the same blocks.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_unit_team(FORWARD_ARGUMENTS) {
  static_assert(kMemory == shared, "Q is read again for every block");
  constexpr int kMembers = members_of(unit_team, kHeadDim);
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kBlockQueries = rows_of(unit_team, kHeadDim, kSimdgroups, kRowTiles);
  constexpr int kSlice = kHeadDim / kMembers;
  constexpr int kValueSlice = kValueDim / kMembers;
  typedef Forward<T, kSlice, kValueSlice, kRowTiles, kBlockKeys> Rows;
  typedef UnitTeamScores<kMembers, kRowTiles, Rows::kKeyTiles> TeamScores;
  threadgroup float4
      memory[forward_threadgroup_bytes(unit_team, kMemory, kHeadDim, kValueDim, kBlockQueries, kBlockKeys, sizeof(T)) /
             16];

  const ForwardTile<T> tile(
      params,
      query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y, kBlockQueries),
      query, key, value, position.x, kBlockQueries, kHeadDim, kValueDim);
  const short member = simdgroup % kMembers;
  const short own = simdgroup / kMembers;
  Rows rows(params, tile.sequence, tile.first_row + own * kRows, sinks, alibi_slopes, tile.head, true, lane_index);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  const HeadRows<T> keys = sliced(tile.keys, member * kSlice);
  const HeadRows<T> values = sliced(tile.values, member * kValueSlice);
  const GuardedRows<T> own_rows = sliced(tile.queries, member * kSlice).from(rows.first_row);
  const ReadRows<T, kSlice, ClampedRows<T>> queries = {{own_rows.base, own_rows.stride, own_rows.valid}};
  TeamScores scores = {memory + own * kMembers * TeamScores::kQuads, kSimdgroups * TeamScores::kQuads, member,
                       lane_index};

  const View view = view_of_queries(params, tile.sequence, tile.first_row, tile.first_row + kBlockQueries);
  const bool have_rows = tile.first_row + kBlockQueries - kRows < tile.sequence.query_length;  // all teams
  BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, tile.first_row);
  for (;; walk.next()) {
    MaskClass mask_class = walk.template classify<kBlockQueries, kBlockKeys>(rules.blocks, tile.first_row, walk.first);
    // Blocks that are open for all teams have a loop of their own, as in forward_unit.
    while (have_rows && rows.is_open(params, rules.in_block(mask_class).scores, view, walk.first)) {
      add_team_block<true, kValueSlice>(params, rows, queries, scores, keys, values, rules, walk.first, true);
      walk.next();
      mask_class = walk.template classify<kBlockQueries, kBlockKeys>(rules.blocks, tile.first_row, walk.first);
    }
    if (walk.is_done()) {
      break;
    }
    if (mask_class != kHidden) {
      // The same for all members: they have the same rows.
      mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
      add_team_block<false, kValueSlice>(params, rows, queries, scores, keys, values, rules.in_block(mask_class, walk),
                                         walk.first, rows.view.sees(walk.first, kBlockKeys) && mask_class != kHidden);
    }
  }
  rows.store(params, out, lse, correction, tile.head, member * kValueSlice);
}

}  // namespace mfa
