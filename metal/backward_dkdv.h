// dV = P' dO and dK = scale dS' Q, P recomputed from the log-sum-exp. One threadgroup per (batch and key head, key
// tile); a SIMD-group owns kRowTiles * 8 keys and keeps their dK and dV in registers.
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

  Fragment<float> grad_key[kRowTiles][kHeadDim / kFragment];
  Fragment<float> grad_value[kRowTiles][kValueDim / kFragment];
  // Read again for every block: dK and dV need the registers.
  ReadRows<T, kHeadDim, OwnRows<T, kRowTiles>> key;
  ReadRows<T, kValueDim, OwnRows<T, kRowTiles>> value;
  Lane lane;
  Sequence sequence;
  View view;
  int first_key;

  BackwardKeys(constant AttentionParams& params, Sequence sequence_, HeadRows<T> keys, HeadRows<T> values,
               int first_key_, Lane lane_)
      : key{{keys, first_key_, lane_}},
        value{{values, first_key_, lane_}},
        lane(lane_),
        sequence(sequence_),
        view(view_of_keys(params, sequence_, first_key_, first_key_ + kRows)),
        first_key(first_key_) {
    clear(grad_key);
    clear(grad_value);
  }

  template <typename Queries, typename GradOuts>
  void add_block(constant AttentionParams& params, Rules<T> rules, Queries queries, GradOuts grad_outs,
                 const threadgroup float* lse, const threadgroup float* delta, int first_query,
                 ScoreGradient score_gradient) {
    Fragment<float> p[kRowTiles][kQueryTiles];
    float2 derivative[kRowTiles][kQueryTiles];
    multiply_transposed<T, kHeadDim>(p, key, queries, lane);
    const bool masked = !has_window || !view.sees_all(first_query, kBlockQueries);
    MFA_UNROLL
    for (short n = 0; n < kQueryTiles; ++n) {
      const float2 column_lse = *(const threadgroup float2*)(lse + Lane::column_step(n) + lane.first_column());
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; ++r) {
        const int key_row = first_key + r * kFragment + lane.row;
        const int query = first_query + lane.column_of(n);
        float2 x =
            probability(params, rules, p[r][n], int2(query, query + 1), int2(key_row), column_lse, derivative[r][n]);
        if (masked) {
          x = visible_queries(params, sequence, key_row).keep(x, query);
        }
        p[r][n] = x;
      }
    }
    if (wants_grad_value && !has_dropout) {
      multiply_accumulate<T, kValueDim>(grad_value, p, grad_outs, lane);
    }
    if (wants_grad_value && has_dropout) {
      Fragment<float> kept[kRowTiles][kQueryTiles];
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; ++r) {
        MFA_UNROLL
        for (short n = 0; n < kQueryTiles; ++n) {
          kept[r][n] = p[r][n] * kept_factor(rules.dropout, first_query, r, n);
        }
      }
      multiply_accumulate<T, kValueDim>(grad_value, kept, grad_outs, lane);
    }
    if (wants_grad_key) {
      Fragment<float> dp[kRowTiles][kQueryTiles];
      multiply_transposed<T, kValueDim>(dp, value, grad_outs, lane);
      MFA_UNROLL
      for (short n = 0; n < kQueryTiles; ++n) {
        const float2 column_delta = *(const threadgroup float2*)(delta + Lane::column_step(n) + lane.first_column());
        MFA_UNROLL
        for (short r = 0; r < kRowTiles; ++r) {
          float2 grad = dp[r][n];
          if (has_dropout) {
            grad *= kept_factor(rules.dropout, first_query, r, n);
          }
          grad = p[r][n] * (grad - column_delta);
          if (has_softcap) {
            grad *= derivative[r][n];
          }
          p[r][n] = grad;
        }
      }
      if (writes_score_gradient) {
        MFA_UNROLL
        for (short r = 0; r < kRowTiles; ++r) {
          MFA_UNROLL
          for (short n = 0; n < kQueryTiles; ++n) {
            score_gradient.store(p[r][n], r, first_query / kFragment + n);
          }
        }
      }
      multiply_accumulate<T, kHeadDim>(grad_key, p, queries, lane);
    }
  }

  // Drawn twice rather than kept: registers are what this kernel is short of.
  float2 kept_factor(Dropout dropout, int first_query, short r, short n) const {
    return dropout.of_queries(first_query + lane.column_of(n), first_key + r * kFragment + lane.row);
  }
};

template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockQueries>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dkdv(
    MFA_TENSOR_ARGUMENTS, const device T* grad_out [[buffer(kGradOut)]],
    const device float2* statistics [[buffer(kStatistics)]],
    device T* grad_key [[buffer(kGradKey), function_constant(wants_grad_key)]],
    device T* grad_value [[buffer(kGradValue), function_constant(wants_grad_value)]],
    device float* score_gradient [[buffer(kScoreGradient), function_constant(writes_score_gradient)]],
    MFA_SCORE_ARGUMENTS, MFA_LAYOUT_ARGUMENTS, MFA_PLACE_ARGUMENTS, constant int& first_unit [[buffer(kFirstUnit)]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kRowTiles * kFragment;
  typedef StagedTwice<T, kHeadDim> Queries;
  typedef StagedTwice<T, kValueDim> GradOuts;
  threadgroup uint4 memory[backward_dkdv_threadgroup_bytes(kHeadDim, kValueDim, kBlockQueries, sizeof(T)) / 16];
  threadgroup float* lse = (threadgroup float*)memory;
  threadgroup float* delta = lse + kBlockQueries;
  threadgroup T* paired_queries = (threadgroup T*)(delta + kBlockQueries);
  threadgroup T* paired_grad_outs = paired_queries + kBlockQueries * Queries::kPairedStride;
  threadgroup T* queries = paired_grad_outs + kBlockQueries * GradOuts::kPairedStride;
  threadgroup T* grad_outs =
      queries + (plain_copies_take_turns(kHeadDim, kValueDim, sizeof(T)) ? 0 : kBlockQueries * Queries::kPlainStride);

  const int unit = first_unit + position.x;  // (batch, key head)
  const int key_head = unit % params.key_heads;
  const Tile tile =
      key_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, unit, position.y, kSimdgroups * kRows);
  const Sequence sequence = tile.sequence;
  const int first_tile_key = tile.index * kSimdgroups * kRows;
  const int first_key = first_tile_key + simdgroup * kRows;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const HeadRows<T> keys = key_rows(key, params.key_strides, sequence, key_head, head_dim);
  const HeadRows<T> values = key_rows(value, params.value_strides, sequence, key_head, value_dim);
  BackwardKeys<T, kHeadDim, kValueDim, kRowTiles, kBlockQueries> rows(params, sequence, keys, values, first_key,
                                                                      Lane(lane_index));

  const View view = view_of_keys(params, sequence, first_tile_key, first_tile_key + kSimdgroups * kRows);
  bool is_first = true;
  for (int member = 0; member < params.group_size; ++member) {
    const int head = key_head * params.group_size + member;
    const Share<T, kBlockQueries, kHeadDim, Queries::kNeighbours, kThreads> query_share(
        query_rows(query, params.query_strides, sequence, head, head_dim), thread_index);
    const Share<T, kBlockQueries, kValueDim, GradOuts::kNeighbours, kThreads> grad_out_share(
        query_rows(grad_out, params.grad_out_strides, sequence, head, value_dim), thread_index);
    const uint head_row = first_row_index(params, sequence, head);
    const ScoreGradient blobs(score_gradient, params, position.x * params.group_size + member, lane_index,
                              first_key / kFragment);
    const Rules<T> rules(params, sequence, bias, mask_classes, alibi_slopes, rng_state, head);
    thread const MaskBlocks& blocks = rules.blocks;
    for (BlockWalk<kBlockQueries, false> walk(rules.scores.block_mask, view, first_tile_key); !walk.is_done();
         walk.next()) {
      const int first_query = walk.first;
      if (walk.template classify<kBlockQueries, kSimdgroups * kRows>(blocks, first_query, first_tile_key) == kHidden) {
        continue;
      }
      if (!is_first) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      is_first = false;
      Queries::stage(paired_queries, true, queries, wants_grad_key, query_share, first_query);
      GradOuts::stage(paired_grad_outs, wants_grad_key, grad_outs, wants_grad_value, grad_out_share, first_query);
      if (thread_index < kBlockQueries) {
        const int row = first_query + thread_index;
        const float2 row_statistics = row < sequence.query_length ? statistics[head_row + row] : float2(kUnseenLse, 0);
        lse[thread_index] = row_statistics.x;
        delta[thread_index] = row_statistics.y;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const MaskClass mask_class = walk.template classify<kBlockQueries, kRows>(blocks, first_query, first_key);
      if (rows.view.sees(first_query, kBlockQueries) && mask_class != kHidden) {
        rows.add_block(params, rules.in_block(mask_class, walk), Queries(paired_queries, queries),
                       GradOuts(paired_grad_outs, grad_outs), lse, delta, first_query, blobs);
      }
    }
  }

  float key_factor[kRowTiles], value_factor[kRowTiles];
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    key_factor[r] = params.scale;
    value_factor[r] = 1;
  }
  if (wants_grad_key) {
    store_rows<T, kHeadDim>(
        grad_key + (uint(sequence.index) * params.grad_key_strides[0] + uint(key_head) * params.grad_key_strides[1] +
                    uint(sequence.first_key) * params.grad_key_strides[2]),
        params.grad_key_strides[2], first_key, sequence.key_length, head_dim, rows.grad_key, key_factor, rows.lane);
  }
  if (wants_grad_value) {
    store_rows<T, kValueDim>(grad_value + (uint(sequence.index) * params.grad_value_strides[0] +
                                           uint(key_head) * params.grad_value_strides[1] +
                                           uint(sequence.first_key) * params.grad_value_strides[2]),
                             params.grad_value_strides[2], first_key, sequence.key_length, value_dim, rows.grad_value,
                             value_factor, rows.lane);
  }
}

#define BACKWARD_DKDV(dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries)                        \
  template [[host_name("backward_dkdv_" #dtype "_d" #head_dim "_v" #value_dim "_s" #simdgroups "_r" #row_tiles \
                       "_q" #block_queries)]] [[kernel]]                                                       \
  decltype(backward_dkdv<dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries>)                    \
      backward_dkdv<dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries>;

}  // namespace mfa
