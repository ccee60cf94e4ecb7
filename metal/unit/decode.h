// Decode on the matrix unit, for more rows than the eight of a fragment: ../decode.h with operands from device memory
// to registers. No threadgroup memory and no barrier: each SIMD-group goes its own way with its own 16 rows.
#pragma once

#define MFA_MATRIX_UNIT
#include "../decode.h"
#include "forward_rows.h"
#include "team_scores.h"

namespace mfa {

// Where a lane reads of kTiles row tiles, as LaneRows; but of rows of any alignment and dimension, or of 8 bits.
template <typename T, int kTiles, bool kIsBounded = false>
struct LooseLaneRows {
  CacheFormat format;
  const device uchar* tiles[kTiles];  // this lane's row, from its octet of the first set on
  int valid;                          // as in LaneRows
  int dim;                            // from there on

  // Of packed rows, as left operand: one past the last reads as the last.
  LooseLaneRows(PackedRows<T> packed, Lane lane)
      : format{false, false, false}, valid(0), dim(packed.dim - 4 * lane.column) {
    MFA_UNROLL
    for (short i = 0; i < kTiles; ++i) {
      const int row = min(packed.first_row + i * kFragment + lane.row, packed.rows - 1);
      tiles[i] = (const device uchar*)(packed.base + row % packed.group * packed.head_stride +
                                       row / packed.group * packed.row_stride + 4 * lane.column);
    }
  }

  // Keys of a cache. A tile lies in one page, see CacheRows.
  LooseLaneRows(Cache<T> cache, int first_key, Lane lane)
      : format(cache.format), valid(cache.length - first_key - lane.row), dim(cache.dim - 4 * lane.column) {
    MFA_UNROLL
    for (short i = 0; i < kTiles; ++i) {
      const int last = cache.length - 1 - first_key;
      const int first = kIsBounded ? min(i * kFragment, last) : i * kFragment;
      const int row = kIsBounded ? min(int(lane.row), last - first) : lane.row;
      tiles[i] = cache.row(first_key + first) + row * cache.row_bytes() + column_bytes(4 * lane.column);
    }
  }

  int column_bytes(int column) const { return column * format.template element_size<T>(); }

  LooseLaneRows from_set(int set) const {
    LooseLaneRows rows = *this;
    rows.dim -= set * kSetWidth;
    MFA_UNROLL
    for (short i = 0; i < kTiles; ++i) {
      rows.tiles[i] += column_bytes(set * kSetWidth);
    }
    return rows;
  }

  bool has(short tile) const { return !kIsBounded || tile * kFragment < valid; }

  Octet<T> whole_set(short tile, short set) const {
    const short d = set * kSetWidth;
    if (!format.is_quantized && is_aligned && (is_exact_head || d + 8 <= dim)) {
      const Octet<T> x = load_octet((const device T*)tiles[tile] + d);
      return {has(tile) ? x.low : vec<T, 4>(0), has(tile) ? x.high : vec<T, 4>(0)};
    }
    return {quad(tile, d, 0), quad(tile, d + 4, 0)};
  }

  vec<T, 4> half_set(short tile, short set, Lane lane) const { return quad(tile, set * kSetWidth, 2 * lane.column); }

  // `before`: columns to the left of this lane's.
  vec<T, 4> quad(short tile, short d, short before) const {
    const device uchar* row = tiles[tile] - column_bytes(before);
    const vec<T, 4> x = is_aligned && (is_exact_head || d + 4 <= dim + before)
                            ? format.template wide_quad<T>(row, d / 4)
                            : format.template quad<T>(row, true, d, dim + before);
    return has(tile) ? x : vec<T, 4>(0);
  }
};

// One block of keys; of an open one every row sees every key. Scores are those of all members of a team, which has rows
// that see the block, or takes no part.
template <bool kIsOpen, int kValueDim, typename T, typename Rows, typename Queries, typename TeamScores>
inline void add_block(constant AttentionParams& params, thread Rows& rows, thread const Queries& queries,
                      thread TeamScores& team_scores, thread const Caches<T>& cache, Rules<T> rules, int first_key,
                      ushort lane_index, bool takes_part) {
  static_assert(Rows::kKeyTiles * kFragment == 32, "a lane has the scale of a key");
  typedef LooseLaneRows<T, Rows::kKeyTiles, !kIsOpen> Keys;
  if (takes_part) {
    rows.multiply_keys(queries, Keys(cache.keys, first_key, rows.lane));
  }
  team_scores.exchange(rows.score, takes_part);
  if (!takes_part) {
    return;
  }
  if (key_is_quantized) {
    scale_columns(rows, cache.keys.scale(first_key + lane_index));
  }
  const bool refines = rows.template softmax<kIsOpen>(params, rules, first_key);
  if (value_is_quantized) {
    scale_columns(rows, cache.values.scale(first_key + lane_index));
  }
  multiply_accumulate<T, kValueDim>(rows.out, rows.score, Keys(cache.values, first_key, rows.lane), rows.lane, refines);
}

template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void decode_unit(DECODE_ARGUMENTS, ushort simdgroup
                                                                                 [[simdgroup_index_in_threadgroup]]) {
  constexpr int kRows = kRowTiles * kFragment;
  typedef UnitForward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys, true> Rows;
  typedef LooseLaneRows<T, kRowTiles> Queries;
  DecodeTile tile(params, Layout{tile_map, query_starts, key_starts, key_lengths}, position, kSimdgroups * kRows);
  tile.first_row += simdgroup * kRows;
  if (tile.first_row >= tile.row_count || (tile.is_whole(params) && tile.part > 0)) {
    return;
  }
  Rows rows(params, tile.sequence, tile.first_row, sinks, alibi_slopes, tile.head, tile.part == 0, lane_index);
  const OwnOperand<T, kHeadDim <= 64 ? held : reread, kRowTiles, kHeadDim, Queries> queries(
      Queries(tile.queries(params, query, tile.first_row, is_exact_head ? kHeadDim : params.head_dim), rows.lane),
      rows.lane);
  const Rules<T> rules(params, tile.sequence, bias, nullptr, alibi_slopes, nullptr, tile.head);
  const Caches<T> cache(params, key, value, block_table, key_scale, value_scale, tile.sequence, tile.key_head,
                        is_exact_head ? kHeadDim : params.head_dim, is_exact_head ? kValueDim : params.value_dim);
  NoTeam alone;

  auto walk = tile.walk<kRows, kBlockKeys>(params, rules.scores.block_mask, rows.view, rows.first_row + rows.lane.row,
                                           lane_index);
  for (; !walk.is_done(); walk.next()) {
    MaskClass mask_class = classify<T, kRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    // Open blocks have a loop of their own, without a branch.
    while (mask_class != kHidden && !walk.is_done() &&
           rows.is_open(params, rules.in_block(mask_class).scores, rows.view, walk.first)) {
      add_block<true, kValueDim>(params, rows, queries.operand, alone, cache, rules.in_block(mask_class), walk.first,
                                 lane_index, true);
      walk.next();
      mask_class = classify<T, kRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    }
    if (mask_class != kHidden && !walk.is_done()) {
      add_block<false, kValueDim>(params, rows, queries.operand, alone, cache, rules.in_block(mask_class), walk.first,
                                  lane_index, true);
    }
  }
  store_packed<kValueDim>(params, rows, tile, out, lse, partial_out, partial_lse);
}

}  // namespace mfa
