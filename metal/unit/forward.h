// The forward pass on the matrix unit: ../forward.h with operands from device memory to registers, no threadgroup
// memory and no barrier. Blocks that every row sees whole need neither bounds of rows nor a mask.
#pragma once

#define MFA_MATRIX_UNIT
#include "../forward.h"
#include "rows.h"

namespace mfa {

// Of float16, 11 bits of P are too few for the numerics rule where P is more than a part of its row's sum, a smaller
// one for training, which asks for more. In bfloat the rounding of the output hides it.
constant constexpr float kLargeShare = 1.0f / 8;
constant constexpr float kLargeTrainedShare = 1.0f / 16;

template <typename T, typename Rows>
inline bool needs_refinement(thread const Rows& rows) {
  if (!is_same_v<T, half>) {
    return false;
  }
  const float share = has_correction ? kLargeTrainedShare : kLargeShare;
  bool is_large = false;
  MFA_UNROLL
  for (short r = 0; r < Rows::kTiles; ++r) {
    float largest = 0;
    MFA_UNROLL
    for (short n = 0; n < Rows::kKeyTiles; ++n) {
      largest = max(largest, max(rows.score[r][n].x, rows.score[r][n].y));
    }
    is_large = is_large || largest > share * 4 * rows.row[r].sum;  // a quarter of the row's
  }
  return simd_any(is_large);
}

// kMemory: split, Q in registers; shared: read again for every block, from device memory as K and V are.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_unit(FORWARD_ARGUMENTS) {
  constexpr int kRows = kRowTiles * kFragment;
  const ForwardTile<T> tile(params,
                            query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position,
                                       grid.y, kSimdgroups * kRows),
                            query, key, value, position.x, kSimdgroups * kRows, kHeadDim, kValueDim);
  typedef Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> Rows;
  Rows rows(params, tile.sequence, tile.first_row + simdgroup * kRows, sinks, alibi_slopes, tile.head, true,
            lane_index);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  thread const MaskBlocks& blocks = rules.blocks;
  const GuardedRows<T> own = tile.queries.from(rows.first_row);
  const OwnOperand<T, kMemory == split ? held : reread, kRowTiles, kHeadDim, BoundedRows<T>> queries(
      BoundedRows<T>{own.base, own.stride, own.valid}, rows.lane);
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, rows.view, rows.first_row); !walk.is_done();
       walk.next()) {
    const int first_key = walk.first;
    const MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(blocks, rows.first_row, first_key);
    if (mask_class == kHidden) {
      continue;
    }
    const GuardedRows<T> keys = tile.keys.from(first_key);
    const GuardedRows<T> values = tile.values.from(first_key);
    const bool is_open = keys.valid >= kBlockKeys;
    if (is_open) {
      rows.multiply_keys(queries.operand, OpenRows<T>{keys.base, keys.stride});
    } else {
      rows.multiply_keys(queries.operand, BoundedRows<T>{keys.base, keys.stride, keys.valid});
    }
    rows.softmax(params, rules.in_block(mask_class, walk), first_key);
    const bool refines = needs_refinement<T>(rows);
    if (is_open) {
      const OpenRows<T> open = {values.base, values.stride};
      multiply_accumulate<T, kValueDim>(rows.out, rows.score, open, rows.lane, refines);
    } else {
      const BoundedRows<T> guarded = {values.base, values.stride, values.valid};
      multiply_accumulate<T, kValueDim>(rows.out, rows.score, guarded, rows.lane, refines);
    }
  }
  rows.store(params, out, lse, correction, tile.head);
}

}  // namespace mfa
