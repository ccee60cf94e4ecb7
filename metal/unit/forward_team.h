// The forward pass on the matrix unit for heads too long for the registers of one SIMD-group: a team of them shares 16
// rows, and each has a slice of D and of Dv. S is the sum of what the members make of their slices, the one thing that
// goes through threadgroup memory; then each has S whole, does softmax as its neighbours do, and keeps its slice of O.
#pragma once

#include "forward.h"
#include "team_scores.h"

namespace mfa {

// One block of keys: a member's slices of K and V. sees: whether the team's rows see any of them, as they do in an open
// block.
template <bool kIsOpen, int kValueDim, typename T, typename Rows, typename Queries, typename TeamScores>
inline void add_team_block(constant AttentionParams& params, thread Rows& rows, thread const Queries& queries,
                           thread TeamScores& team_scores, HeadRows<T> keys, HeadRows<T> values, Rules<T> rules,
                           int first_key, bool sees) {
  const bool takes_part = kIsOpen || sees;
  if (takes_part) {
    rows.multiply_keys(queries, unit_rows<kIsOpen, Rows::kKeyTiles>(keys.from(first_key)));
  }
  team_scores.exchange(rows.score, takes_part);
  if (takes_part) {
    add_values<kIsOpen, kValueDim>(params, rows, values.from(first_key), rules, first_key);
  }
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
  typedef UnitForward<T, kSlice, kValueSlice, kRowTiles, kBlockKeys> Rows;
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
  const HeadRows<T> keys = of_lane(sliced(tile.keys, member * kSlice), rows.lane);
  const HeadRows<T> values = of_lane(sliced(tile.values, member * kValueSlice), rows.lane);
  const ReadRows<T, kSlice, OwnRows<T, kRowTiles>> queries = {
      {sliced(tile.queries, member * kSlice), rows.first_row, rows.lane}};
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
