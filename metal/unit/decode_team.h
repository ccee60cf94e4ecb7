// Decode on the matrix unit for heads too long for the registers of one SIMD-group: a team of them shares 16 rows, and
// each has a slice of D and of Dv, as in forward_team.h.
#pragma once

#include "decode.h"

namespace mfa {

// A member's columns.
template <typename T>
inline Cache<T> sliced(Cache<T> cache, int first_dim) {
  cache.base += first_dim * cache.format.template element_size<T>();
  cache.dim -= first_dim;
  return cache;
}

// All SIMD-groups of a threadgroup walk the same blocks.
template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void decode_unit_team(
    DECODE_ARGUMENTS, ushort simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int kMembers = members_of(unit_team, kHeadDim);
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kTileRows = rows_of(unit_team, kHeadDim, kSimdgroups, kRowTiles);
  constexpr int kSlice = kHeadDim / kMembers;
  constexpr int kValueSlice = kValueDim / kMembers;
  typedef UnitForward<T, kSlice, kValueSlice, kRowTiles, kBlockKeys, true> Rows;
  typedef LooseLaneRows<T, kRowTiles> Queries;
  typedef UnitTeamScores<kMembers, kRowTiles, Rows::kKeyTiles> TeamScores;
  threadgroup float4
      memory[decode_threadgroup_bytes(unit_team, kHeadDim, kValueDim, kTileRows, kBlockKeys, sizeof(T)) / 16];

  const DecodeTile tile(params, Layout{tile_map, query_starts, key_starts, key_lengths}, position, kTileRows);
  if (tile.first_row >= tile.row_count || (tile.is_whole(params) && tile.part > 0)) {
    return;
  }
  const short member = simdgroup % kMembers;
  const short own = simdgroup / kMembers;
  Rows rows(params, tile.sequence, tile.first_row + own * kRows, sinks, alibi_slopes, tile.head, tile.part == 0,
            lane_index);
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const ReadRows<T, kSlice, Queries> queries = {
      Queries(sliced(tile.queries(params, query, rows.first_row, head_dim), member * kSlice), rows.lane)};
  TeamScores scores = {memory + own * kMembers * TeamScores::kQuads, kSimdgroups * TeamScores::kQuads, member,
                       lane_index};
  const Rules<T> rules(params, tile.sequence, bias, nullptr, alibi_slopes, nullptr, tile.head);
  Caches<T> cache(params, key, value, block_table, key_scale, value_scale, tile.sequence, tile.key_head, head_dim,
                  value_dim);
  cache.keys = sliced(cache.keys, member * kSlice);
  cache.values = sliced(cache.values, member * kValueSlice);

  const bool has_rows = rows.first_row < tile.row_count;
  const View view = view_of_queries(params, tile.sequence, rows.query_of(tile.first_row),
                                    rows.query_of(tile.first_row + kTileRows - 1) + 1);
  auto walk = tile.walk<kTileRows, kBlockKeys>(params, rules.scores.block_mask, view, rows.first_row + rows.lane.row,
                                               lane_index);
  for (; !walk.is_done(); walk.next()) {
    // All SIMD-groups look at the same elements: what they find must not differ, since a barrier follows.
    MaskClass mask_class = classify<T, kTileRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    while (mask_class != kHidden && !walk.is_done() &&
           rows.is_open(params, rules.in_block(mask_class).scores, view, walk.first)) {
      add_block<true, kValueSlice>(params, rows, queries, scores, cache, rules.in_block(mask_class), walk.first,
                                   lane_index, has_rows);
      walk.next();
      mask_class = classify<T, kTileRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    }
    if (mask_class != kHidden && !walk.is_done()) {
      if (bias_is_of_last_keys) {
        mask_class = classify<T, kRows>(params, rules.scores, tile, walk, rows.first_row, lane_index);
      }
      add_block<false, kValueSlice>(params, rows, queries, scores, cache, rules.in_block(mask_class), walk.first,
                                    lane_index, rows.view.sees(walk.first, kBlockKeys));
    }
  }
  store_packed<kValueSlice>(params, rows, tile, out, lse, partial_out, partial_lse, member * kValueSlice);
}

}  // namespace mfa
