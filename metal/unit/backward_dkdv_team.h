// dK and dV on the matrix unit where those of 16 keys are too long for the registers of one SIMD-group: a team of them
// shares the keys, and each keeps a slice of dK and of dV. S' and dP' are summed over the team, see team_scores.h.
#pragma once

#include "backward_dkdv.h"

namespace mfa {

// All SIMD-groups of a threadgroup walk the same blocks.
template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockQueries>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dkdv_unit_team(BACKWARD_DKDV_ARGUMENTS) {
  constexpr int kMembers = unit_members_of_keys(kHeadDim, kValueDim);
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kBlockKeys = backward_dkdv_rows(unit_team, kHeadDim, kValueDim, kSimdgroups, kRowTiles);
  constexpr int kSlice = kHeadDim / kMembers;
  constexpr int kValueSlice = kValueDim / kMembers;
  typedef BackwardKeys<T, kSlice, kValueSlice, kRowTiles, kBlockQueries> Rows;
  typedef UnitTeamScores<kMembers, kRowTiles, Rows::kQueryTiles> TeamScores;
  threadgroup float4 memory[backward_dkdv_threadgroup_bytes(unit_team, kHeadDim, kValueDim, kSimdgroups, kRowTiles,
                                                            kBlockQueries, sizeof(T)) /
                            16];

  const int unit = first_unit + position.x;  // (batch, key head)
  const short member = simdgroup % kMembers;
  const short own = simdgroup / kMembers;
  const KeyTile<T> tile(
      params, key_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, unit, position.y, kBlockKeys),
      key + member * kSlice, value + member * kValueSlice, unit, kBlockKeys, kSlice, kValueSlice);
  Rows rows(params, tile, tile.first_key + own * kRows, Lane(lane_index));
  TeamScores team = {memory + own * kMembers * TeamScores::kQuads, kSimdgroups * TeamScores::kQuads, member,
                     lane_index};

  const View view = view_of_keys(params, tile.sequence, tile.first_key, tile.first_key + kBlockKeys);
  const bool have_keys = tile.first_key + kBlockKeys - kRows < tile.sequence.key_length;  // all teams
  for (int index = 0; index < params.group_size; ++index) {
    const int head = tile.key_head * params.group_size + index;
    const HeadRows<T> queries =
        of_lane(query_rows(query + member * kSlice, params.query_strides, tile.sequence, head, kSlice), rows.lane);
    const HeadRows<T> grad_outs =
        of_lane(query_rows(grad_out + member * kValueSlice, params.grad_out_strides, tile.sequence, head, kValueSlice),
                rows.lane);
    const device float2* head_statistics = statistics + first_row_index(params, tile.sequence, head);
    const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, head);
    BlockWalk<kBlockQueries, false> walk(rules.scores.block_mask, view, tile.first_key);
    for (; !walk.is_done(); walk.next()) {
      MaskClass mask_class =
          walk.template classify<kBlockQueries, kBlockKeys>(rules.blocks, walk.first, tile.first_key);
      // Blocks that are open for all teams have a loop of their own, as in backward_dkdv_unit.
      while (mask_class != kHidden && !walk.is_done() && have_keys && view.sees_all(walk.first, kBlockQueries)) {
        mask_class = walk.template classify<kBlockQueries, kRows>(rules.blocks, walk.first, rows.first_key);
        add_block<true>(params, rows, team, rules.in_block(mask_class, walk), queries, grad_outs, head_statistics,
                        walk.first, mask_class != kHidden);
        walk.next();
        mask_class = walk.template classify<kBlockQueries, kBlockKeys>(rules.blocks, walk.first, tile.first_key);
      }
      if (mask_class != kHidden && !walk.is_done()) {
        mask_class = walk.template classify<kBlockQueries, kRows>(rules.blocks, walk.first, rows.first_key);
        add_block<false>(params, rows, team, rules.in_block(mask_class, walk), queries, grad_outs, head_statistics,
                         walk.first, mask_class != kHidden && rows.view.sees(walk.first, kBlockQueries));
      }
    }
  }
  rows.store(params, grad_key, grad_value, tile, member * kSlice, member * kValueSlice);
}

}  // namespace mfa
