// dK and dV on the matrix unit: ../backward_dkdv.h with operands and statistics from device memory to registers, no
// threadgroup memory and no wait. Each SIMD-group walks the blocks of queries that its own keys see.
#pragma once

#define MFA_MATRIX_UNIT
#include "../backward_dkdv.h"
#include "../device_rows.h"
#include "team_scores.h"

namespace mfa {

// The statistics of a block's queries in device memory; of those that fragments have in column tile n, read when asked
// for. A row that isn't there is one that sees nothing; in an open block all are.
struct UnreadStatistics {
  const device float2* rows;
  bool is_open;
  int valid;
  Lane lane;

  bool has(short row) const { return is_open || row < valid; }

  float2 lse(short n) const { return pair(n, 0, kUnseenLse); }
  float2 delta(short n) const { return pair(n, 1, 0); }

  float2 pair(short n, short which, float unseen) const {
    const short i = lane.column_of(n);
    const device float* row = (const device float*)(rows + i) + which;
    return float2(has(i) ? row[0] : unseen, has(i + 1) ? row[2] : unseen);
  }
};

// The same, read at once.
template <int kTiles>
struct ReadStatistics {
  float2 lse_and_delta[kTiles][2];

  explicit ReadStatistics(UnreadStatistics unread) {
    MFA_UNROLL
    for (short n = 0; n < kTiles; ++n) {
      MFA_UNROLL
      for (short e = 0; e < 2; ++e) {
        const short i = unread.lane.column_of(n) + e;
        lse_and_delta[n][e] = unread.has(i) ? unread.rows[i] : float2(kUnseenLse, 0);
      }
    }
  }

  float2 lse(short n) const { return float2(lse_and_delta[n][0].x, lse_and_delta[n][1].x); }
  float2 delta(short n) const { return float2(lse_and_delta[n][0].y, lse_and_delta[n][1].y); }
};

// One block of queries. An open one has neither bounds of rows nor a mask. takes_part: whether the keys see any of
// them; who has keys with others must come here all the same.
template <bool kIsOpen, typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockQueries, typename Team>
inline void add_block(constant AttentionParams& params,
                      thread BackwardKeys<T, kHeadDim, kValueDim, kRowTiles, kBlockQueries>& keys, thread Team& team,
                      Rules<T> rules, HeadRows<T> head_queries, HeadRows<T> head_grad_outs,
                      const device float2* head_statistics, int first_query, bool takes_part = true) {
  constexpr int kTiles = kBlockQueries / kFragment;
  const auto queries = unit_rows<kIsOpen, kTiles>(head_queries.from(first_query));
  const auto grad_outs = unit_rows<kIsOpen, kTiles>(head_grad_outs.from(first_query));
  const UnreadStatistics unread = {head_statistics + first_query, kIsOpen, keys.sequence.query_length - first_query,
                                   keys.lane};
  const conditional_t<Team::kIsTeam, UnreadStatistics, ReadStatistics<kTiles>> statistics(unread);
  Fragment<float> dp[kRowTiles][kTiles];
  if (takes_part) {
    keys.multiply_queries(queries);
  }
  team.exchange(keys.p, takes_part);
  if (takes_part) {
    keys.template make_probabilities<kIsOpen>(params, rules, statistics, first_query);
    if (wants_grad_value && wants_grad_key) {
      if (!Team::kIsTeam) {
        keep_in_loop();  // V, which would else be read once, into registers that there aren't
      }
      Fragment<float> kept[kRowTiles][kTiles];
      keys.keep(rules, first_query, kept);
      multiply_both<T, kValueDim>(dp, keys.value, keys.grad_value, kept, grad_outs, keys.lane, keys.refines);
    } else if (wants_grad_value) {
      keys.add_values(rules, grad_outs, first_query);
    } else {
      keys.multiply_grad_outs(grad_outs, dp);
    }
  }
  if (wants_grad_key) {
    team.exchange(dp, takes_part);
    if (takes_part) {
      keys.make_score_gradient(rules, dp, statistics, first_query);
      keys.add_keys(queries);
    }
  }
}

template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockQueries>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dkdv_unit(BACKWARD_DKDV_ARGUMENTS) {
  constexpr int kRows = kRowTiles * kFragment;
  const int unit = first_unit + position.x;  // (batch, key head)
  const KeyTile<T> tile(
      params,
      key_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, unit, position.y, kSimdgroups * kRows),
      key, value, unit, kSimdgroups * kRows, kHeadDim, kValueDim);
  BackwardKeys<T, kHeadDim, kValueDim, kRowTiles, kBlockQueries> rows(params, tile, tile.first_key + simdgroup * kRows,
                                                                      Lane(lane_index));
  NoTeam team;
  for (int member = 0; member < params.group_size; ++member) {
    const int head = tile.key_head * params.group_size + member;
    const HeadRows<T> queries =
        of_lane(query_rows(query, params.query_strides, tile.sequence, head, kHeadDim), rows.lane);
    const HeadRows<T> grad_outs =
        of_lane(query_rows(grad_out, params.grad_out_strides, tile.sequence, head, kValueDim), rows.lane);
    const device float2* head_statistics = statistics + first_row_index(params, tile.sequence, head);
    const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, head);
    BlockWalk<kBlockQueries, false> walk(rules.scores.block_mask, rows.view, rows.first_key);
    for (; !walk.is_done(); walk.next()) {
      MaskClass mask_class = walk.template classify<kBlockQueries, kRows>(rules.blocks, walk.first, rows.first_key);
      // Open blocks have a loop of their own, without a branch.
      while (mask_class != kHidden && !walk.is_done() && rows.view.sees_all(walk.first, kBlockQueries)) {
        add_block<true>(params, rows, team, rules.in_block(mask_class, walk), queries, grad_outs, head_statistics,
                        walk.first);
        walk.next();
        mask_class = walk.template classify<kBlockQueries, kRows>(rules.blocks, walk.first, rows.first_key);
      }
      if (mask_class != kHidden && !walk.is_done()) {
        add_block<false>(params, rows, team, rules.in_block(mask_class, walk), queries, grad_outs, head_statistics,
                         walk.first);
      }
    }
  }
  rows.store(params, grad_key, grad_value, tile);
}

}  // namespace mfa
