// The forward pass on the matrix unit: ../forward.h with operands from device memory to registers, no threadgroup
// memory and no barrier. Blocks that every row sees whole need neither bounds of rows nor a mask.
#pragma once

#define MFA_MATRIX_UNIT
#include "../forward.h"

namespace mfa {

// Of float16, 11 bits of P are too few for the numerics rule where P is more than a part of its row's sum, a smaller
// one for training, which asks for more. In bfloat the rounding of the output hides it.
constant constexpr float kLargeShare = 1.0f / 8;
constant constexpr float kLargeTrainedShare = 1.0f / 16;

// Gradients of sinks, slopes and a bias are plain sums of dS, which delta, made of O, then reaches: 11 bits of P would
// show in any type.
inline bool sums_score_gradient() {
  return has_correction && (has_sinks || has_alibi || (has_bias && !has_mask && !has_block_mask));
}

// Each lane's own P against its own part of the sum, a quarter of the row's.
template <typename T, typename Rows>
inline bool needs_refinement(thread const Rows& rows) {
  if (sums_score_gradient()) {
    return true;
  }
  if (!kMayRefine<T>) {
    return false;
  }
  const float share = has_correction ? kLargeTrainedShare : kLargeShare;
  bool is_large = false;
  MFA_UNROLL
  for (short r = 0; r < Rows::kTiles; ++r) {
    const float limit = share * 4 * rows.row[r].sum;
    if (has_dropout || rows.block_sum[r] > limit) {  // else none is larger; dropout has scaled P since
      float largest = 0;
      MFA_UNROLL
      for (short n = 0; n < Rows::kKeyTiles; ++n) {
        largest = max(largest, max(rows.score[r][n].x, rows.score[r][n].y));
      }
      is_large = is_large || largest > limit;
    }
  }
  return simd_any(is_large);
}

// P of the scores that S makes, and O += P V. An open block has neither bounds of rows nor a mask.
template <bool kIsOpen, int kValueDim, typename T, typename Rows>
inline void add_values(constant AttentionParams& params, thread Rows& rows, GuardedRows<T> values, Rules<T> rules,
                       int first_key) {
  rows.template softmax<kIsOpen>(params, rules, first_key);
  multiply_accumulate<T, kValueDim>(rows.out, rows.score, unit_rows<kIsOpen, Rows::kKeyTiles>(values), rows.lane,
                                    needs_refinement<T>(rows));
}

// One block of keys.
template <bool kIsOpen, int kValueDim, typename T, typename Rows, typename Queries>
inline void add_block(constant AttentionParams& params, thread Rows& rows, thread const Queries& queries,
                      thread const ForwardTile<T>& tile, Rules<T> rules, int first_key) {
  rows.multiply_keys(queries, unit_rows<kIsOpen, Rows::kKeyTiles>(tile.keys.from(first_key)));
  add_values<kIsOpen, kValueDim>(params, rows, tile.values.from(first_key), rules, first_key);
}

// kMemory: split, Q in registers; shared: read again for every block, from device memory as K and V are.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_unit(FORWARD_ARGUMENTS) {
  constexpr int kRows = kRowTiles * kFragment;
  ForwardTile<T> tile(params,
                      query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y,
                                 kSimdgroups * kRows),
                      query, key, value, position.x, kSimdgroups * kRows, kHeadDim, kValueDim);
  if (tile.sequence.query_length == 0) {
    return;  // a threadgroup without work: there is not even a last row to read
  }
  Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(params, tile.sequence, tile.first_row + simdgroup * kRows,
                                                              sinks, alibi_slopes, tile.head, true, lane_index);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  const OwnOperand<T, kMemory == split ? held : reread, kRowTiles, kHeadDim, OwnRows<T, kRowTiles>> queries(
      {tile.queries, rows.first_row, rows.lane}, rows.lane);
  tile.keys = of_lane(tile.keys, rows.lane);
  tile.values = of_lane(tile.values, rows.lane);
  BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, rows.view, rows.first_row);
  for (;; walk.next()) {
    MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
    // Open blocks have a loop of their own, without a branch.
    while (rows.is_open(params, rules.in_block(mask_class).scores, rows.view, walk.first)) {
      add_block<true, kValueDim>(params, rows, queries.operand, tile, rules, walk.first);
      walk.next();
      mask_class = walk.template classify<kRows, kBlockKeys>(rules.blocks, rows.first_row, walk.first);
    }
    if (walk.is_done()) {
      break;
    }
    if (mask_class != kHidden) {
      add_block<false, kValueDim>(params, rows, queries.operand, tile, rules.in_block(mask_class, walk), walk.first);
    }
  }
  rows.store(params, out, lse, correction, tile.head);
}

}  // namespace mfa
