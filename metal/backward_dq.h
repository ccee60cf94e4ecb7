// dQ = scale dS K, dS recomputed. One threadgroup per (query head, query tile, batch); a SIMD-group owns kRowTiles * 8
// queries and keeps their dQ in registers.
//
//   for each key block that a row of the tile sees:
//     P = exp2(scale Q K' - lse), dP = dO V', dS = P (dP - delta)
//     dQ += dS K
//   store scale dQ
#pragma once

#include "backward.h"

namespace mfa {

// A SIMD-group's own rows of Q or dO: in registers for the whole kernel (held), or read again for every block (reread).
template <typename T, Own kOwn, int kRowTiles, int kSets>
struct OwnOperand {
  HeldRows<T, kRowTiles, kSets> operand;

  OwnOperand(GuardedRows<T> rows, Lane lane) { operand.load(rows, lane); }
};

template <typename T, int kRowTiles, int kSets>
struct OwnOperand<T, reread, kRowTiles, kSets> {
  ReadRows<T, GuardedRows<T>> operand;

  OwnOperand(GuardedRows<T> rows, Lane) : operand{rows} {}
};

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys>
struct BackwardQueries {
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kKeyTiles = kBlockKeys / kFragment;
  static constant constexpr int kHeadSets = kHeadDim / kSetWidth;
  static constant constexpr int kValueSets = kValueDim / kSetWidth;

  Fragment<float> grad_query[kRowTiles][kHeadSets * kSetFragments];
  OwnOperand<T, kOwn, kRowTiles, kHeadSets> query;
  OwnOperand<T, kOwn, kRowTiles, kValueSets> grad_out;
  float lse[kRowTiles], delta[kRowTiles];
  float alibi[kRowTiles];  // this lane's part of sum over keys of dS * d score / d slope
  Lane lane;
  View view;
  int first_row;

  // `statistics` starts at the head's first row.
  BackwardQueries(constant AttentionParams& params, GuardedRows<T> queries, GuardedRows<T> grad_outs,
                  const device float2* statistics, int first_row_, Lane lane_)
      : query(queries, lane_),
        grad_out(grad_outs, lane_),
        lane(lane_),
        view(view_of_queries(params, first_row_, first_row_ + kRows)),
        first_row(first_row_) {
    clear(grad_query);
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
      const int row = first_row + r * kFragment + lane.row;
      const float2 row_statistics = row < params.query_length ? statistics[row] : float2(kUnseenLse, 0);
      lse[r] = row_statistics.x;
      delta[r] = row_statistics.y;
      alibi[r] = 0;
    }
  }

  template <typename Keys, typename Values>
  void add_block(constant AttentionParams& params, Scores<T> scores, Dropout dropout, Keys keys, Values values,
                 int first_key) {
    Fragment<float> ds[kRowTiles][kKeyTiles];
    Fragment<float> dp[kRowTiles][kKeyTiles];
    multiply_transposed<T, kHeadSets>(ds, query.operand, keys, lane);
    multiply_transposed<T, kValueSets>(dp, grad_out.operand, values, lane);
    const bool masked = !view.sees_all(first_key, kBlockKeys);
#pragma unroll
    for (short r = 0; r < kRowTiles; ++r) {
      const int query = first_row + r * kFragment + lane.row;
      const Range seen = visible_keys(params, query);
#pragma unroll
      for (short n = 0; n < kKeyTiles; ++n) {
        const int key = first_key + n * kFragment + lane.column;
        float2 derivative;
        float2 p = probability(params, scores, elements(ds[r][n]), int2(query), int2(key, key + 1), float2(lse[r]),
                               derivative);
        if (masked) {
          p = float2(seen.has(key) ? p.x : 0, seen.has(key + 1) ? p.y : 0);
        }
        float2 grad = elements(dp[r][n]);
        if (has_dropout) {
          grad *= dropout.of_keys(query, key);
        }
        grad = p * (grad - delta[r]);
        if (wants_grad_alibi) {
          const int diagonal = query + params.key_length - params.query_length;
          alibi[r] -= dot(grad, float2(abs(diagonal - int2(key, key + 1))));
        }
        if (has_softcap) {
          grad *= derivative;
        }
        elements(ds[r][n]) = grad;
      }
    }
    multiply_accumulate<T, kHeadSets>(grad_query, ds, keys, lane);
  }
};

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq(
    const device T* query [[buffer(kQuery)]], const device T* key [[buffer(kKey)]],
    const device T* value [[buffer(kValue)]], const device T* grad_out [[buffer(kGradOut)]],
    const device float2* statistics [[buffer(kStatistics)]], device T* grad_query [[buffer(kGradQuery)]],
    const device uchar* bias [[buffer(kBias), function_constant(has_bias)]],
    const device float* alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],
    const device uint* rng_state [[buffer(kRngState), function_constant(has_dropout)]],
    device float* grad_alibi [[buffer(kGradAlibi), function_constant(wants_grad_alibi)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    uint3 grid [[threadgroups_per_grid]], ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane_index [[thread_index_in_simdgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kRowTiles * kFragment;
  typedef StagedRows<T, kHeadDim> Keys;
  typedef StagedRows<T, kValueDim> Values;
  threadgroup uint4 memory[forward_threadgroup_bytes(staged, split, kHeadDim, kValueDim, kSimdgroups * kRows,
                                                     kBlockKeys, sizeof(T)) / 16];
  threadgroup T* keys = (threadgroup T*)memory;
  threadgroup T* values = keys + kBlockKeys * Keys::kStride;

  const int head = position.x;
  const int batch = position.z;
  const int key_head = head / params.group_size;
  const int tile = params.heavy_first ? grid.y - 1 - position.y : position.y;
  const int first_tile_row = tile * kSimdgroups * kRows;
  const int first_row = first_tile_row + simdgroup * kRows;
  const int valid_rows = params.query_length - first_row;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const device T* queries = query + batch * params.query_strides[0] + head * params.query_strides[1];
  const device T* grad_outs = grad_out + batch * params.grad_out_strides[0] + head * params.grad_out_strides[1];
  const device T* head_keys = key + batch * params.key_strides[0] + key_head * params.key_strides[1];
  const device T* head_values = value + batch * params.value_strides[0] + key_head * params.value_strides[1];
  BackwardQueries<T, kOwn, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(
      params,
      {queries + first_row * params.query_strides[2], long(params.query_strides[2]), valid_rows, head_dim},
      {grad_outs + first_row * params.grad_out_strides[2], long(params.grad_out_strides[2]), valid_rows, value_dim},
      statistics + (long(batch) * params.query_heads + head) * params.query_length, first_row, Lane(lane_index));

  const Scores<T> scores(params, bias, alibi_slopes, batch, head);
  const Dropout dropout(params, rng_state, batch * params.query_heads + head);
  const View view = view_of_queries(params, first_tile_row, first_tile_row + kSimdgroups * kRows);
  const int begin = view.first_block(kBlockKeys);
  const int end = view.end_block(kBlockKeys);
  for (int block = begin; block < end; ++block) {
    const int first_key = block * kBlockKeys;
    const int valid = params.key_length - first_key;
    if (block > begin) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    stage_rows<T, kBlockKeys, kHeadDim, kThreads>(
        keys,
        GuardedRows<T>{head_keys + first_key * params.key_strides[2], long(params.key_strides[2]), valid, head_dim},
        thread_index);
    stage_rows<T, kBlockKeys, kValueDim, kThreads>(
        values,
        GuardedRows<T>{head_values + first_key * params.value_strides[2], long(params.value_strides[2]), valid,
                       value_dim},
        thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (rows.view.sees(first_key, kBlockKeys)) {
      rows.add_block(params, scores, dropout, Keys{keys}, Values{values}, first_key);
    }
  }

  float factor[kRowTiles];
#pragma unroll
  for (short r = 0; r < kRowTiles; ++r) {
    factor[r] = params.scale;
    if (wants_grad_alibi) {
      const float sum = row_sum(rows.alibi[r]);
      const int row = first_row + r * kFragment + rows.lane.row;
      if (rows.lane.column == 0 && row < params.query_length) {
        grad_alibi[(long(batch) * params.query_heads + head) * params.query_length + row] = sum;
      }
    }
  }
  store_rows<T, kHeadDim / kSetWidth>(
      grad_query + batch * params.grad_query_strides[0] + head * params.grad_query_strides[1] +
          first_row * params.grad_query_strides[2],
      params.grad_query_strides[2], valid_rows, head_dim, rows.grad_query, factor, rows.lane);
}

#define BACKWARD_DQ(dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys)                                                              \
  template [[host_name("backward_dq_" #dtype "_d" #head_dim "_v" #value_dim "_" #own "_s" #simdgroups "_r" #row_tiles "_k" #block_keys)]] [[kernel]] \
  decltype(backward_dq<dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys>)                                                          \
      backward_dq<dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys>;

}  // namespace mfa
