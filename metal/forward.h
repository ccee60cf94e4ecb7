// O = softmax(scale Q K' + mask) V and its log-sum-exp. One threadgroup per (head, query tile, batch); a SIMD-group owns
// kRowTiles * 8 query rows and keeps their Q, S and O in registers.
//
//   load Q
//   for each key block that a row of the tile sees:
//     S = Q K'                    in fragments, float32
//     S -> scores                 softcap, bias, ALiBi where on; mask only in a block that some row sees partly
//     P = softmax step of S       in place: the layout of S is that of P as left operand
//     O = O * rescale + P V
//   store O / l, m + log l
#pragma once

#include "dropout.h"
#include "mask.h"
#include "score.h"
#include "tile.h"

namespace mfa {

// One SIMD-group's rows.
template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys>
struct Forward {
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kKeyTiles = kBlockKeys / kFragment;
  static constant constexpr int kHeadSets = kHeadDim / kSetWidth;
  static constant constexpr int kValueSets = kValueDim / kSetWidth;

  Fragment<float> score[kRowTiles][kKeyTiles];
  Fragment<float> out[kRowTiles][kValueSets * kSetFragments];
  SoftmaxRow row[kRowTiles];
  Lane lane;
  View view;
  int first_row;

  Forward(constant AttentionParams& params, int first_row_, ushort lane_index)
      : lane(lane_index), view(view_of_queries(params, first_row_, first_row_ + kRows)), first_row(first_row_) {
    clear(out);
  }

  void start(const device float* sinks, int head) {
    if (has_sinks) {
#pragma unroll
      for (short r = 0; r < kRowTiles; ++r) {
        row[r].start_with_sink(sinks[head], lane.column == 0);
      }
    }
  }

  // P = softmax step of scale Q K'.
  template <typename Queries, typename Keys>
  void score_keys(constant AttentionParams& params, Scores<T> scores, Dropout dropout, thread const Queries& queries,
                  Keys keys, int first_key) {
    multiply_transposed<T, kHeadSets>(score, queries, keys, lane);
    float scale = params.scale_log2;
    // max(S) * scale is the largest scaled score only for a scale that is not negative.
    if (Scores<T>::are_modified() || scale < 0 || !view.sees_all(first_key, kBlockKeys)) {
      modify_and_mask(params, scores, first_key);
      scale = 1;
    }
    rescale(scale);
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (short n = 0; n < kKeyTiles; ++n) {
        const float2 p = fast::exp2(fma(elements(score[r][n]), float2(scale), float2(-row[r].maximum)));
        row[r].sum += p.x + p.y;
        elements(score[r][n]) = p;
        if (has_dropout) {
          elements(score[r][n]) *=
              dropout.of_keys(first_row + r * kFragment + lane.row, first_key + n * kFragment + lane.column);
        }
      }
    }
  }

  template <typename Values>
  void add_values(Values values) {
    multiply_accumulate<T, kValueSets>(out, score, values, lane);
  }

  // kMasked is a sentinel of the scaled domain, hence the order.
  void modify_and_mask(constant AttentionParams& params, Scores<T> scores, int first_key) {
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
      const int query = first_row + r * kFragment + lane.row;
      const Range keys = visible_keys(params, query);
#pragma unroll
      for (short n = 0; n < kKeyTiles; ++n) {
        const int key = first_key + n * kFragment + lane.column;
        float2 derivative;
        const float2 x = scores.apply(params, elements(score[r][n]), int2(query), int2(key, key + 1), derivative);
        elements(score[r][n]) = float2(keys.has(key) ? x.x : kMasked, keys.has(key + 1) ? x.y : kMasked);
      }
    }
  }

  // Moves each row's maximum if it has to move, and what was accumulated under the old one with it.
  void rescale(float scale) {
    float factor[kRowTiles];
    bool moved = false;
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
      float largest = kMasked;
#pragma unroll
      for (short n = 0; n < kKeyTiles; ++n) {
        const float2 x = elements(score[r][n]);
        largest = max(largest, max(x.x, x.y));
      }
      factor[r] = row[r].advance(row_max(largest) * scale);
      moved = moved || factor[r] != 1;
    }
    if (simd_any(moved)) {
#pragma unroll
      for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (short j = 0; j < kValueSets * kSetFragments; ++j) {
          elements(out[r][j]) *= factor[r];
        }
      }
    }
  }

  // `out_rows` and `lse` start at the first row of the head.
  void store(constant AttentionParams& params, device T* out_rows, device float* lse) {
    const int valid = params.query_length - first_row;
    float inverse[kRowTiles];
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
      const float sum = row_sum(row[r].sum);
      inverse[r] = sum == 0 ? 0 : 1 / sum;
      const int i = r * kFragment + lane.row;
      if (writes_lse && lane.column == 0 && i < valid) {
        lse[first_row + i] = log_sum_exp(row[r].maximum, sum);
      }
    }
    store_rows<T, kValueSets>(out_rows + first_row * params.out_strides[2], params.out_strides[2], valid,
                              is_exact_head ? kValueDim : params.value_dim, out, inverse, lane);
  }
};

// Q in registers for the whole kernel, loaded from device memory (split) ...
template <typename T, Memory kMemory, int kRowTiles, int kHeadDim, int kSimdgroups>
struct QueryOperand {
  HeldRows<T, kRowTiles, kHeadDim / kSetWidth> operand;

  QueryOperand(threadgroup T*, GuardedRows<T> tile, ushort, ushort simdgroup, Lane lane) {
    const int first = simdgroup * kRowTiles * kFragment;
    operand.load(GuardedRows<T>{tile.base + first * tile.stride, tile.stride, tile.valid - first, tile.dim}, lane);
  }
};

// ... or in threadgroup memory, read once per key block (shared).
template <typename T, int kRowTiles, int kHeadDim, int kSimdgroups>
struct QueryOperand<T, shared, kRowTiles, kHeadDim, kSimdgroups> {
  ReadRows<T, StagedRows<T, kHeadDim>> operand;

  QueryOperand(threadgroup T* memory, GuardedRows<T> tile, ushort thread_index, ushort simdgroup, Lane) {
    stage_rows<T, kSimdgroups * kRowTiles * kFragment, kHeadDim, kSimdgroups * 32>(memory, tile, thread_index);
    operand.rows.base = memory + simdgroup * kRowTiles * kFragment * StagedRows<T, kHeadDim>::kStride;
  }
};

// Where a threadgroup works, and its heads' tensors.
template <typename T>
struct ForwardTile {
  const device T* query;
  const device T* key;
  const device T* value;
  device T* out;
  device float* lse;
  int head, batch;
  int first_row;

  ForwardTile(constant AttentionParams& params, const device T* query_, const device T* key_, const device T* value_,
              device T* out_, device float* lse_, uint3 position, uint3 grid, int block_queries) {
    head = position.x;
    batch = position.z;
    const int key_head = head / params.group_size;
    const int tile = params.heavy_first ? grid.y - 1 - position.y : position.y;
    query = query_ + batch * params.query_strides[0] + head * params.query_strides[1];
    key = key_ + batch * params.key_strides[0] + key_head * params.key_strides[1];
    value = value_ + batch * params.value_strides[0] + key_head * params.value_strides[1];
    out = out_ + batch * params.out_strides[0] + head * params.out_strides[1];
    lse = lse_ + (long(batch) * params.query_heads + head) * params.query_length;
    first_row = tile * block_queries;
  }

  GuardedRows<T> queries(constant AttentionParams& params, int dim) const {
    return {query + first_row * params.query_strides[2], long(params.query_strides[2]),
            params.query_length - first_row, dim};
  }
  GuardedRows<T> keys(constant AttentionParams& params, int first_key, int dim) const {
    return {key + first_key * params.key_strides[2], long(params.key_strides[2]), params.key_length - first_key, dim};
  }
  GuardedRows<T> values(constant AttentionParams& params, int first_key, int dim) const {
    return {value + first_key * params.value_strides[2], long(params.value_strides[2]), params.key_length - first_key,
            dim};
  }
};

// K and V go through threadgroup memory, which the SIMD-groups share.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_staged(
    const device T* query [[buffer(kQuery)]], const device T* key [[buffer(kKey)]],
    const device T* value [[buffer(kValue)]], device T* out [[buffer(kOut)]],
    const device uchar* bias [[buffer(kBias), function_constant(has_bias)]],
    const device float* sinks [[buffer(kSinks), function_constant(has_sinks)]],
    const device float* alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],
    const device uint* rng_state [[buffer(kRngState), function_constant(has_dropout)]],
    device float* lse [[buffer(kLse), function_constant(writes_lse)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    uint3 grid [[threadgroups_per_grid]], ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane_index [[thread_index_in_simdgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kBlockQueries = kSimdgroups * kRowTiles * kFragment;
  typedef StagedRows<T, kHeadDim> Keys;
  typedef StagedRows<T, kValueDim> Values;
  threadgroup uint4 memory[forward_threadgroup_bytes(staged, kMemory, kHeadDim, kValueDim, kBlockQueries, kBlockKeys,
                                                     sizeof(T)) / 16];
  // split: K, V. shared: K and V take turns, then Q.
  threadgroup T* keys = (threadgroup T*)memory;
  threadgroup T* values = kMemory == split ? keys + kBlockKeys * Keys::kStride : keys;

  const ForwardTile<T> tile(params, query, key, value, out, lse, position, grid, kBlockQueries);
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(
      params, tile.first_row + simdgroup * kRowTiles * kFragment, lane_index);
  rows.start(sinks, tile.head);
  const Scores<T> scores(params, bias, alibi_slopes, tile.batch, tile.head);
  const Dropout dropout(params, rng_state, tile.batch * params.query_heads + tile.head);
  const QueryOperand<T, kMemory, kRowTiles, kHeadDim, kSimdgroups> queries(
      keys + kBlockKeys * larger(Keys::kStride, Values::kStride), tile.queries(params, head_dim), thread_index,
      simdgroup, rows.lane);

  const View view = view_of_queries(params, tile.first_row, tile.first_row + kBlockQueries);
  const int begin = view.first_block(kBlockKeys);
  const int end = view.end_block(kBlockKeys);
  for (int block = begin; block < end; ++block) {
    const int first_key = block * kBlockKeys;
    const GuardedRows<T> next_values = tile.values(params, first_key, value_dim);
    const bool sees = rows.view.sees(first_key, kBlockKeys);
    if (block > begin) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    stage_rows<T, kBlockKeys, kHeadDim, kThreads>(keys, tile.keys(params, first_key, head_dim), thread_index);
    if (kMemory == split) {
      stage_rows<T, kBlockKeys, kValueDim, kThreads>(values, next_values, thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sees) {
      rows.score_keys(params, scores, dropout, queries.operand, Keys{keys}, first_key);
    }
    if (kMemory == shared) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage_rows<T, kBlockKeys, kValueDim, kThreads>(values, next_values, thread_index);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (sees) {
      rows.add_values(Values{values});
    }
  }
  rows.store(params, tile.out, tile.lse);
}

// Fragments come straight from device memory: no barrier, and each SIMD-group walks its own key blocks.
template <typename T, Memory kMemory, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void forward_direct(
    const device T* query [[buffer(kQuery)]], const device T* key [[buffer(kKey)]],
    const device T* value [[buffer(kValue)]], device T* out [[buffer(kOut)]],
    const device uchar* bias [[buffer(kBias), function_constant(has_bias)]],
    const device float* sinks [[buffer(kSinks), function_constant(has_sinks)]],
    const device float* alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],
    const device uint* rng_state [[buffer(kRngState), function_constant(has_dropout)]],
    device float* lse [[buffer(kLse), function_constant(writes_lse)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    uint3 grid [[threadgroups_per_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane_index [[thread_index_in_simdgroup]]) {
  constexpr int kRows = kRowTiles * kFragment;
  const ForwardTile<T> tile(params, query, key, value, out, lse, position, grid, kSimdgroups * kRows);
  Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(params, tile.first_row + simdgroup * kRows, lane_index);
  rows.start(sinks, tile.head);
  const Scores<T> scores(params, bias, alibi_slopes, tile.batch, tile.head);
  const Dropout dropout(params, rng_state, tile.batch * params.query_heads + tile.head);
  const QueryOperand<T, split, kRowTiles, kHeadDim, kSimdgroups> queries(nullptr, tile.queries(params, kHeadDim), 0,
                                                                         simdgroup, rows.lane);
  const int end = rows.view.end_block(kBlockKeys);
  for (int block = rows.view.first_block(kBlockKeys); block < end; ++block) {
    const int first_key = block * kBlockKeys;
    const GuardedRows<T> keys = tile.keys(params, first_key, kHeadDim);
    const GuardedRows<T> values = tile.values(params, first_key, kValueDim);
    rows.score_keys(params, scores, dropout, queries.operand, DeviceRows<T>{keys.base, keys.stride, keys.valid}, first_key);
    rows.add_values(DeviceRows<T>{values.base, values.stride, values.valid});
  }
  rows.store(params, tile.out, tile.lse);
}

#define FORWARD(dtype, path, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys)                        \
  template [[host_name("forward_" #dtype "_d" #head_dim "_v" #value_dim "_" #path "_s" #simdgroups "_r" #row_tiles  \
                       "_k" #block_keys)]] [[kernel]]                                                               \
  decltype(forward_##path<dtype, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys>)                   \
      forward_##path<dtype, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys>;

}  // namespace mfa
