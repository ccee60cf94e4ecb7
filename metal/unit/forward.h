// The forward pass on the matrix unit: ../forward.h with operands from device memory to registers, no threadgroup
// memory and no barrier. Blocks that every row sees whole need neither bounds of rows nor a mask.
#pragma once

#define MFA_MATRIX_UNIT
#include "../forward.h"
#include "forward_rows.h"

namespace mfa {

// P of the scores that S makes, and O += P V. An open block has neither bounds of rows nor a mask.
template <bool kIsOpen, int kValueDim, typename T, typename Rows>
inline void add_values(constant AttentionParams& params, thread Rows& rows, GuardedRows<T> values, Rules<T> rules,
                       int first_key) {
  const bool refines = rows.template softmax<kIsOpen>(params, rules, first_key);
  multiply_accumulate<T, kValueDim>(rows.out, rows.score, unit_rows<kIsOpen, Rows::kKeyTiles>(values), rows.lane,
                                    refines);
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
  UnitForward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(
      params, tile.sequence, tile.first_row + simdgroup * kRows, sinks, alibi_slopes, tile.head, true, lane_index);
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
