// dQ on the matrix unit: ../backward_dq.h with operands from device memory to registers, no threadgroup memory and no
// wait. Each SIMD-group walks the blocks of keys that its own queries see.
#pragma once

#define MFA_MATRIX_UNIT
#include "../backward_dq.h"
#include "../device_rows.h"
#include "team_scores.h"

namespace mfa {

// One block of keys. An open one has neither bounds of rows nor a mask. takes_part: whether the queries see any of
// them; who has queries with others must come here all the same.
template <bool kIsOpen, typename T, Own kOwn, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys, typename Team>
inline void add_block(constant AttentionParams& params,
                      thread BackwardQueries<T, kOwn, kHeadDim, kValueDim, kRowTiles, kBlockKeys>& queries,
                      thread Team& team, Rules<T> rules, thread const QueryTile<T>& tile, int first_key,
                      bool takes_part = true) {
  const auto keys = unit_rows<kIsOpen, kBlockKeys / kFragment>(tile.keys.from(first_key));
  Fragment<float> dp[kRowTiles][kBlockKeys / kFragment];
  if (takes_part) {
    queries.multiply_keys(keys);
    queries.multiply_values(unit_rows<kIsOpen, kBlockKeys / kFragment>(tile.values.from(first_key)), dp);
  }
  team.exchange(queries.ds, takes_part);  // not before dP is made: the parts of others would take registers
  team.exchange(dp, takes_part);
  if (takes_part) {
    queries.template make_score_gradient<kIsOpen>(params, rules, dp, first_key);
    if (kOwn == held && !Team::kIsTeam) {
      keep_in_loop();  // else K is read once for both of its products, into registers that there aren't
    }
    queries.add_queries(keys);
  }
}

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq_unit(BACKWARD_DQ_ARGUMENTS) {
  constexpr int kRows = kRowTiles * kFragment;
  QueryTile<T> tile(params,
                    query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y,
                               kSimdgroups * kRows),
                    query, key, value, grad_out, position.x, kSimdgroups * kRows, kHeadDim, kValueDim);
  if (tile.sequence.query_length == 0) {
    return;  // a threadgroup without work: there is not even a last row to read
  }
  BackwardQueries<T, kOwn, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(
      params, tile, statistics, tile.first_row + simdgroup * kRows, Lane(lane_index));
  tile.keys = of_lane(tile.keys, rows.lane);
  tile.values = of_lane(tile.values, rows.lane);
  NoTeam team;
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, rows.view, rows.first_row);
  for (; !walk.is_done(); walk.next()) {
    MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
    // Open blocks have a loop of their own, without a branch.
    while (mask_class != kHidden && !walk.is_done() && rows.view.sees_all(walk.first, kBlockKeys)) {
      add_block<true>(params, rows, team, rules.in_block(mask_class, walk), tile, walk.first);
      walk.next();
      mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
    }
    if (mask_class != kHidden && !walk.is_done()) {
      add_block<false>(params, rows, team, rules.in_block(mask_class, walk), tile, walk.first);
    }
  }
  rows.store(params, grad_query, grad_alibi, tile);
}

}  // namespace mfa
