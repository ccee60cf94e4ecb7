// dV = P' dO and dK = scale dS' Q, P recomputed from the log-sum-exp. One threadgroup per (key head, key tile, batch); a
// SIMD-group owns kRowTiles * 8 keys and keeps their dK and dV in registers.
//
//   for each query head of the group, for each query block that sees a key of the tile:
//     S' = K Q', P' = exp2(scale S' - lse)        transposed: rows are keys, columns queries
//     dV += P' dO
//     dP' = V dO', dS' = P' (dP' - delta)
//     dK += dS' Q                                 and, in five-GEMM mode, dS' goes to scratch for backward_dq_from_ds
//   store dV, scale dK
#pragma once

#include "backward.h"
#include "score_gradient.h"

namespace mfa {

template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockQueries>
struct BackwardKeys {
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kQueryTiles = kBlockQueries / kFragment;
  static constant constexpr int kHeadSets = kHeadDim / kSetWidth;
  static constant constexpr int kValueSets = kValueDim / kSetWidth;

  Fragment<float> grad_key[kRowTiles][kHeadSets * kSetFragments];
  Fragment<float> grad_value[kRowTiles][kValueSets * kSetFragments];
  ReadRows<T, GuardedRows<T>> key, value;  // read again for every block: dK and dV need the registers
  Lane lane;
  View view;
  int first_key;

  BackwardKeys(constant AttentionParams& params, GuardedRows<T> keys, GuardedRows<T> values, int first_key_,
               ushort lane_index)
      : key{keys},
        value{values},
        lane(lane_index),
        view(view_of_keys(params, first_key_, first_key_ + kRows)),
        first_key(first_key_) {
    clear(grad_key);
    clear(grad_value);
  }

  template <typename Queries, typename GradOuts>
  void add_block(constant AttentionParams& params, Scores<T> scores, Dropout dropout, Queries queries,
                 GradOuts grad_outs, const threadgroup float2* statistics, int first_query,
                 ScoreGradient<T> score_gradient) {
    Fragment<float> p[kRowTiles][kQueryTiles];
    float2 derivative[kRowTiles][kQueryTiles];
    multiply_transposed<T, kHeadSets>(p, key, queries, lane);
    const bool masked = !view.sees_all(first_query, kBlockQueries);
    float2 delta[kQueryTiles];
#pragma unroll
    for (short n = 0; n < kQueryTiles; ++n) {
      // (lse, delta) of this lane's two queries.
      const float4 pair = *(const threadgroup float4*)(statistics + n * kFragment + lane.column);
      delta[n] = pair.yw;
#pragma unroll
      for (short r = 0; r < kRowTiles; ++r) {
        const int key_row = first_key + r * kFragment + lane.row;
        const int query = first_query + n * kFragment + lane.column;
        float2 x = probability(params, scores, elements(p[r][n]), int2(query, query + 1), int2(key_row), pair.xz,
                               derivative[r][n]);
        if (masked) {
          const Range seen = key_row < params.key_length ? visible_queries(params, key_row) : Range{0, -1};
          x = float2(seen.has(query) ? x.x : 0, seen.has(query + 1) ? x.y : 0);
        }
        elements(p[r][n]) = x;
      }
    }
    if (wants_grad_value && !has_dropout) {
      multiply_accumulate<T, kValueSets>(grad_value, p, grad_outs, lane);
    }
    if (wants_grad_value && has_dropout) {
      Fragment<float> kept[kRowTiles][kQueryTiles];
#pragma unroll
      for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (short n = 0; n < kQueryTiles; ++n) {
          elements(kept[r][n]) = elements(p[r][n]) * kept_factor(dropout, first_query, r, n);
        }
      }
      multiply_accumulate<T, kValueSets>(grad_value, kept, grad_outs, lane);
    }
    if (wants_grad_key) {
      Fragment<float> dp[kRowTiles][kQueryTiles];
      multiply_transposed<T, kValueSets>(dp, value, grad_outs, lane);
#pragma unroll
      for (short n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (short r = 0; r < kRowTiles; ++r) {
          float2 grad = elements(dp[r][n]);
          if (has_dropout) {
            grad *= kept_factor(dropout, first_query, r, n);
          }
          grad = elements(p[r][n]) * (grad - delta[n]);
          if (has_softcap) {
            grad *= derivative[r][n];
          }
          elements(p[r][n]) = grad;
        }
      }
      if (writes_score_gradient) {
#pragma unroll
        for (short r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (short n = 0; n < kQueryTiles; ++n) {
            score_gradient.store(p[r][n], first_key / kFragment + r, first_query / kFragment + n);
          }
        }
      }
      multiply_accumulate<T, kHeadSets>(grad_key, p, queries, lane);
    }
  }

  // Drawn twice rather than kept: registers are what this kernel is short of.
  float2 kept_factor(Dropout dropout, int first_query, short r, short n) const {
    return dropout.of_queries(first_query + n * kFragment + lane.column, first_key + r * kFragment + lane.row);
  }
};

template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockQueries>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dkdv(
    const device T* query [[buffer(kQuery)]], const device T* key [[buffer(kKey)]],
    const device T* value [[buffer(kValue)]], const device T* grad_out [[buffer(kGradOut)]],
    const device float2* statistics [[buffer(kStatistics)]],
    device T* grad_key [[buffer(kGradKey), function_constant(wants_grad_key)]],
    device T* grad_value [[buffer(kGradValue), function_constant(wants_grad_value)]],
    device T* score_gradient [[buffer(kScoreGradient), function_constant(writes_score_gradient)]],
    const device uchar* bias [[buffer(kBias), function_constant(has_bias)]],
    const device float* alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],
    const device uint* rng_state [[buffer(kRngState), function_constant(has_dropout)]],
    constant AttentionParams& params [[buffer(kParams)]], constant int& first_unit [[buffer(kFirstUnit)]],
    uint3 position [[threadgroup_position_in_grid]], ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane_index [[thread_index_in_simdgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kRowTiles * kFragment;
  typedef StagedRows<T, kHeadDim> Queries;
  typedef StagedRows<T, kValueDim> GradOuts;
  threadgroup uint4 memory[backward_dkdv_threadgroup_bytes(kHeadDim, kValueDim, kBlockQueries, sizeof(T)) / 16];
  threadgroup float2* row_statistics = (threadgroup float2*)memory;
  threadgroup T* queries = (threadgroup T*)(row_statistics + kBlockQueries);
  threadgroup T* grad_outs = queries + kBlockQueries * Queries::kStride;

  const int unit = first_unit + position.x;  // (batch, key head)
  const int batch = unit / params.key_heads;
  const int key_head = unit % params.key_heads;
  const int first_tile_key = position.y * kSimdgroups * kRows;
  const int first_key = first_tile_key + simdgroup * kRows;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const device T* keys = key + batch * params.key_strides[0] + key_head * params.key_strides[1];
  const device T* values = value + batch * params.value_strides[0] + key_head * params.value_strides[1];
  const int valid_keys = params.key_length - first_key;
  BackwardKeys<T, kHeadDim, kValueDim, kRowTiles, kBlockQueries> rows(
      params, {keys + first_key * params.key_strides[2], long(params.key_strides[2]), valid_keys, head_dim},
      {values + first_key * params.value_strides[2], long(params.value_strides[2]), valid_keys, value_dim}, first_key,
      lane_index);

  const View view = view_of_keys(params, first_tile_key, first_tile_key + kSimdgroups * kRows);
  const int begin = view.first_block(kBlockQueries);
  const int end = view.end_block(kBlockQueries);
  bool is_first = true;
  for (int member = 0; member < params.group_size; ++member) {
    const int head = key_head * params.group_size + member;
    const device T* head_query = query + batch * params.query_strides[0] + head * params.query_strides[1];
    const device T* head_grad = grad_out + batch * params.grad_out_strides[0] + head * params.grad_out_strides[1];
    const device float2* head_statistics =
        statistics + (long(batch) * params.query_heads + head) * params.query_length;
    const ScoreGradient<T> blobs = {score_gradient, params, position.x * params.group_size + member, lane_index};
    const Scores<T> scores(params, bias, alibi_slopes, batch, head);
    const Dropout dropout(params, rng_state, batch * params.query_heads + head);
    for (int block = begin; block < end; ++block) {
      const int first_query = block * kBlockQueries;
      const int valid = params.query_length - first_query;
      if (!is_first) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      is_first = false;
      const GuardedRows<T> next_queries = {head_query + first_query * params.query_strides[2],
                                           long(params.query_strides[2]), valid, head_dim};
      const GuardedRows<T> next_grads = {head_grad + first_query * params.grad_out_strides[2],
                                         long(params.grad_out_strides[2]), valid, value_dim};
      stage_rows<T, kBlockQueries, kHeadDim, kThreads>(queries, next_queries, thread_index);
      stage_rows<T, kBlockQueries, kValueDim, kThreads>(grad_outs, next_grads, thread_index);
      if (thread_index < kBlockQueries) {
        row_statistics[thread_index] =
            thread_index < valid ? head_statistics[first_query + thread_index] : float2(kUnseenLse, 0);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (rows.view.sees(first_query, kBlockQueries)) {
        rows.add_block(params, scores, dropout, Queries{queries}, GradOuts{grad_outs}, row_statistics, first_query, blobs);
      }
    }
  }

  float key_factor[kRowTiles], value_factor[kRowTiles];
#pragma unroll
  for (short r = 0; r < kRowTiles; ++r) {
    key_factor[r] = params.scale;
    value_factor[r] = 1;
  }
  if (wants_grad_key) {
    store_rows<T, kHeadDim / kSetWidth>(grad_key + batch * params.grad_key_strides[0] +
                                            key_head * params.grad_key_strides[1] + first_key * params.grad_key_strides[2],
                                        params.grad_key_strides[2], valid_keys, head_dim, rows.grad_key, key_factor,
                                        rows.lane);
  }
  if (wants_grad_value) {
    store_rows<T, kValueDim / kSetWidth>(
        grad_value + batch * params.grad_value_strides[0] + key_head * params.grad_value_strides[1] +
            first_key * params.grad_value_strides[2],
        params.grad_value_strides[2], valid_keys, value_dim, rows.grad_value, value_factor, rows.lane);
  }
}

#define BACKWARD_DKDV(dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries)                                                          \
  template [[host_name("backward_dkdv_" #dtype "_d" #head_dim "_v" #value_dim "_s" #simdgroups "_r" #row_tiles "_q" #block_queries)]] [[kernel]] \
  decltype(backward_dkdv<dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries>)                                                      \
      backward_dkdv<dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries>;

}  // namespace mfa
