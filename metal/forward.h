// O = softmax(scale Q K' + mask) V and its log-sum-exp. One threadgroup per (head, query tile, batch); a SIMD-group
// owns kRowTiles * 8 query rows and keeps their Q, S and O in registers.
//
//   load Q
//   for each key block that a row of the tile sees:
//     S = Q K'                    in fragments, float32
//     S -> scores                 softcap, bias, ALiBi where on; mask only in a block that some row sees partly
//     P = softmax step of S       in place: the layout of S is that of P as left operand
//     O = O * rescale + P V
//   store O / l, m + log l
#pragma once

#include "device_rows.h"
#include "team.h"

namespace mfa {

// Q in registers for the whole kernel, loaded from device memory (split) ...
template <typename T, Memory kMemory, int kRowTiles, int kHeadDim, int kSimdgroups>
struct QueryOperand {
  HeldRows<T, kRowTiles, kHeadDim> operand;

  QueryOperand(threadgroup T*, GuardedRows<T> tile, ushort, ushort simdgroup, Lane lane) {
    const int first = simdgroup * kRowTiles * kFragment;
    operand.load(GuardedRows<T>{tile.base + first * tile.stride, tile.stride, tile.valid - first, tile.dim}, lane);
  }
};

// ... or in threadgroup memory, read once per key block (shared).
template <typename T, int kRowTiles, int kHeadDim, int kSimdgroups>
struct QueryOperand<T, shared, kRowTiles, kHeadDim, kSimdgroups> {
  ReadRows<T, kHeadDim, StagedRows<T, kHeadDim, octets>> operand;

  QueryOperand(threadgroup T* memory, GuardedRows<T> tile, ushort thread_index, ushort simdgroup, Lane) {
    stage_rows<T, kSimdgroups * kRowTiles * kFragment, kHeadDim, octets, kSimdgroups * 32>(memory, tile, thread_index);
    operand.rows.base = memory + simdgroup * kRowTiles * kFragment * StagedRows<T, kHeadDim, octets>::kStride;
  }
};

// Where a threadgroup works, and its heads' rows.
template <typename T>
struct ForwardTile {
  Sequence sequence;
  int head;
  int first_row;
  HeadRows<T> queries, keys, values;

  ForwardTile(constant AttentionParams& params, Tile tile, const device T* query, const device T* key,
              const device T* value, int head_, int block_queries, int head_dim, int value_dim)
      : sequence(tile.sequence),
        head(head_),
        first_row(tile.index * block_queries),
        queries(query_rows(query, params.query_strides, sequence, head, head_dim)),
        keys(key_rows(key, params.key_strides, sequence, head / params.group_size, head_dim)),
        values(key_rows(value, params.value_strides, sequence, head / params.group_size, value_dim)) {}
};

#define FORWARD_ARGUMENTS                                                                                       \
  MFA_TENSOR_ARGUMENTS, device T *out [[buffer(kOut)]], MFA_SCORE_ARGUMENTS,                                    \
      const device float *sinks [[buffer(kSinks), function_constant(has_sinks)]],                               \
      device float *lse [[buffer(kLse), function_constant(writes_lse)]],                                        \
      device half *correction [[buffer(kCorrection), function_constant(has_correction)]], MFA_LAYOUT_ARGUMENTS, \
      MFA_PLACE_ARGUMENTS, uint3 grid [[threadgroups_per_grid]]

// K and V go through threadgroup memory, which the SIMD-groups share.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_staged(FORWARD_ARGUMENTS,
                                                                                    ushort thread_index
                                                                                    [[thread_index_in_threadgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kBlockQueries = kSimdgroups * kRowTiles * kFragment;
  typedef StagedRows<T, kHeadDim, pairs> Keys;
  typedef StagedRows<T, kValueDim, octets> Values;
  threadgroup uint4
      memory[forward_threadgroup_bytes(staged, kMemory, kHeadDim, kValueDim, kBlockQueries, kBlockKeys, sizeof(T)) /
             16];
  // split: K, V. shared: K and V take turns, then Q.
  threadgroup T* keys = (threadgroup T*)memory;
  threadgroup T* values = kMemory == split ? keys + kBlockKeys * Keys::kStride : keys;

  const ForwardTile<T> tile(
      params,
      query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y, kBlockQueries),
      query, key, value, position.x, kBlockQueries, is_exact_head ? kHeadDim : params.head_dim,
      is_exact_head ? kValueDim : params.value_dim);
  typedef Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> Rows;
  Rows rows(params, tile.sequence, tile.first_row + simdgroup * kRowTiles * kFragment, sinks, alibi_slopes, tile.head,
            true, lane_index);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  thread const MaskBlocks& blocks = rules.blocks;
  const QueryOperand<T, kMemory, kRowTiles, kHeadDim, kSimdgroups> queries(
      keys + kBlockKeys * larger(Keys::kStride, Values::kStride), tile.queries.from(tile.first_row), thread_index,
      simdgroup, rows.lane);

  const View view = view_of_queries(params, tile.sequence, tile.first_row, tile.first_row + kBlockQueries);
  const Share<T, kBlockKeys, kHeadDim, 2, kThreads> key_share(tile.keys, thread_index);
  const Share<T, kBlockKeys, kValueDim, 1, kThreads> value_share(tile.values, thread_index);
  bool is_first = true;
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, tile.first_row); !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    if (walk.template classify<kBlockQueries, kBlockKeys>(blocks, tile.first_row, first_key) == kHidden) {
      continue;
    }
    const MaskClass mask_class = walk.template classify<Rows::kRows, kBlockKeys>(blocks, rows.first_row, first_key);
    const bool sees = rows.view.sees(first_key, kBlockKeys) && mask_class != kHidden;
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    stage_pairs(keys, key_share, first_key);
    if (kMemory == split) {
      stage<octets>(values, value_share, first_key);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sees) {
      rows.multiply_keys(queries.operand, Keys{keys});
      rows.softmax(params, rules.in_block(mask_class, walk), first_key);
    }
    if (kMemory == shared) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<octets>(values, value_share, first_key);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (sees) {
      rows.add_values(Values{values});
    }
  }
  rows.store(params, out, lse, correction, tile.head);
}

// As staged; a team shares each row tile. K and V take turns in threadgroup memory.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_team(FORWARD_ARGUMENTS, ushort thread_index
                                                                                  [[thread_index_in_threadgroup]]) {
  static_assert(kRowTiles == 1 && kSimdgroups % kTeam == 0, "members have one tile, and teams are whole");
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kBlockQueries = kSimdgroups / kTeam * kFragment;
  constexpr int kSlice = kHeadDim / kTeam;
  constexpr int kValueSlice = kValueDim / kTeam;
  typedef StagedRows<T, kHeadDim, quads> Keys;
  typedef StagedRows<T, kValueDim, octets> Values;
  typedef Forward<T, kSlice, kValueSlice, 1, kBlockKeys> Rows;
  typedef PartialScores<Rows::kKeyTiles> Partial;
  threadgroup uint4
      memory[forward_threadgroup_bytes(team, kMemory, kHeadDim, kValueDim, kBlockQueries, kBlockKeys, sizeof(T)) / 16];
  threadgroup T* staged_rows = (threadgroup T*)memory;
  threadgroup float2* scores = (threadgroup float2*)(staged_rows + kBlockKeys * larger(Keys::kStride, Values::kStride));

  const ForwardTile<T> tile(
      params,
      query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y, kBlockQueries),
      query, key, value, position.x, kBlockQueries, is_exact_head ? kHeadDim : params.head_dim,
      is_exact_head ? kValueDim : params.value_dim);
  const short member = simdgroup % kTeam;
  const short own = simdgroup / kTeam;
  Rows rows(params, tile.sequence, tile.first_row + own * kFragment, sinks, alibi_slopes, tile.head, true, lane_index);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  thread const MaskBlocks& blocks = rules.blocks;
  HeldRows<T, 1, kSlice> queries;
  queries.load(sliced(tile.queries.from(rows.first_row), member * kSlice), rows.lane);
  const Partial partial = {scores + own * kTeam * (Partial::kFloats / 2), lane_index};

  const View view = view_of_queries(params, tile.sequence, tile.first_row, tile.first_row + kBlockQueries);
  bool is_first = true;
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, tile.first_row); !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    if (walk.template classify<kBlockQueries, kBlockKeys>(blocks, tile.first_row, first_key) == kHidden) {
      continue;
    }
    // The same for all members: they have the same rows.
    const MaskClass mask_class = walk.template classify<Rows::kRows, kBlockKeys>(blocks, rows.first_row, first_key);
    const bool sees = rows.view.sees(first_key, kBlockKeys) && mask_class != kHidden;
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    stage_rows<T, kBlockKeys, kHeadDim, quads, kThreads>(staged_rows, tile.keys.from(first_key), thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sees) {
      rows.multiply_keys(queries, Keys{staged_rows + member * kSlice});
      partial.write(rows.score, member);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!value_is_key || kHeadDim == kValueDim) {
      stage_rows<T, kBlockKeys, kValueDim, octets, kThreads>(staged_rows, tile.values.from(first_key), thread_index);
    }
    if (sees) {
      partial.sum(rows.score);
      rows.softmax(params, rules.in_block(mask_class, walk), first_key);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sees) {
      add_team_values<T, kHeadDim, kValueDim>(rows, staged_rows, member * kValueSlice);
    }
  }
  rows.store(params, out, lse, correction, tile.head, member * kValueSlice);
}

// Fragments come straight from device memory: no barrier, and each SIMD-group walks its own key blocks.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_direct(FORWARD_ARGUMENTS) {
  constexpr int kRows = kRowTiles * kFragment;
  const ForwardTile<T> tile(params,
                            query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position,
                                       grid.y, kSimdgroups * kRows),
                            query, key, value, position.x, kSimdgroups * kRows, kHeadDim, kValueDim);
  Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(params, tile.sequence, tile.first_row + simdgroup * kRows,
                                                              sinks, alibi_slopes, tile.head, true, lane_index);
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  thread const MaskBlocks& blocks = rules.blocks;
  const QueryOperand<T, split, kRowTiles, kHeadDim, kSimdgroups> queries(nullptr, tile.queries.from(tile.first_row), 0,
                                                                         simdgroup, rows.lane);
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, rows.view, rows.first_row); !walk.is_done();
       walk.next()) {
    const int first_key = walk.first;
    const MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(blocks, rows.first_row, first_key);
    if (mask_class == kHidden) {
      continue;
    }
    rows.multiply_keys(queries.operand, DeviceRows<T, kHeadDim, quads>(tile.keys.from(first_key), rows.lane));
    rows.softmax(params, rules.in_block(mask_class, walk), first_key);
    rows.add_values(DeviceRows<T, kValueDim, octets>(tile.values.from(first_key), rows.lane));
  }
  rows.store(params, out, lse, correction, tile.head);
}

#define FORWARD(dtype, path, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys)                       \
  template [[host_name("forward_" #dtype "_d" #head_dim "_v" #value_dim "_" #path "_s" #simdgroups "_r" #row_tiles \
                       "_k" #block_keys)]] [[kernel]]                                                              \
  decltype(forward_##path<dtype, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys>)                  \
      forward_##path<dtype, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys>;

}  // namespace mfa
