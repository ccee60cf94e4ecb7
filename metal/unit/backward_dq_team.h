// dQ on the matrix unit where that of 16 queries is too long for the registers of one SIMD-group: a team of them shares
// the queries, and each keeps a slice of dQ. S and dP are summed over the team, see team_scores.h.
#pragma once

#include "backward_dq.h"

namespace mfa {

// All SIMD-groups of a threadgroup walk the same blocks.
template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq_unit_team(BACKWARD_DQ_ARGUMENTS) {
  constexpr int kMembers = members_of(unit_team, kHeadDim);
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kBlockQueries = backward_dq_rows(unit_team, kHeadDim, kSimdgroups, kRowTiles);
  constexpr int kSlice = kHeadDim / kMembers;
  constexpr int kValueSlice = kValueDim / kMembers;
  typedef BackwardQueries<T, kOwn, kSlice, kValueSlice, kRowTiles, kBlockKeys> Rows;
  typedef UnitTeamScores<kMembers, kRowTiles, Rows::kKeyTiles> TeamScores;
  threadgroup float4 memory[backward_dq_threadgroup_bytes(unit_team, kHeadDim, kValueDim, kSimdgroups, kRowTiles,
                                                          kBlockKeys, sizeof(T)) /
                            16];

  const short member = simdgroup % kMembers;
  const short own = simdgroup / kMembers;
  QueryTile<T> tile(
      params,
      query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y, kBlockQueries),
      query + member * kSlice, key + member * kSlice, value + member * kValueSlice, grad_out + member * kValueSlice,
      position.x, kBlockQueries, kSlice, kValueSlice);
  if (tile.sequence.query_length == 0) {
    return;  // a threadgroup without work: there is not even a last row to read
  }
  Rows rows(params, tile, statistics, tile.first_row + own * kRows, Lane(lane_index));
  tile.keys = of_lane(tile.keys, rows.lane);
  tile.values = of_lane(tile.values, rows.lane);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  TeamScores team = {memory + own * kMembers * TeamScores::kQuads, kSimdgroups * TeamScores::kQuads, member,
                     lane_index};

  const View view = view_of_queries(params, tile.sequence, tile.first_row, tile.first_row + kBlockQueries);
  const bool have_rows = tile.first_row + kBlockQueries - kRows < tile.sequence.query_length;  // all teams
  BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, tile.first_row);
  for (; !walk.is_done(); walk.next()) {
    MaskClass mask_class = walk.template classify<kBlockQueries, kBlockKeys>(rules.blocks, tile.first_row, walk.first);
    // Blocks that are open for all teams have a loop of their own, as in backward_dq_unit.
    while (mask_class != kHidden && !walk.is_done() && have_rows && view.sees_all(walk.first, kBlockKeys)) {
      mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
      add_block<true>(params, rows, team, rules.in_block(mask_class, walk), tile, walk.first, mask_class != kHidden);
      walk.next();
      mask_class = walk.template classify<kBlockQueries, kBlockKeys>(rules.blocks, tile.first_row, walk.first);
    }
    if (mask_class != kHidden && !walk.is_done()) {
      mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
      add_block<false>(params, rows, team, rules.in_block(mask_class, walk), tile, walk.first,
                       mask_class != kHidden && rows.view.sees(walk.first, kBlockKeys));
    }
  }
  rows.store(params, grad_query, grad_alibi, tile, member * kSlice);
}

}  // namespace mfa
