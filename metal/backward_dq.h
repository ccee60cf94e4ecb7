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

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys>
struct BackwardQueries {
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kKeyTiles = kBlockKeys / kFragment;

  Fragment<float> grad_query[kRowTiles][kHeadDim / kFragment];
  OwnOperand<T, kOwn, kRowTiles, kHeadDim, OwnRows<T, kRowTiles>> query;
  OwnOperand<T, kOwn, kRowTiles, kValueDim, OwnRows<T, kRowTiles>> grad_out;
  float lse[kRowTiles], delta[kRowTiles];
  float alibi[kRowTiles];  // this lane's part of sum over keys of dS * d score / d slope
  Lane lane;
  View view;
  Sequence sequence;
  int first_row;

  // `statistics` starts at the sequence's first row.
  BackwardQueries(constant AttentionParams& params, Sequence sequence_, HeadRows<T> queries, HeadRows<T> grad_outs,
                  const device float2* statistics, int first_row_, Lane lane_)
      : query({queries, first_row_, lane_}, lane_),
        grad_out({grad_outs, first_row_, lane_}, lane_),
        lane(lane_),
        view(view_of_queries(params, sequence_, first_row_, first_row_ + kRows)),
        sequence(sequence_),
        first_row(first_row_) {
    clear(grad_query);
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const int row = first_row + r * kFragment + lane.row;
      const float2 row_statistics = row < sequence.query_length ? statistics[row] : float2(kUnseenLse, 0);
      lse[r] = row_statistics.x;
      delta[r] = row_statistics.y;
      alibi[r] = 0;
    }
  }

  template <typename Keys, typename Values>
  void add_block(constant AttentionParams& params, Rules<T> rules, Keys keys, Values values, int first_key) {
    Fragment<float> ds[kRowTiles][kKeyTiles];
    Fragment<float> dp[kRowTiles][kKeyTiles];
    multiply_transposed<T, kHeadDim>(ds, query.operand, keys, lane);
    multiply_transposed<T, kValueDim>(dp, grad_out.operand, values, lane);
    const bool masked = !has_window || !view.sees_all(first_key, kBlockKeys);
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const int query = first_row + r * kFragment + lane.row;
      const Range seen = visible_keys(params, sequence, query);
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; ++n) {
        const int key = first_key + lane.column_of(n);
        float2 derivative;
        float2 p = probability(params, rules, ds[r][n], int2(query), int2(key, key + 1), float2(lse[r]), derivative);
        if (masked) {
          p = seen.keep(p, key);
        }
        float2 grad = dp[r][n];
        if (has_dropout) {
          grad *= rules.dropout.of_keys(query, key);
        }
        grad = p * (grad - delta[r]);
        if (wants_grad_alibi) {
          const int diagonal = query + sequence.key_length - sequence.query_length;
          alibi[r] -= dot(grad, float2(abs(diagonal - int2(key, key + 1))));
        }
        if (has_softcap) {
          grad *= derivative;
        }
        ds[r][n] = grad;
      }
    }
    multiply_accumulate<T, kHeadDim>(grad_query, ds, keys, lane);
  }
};

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq(
    MFA_TENSOR_ARGUMENTS, const device T* grad_out [[buffer(kGradOut)]],
    const device float2* statistics [[buffer(kStatistics)]], device T* grad_query [[buffer(kGradQuery)]],
    device float* grad_alibi [[buffer(kGradAlibi), function_constant(wants_grad_alibi)]], MFA_SCORE_ARGUMENTS,
    MFA_LAYOUT_ARGUMENTS, MFA_PLACE_ARGUMENTS, uint3 grid [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kRowTiles * kFragment;
  typedef StagedTwice<T, kHeadDim> Keys;
  typedef StagedRows<T, kValueDim, pairs> Values;
  threadgroup uint4 memory[backward_dq_threadgroup_bytes(kHeadDim, kValueDim, kBlockKeys, sizeof(T)) / 16];
  threadgroup T* paired_keys = (threadgroup T*)memory;
  threadgroup T* keys = paired_keys + kBlockKeys * Keys::kPairedStride;
  threadgroup T* values = keys + kBlockKeys * Keys::kPlainStride;

  const Tile tile = query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y,
                               kSimdgroups * kRows);
  const Sequence sequence = tile.sequence;
  const int head = position.x;
  const int key_head = head / params.group_size;
  if (sequence.query_length == 0) {
    return;  // a threadgroup without work: there is not even a last row to read
  }
  const int first_tile_row = tile.index * kSimdgroups * kRows;
  const int first_row = first_tile_row + simdgroup * kRows;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const HeadRows<T> queries = query_rows(query, params.query_strides, sequence, head, head_dim);
  const HeadRows<T> grad_outs = query_rows(grad_out, params.grad_out_strides, sequence, head, value_dim);
  const HeadRows<T> head_keys = key_rows(key, params.key_strides, sequence, key_head, head_dim);
  const HeadRows<T> head_values = key_rows(value, params.value_strides, sequence, key_head, value_dim);
  const long first_index = first_row_index(params, sequence, head);
  BackwardQueries<T, kOwn, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(
      params, sequence, queries, grad_outs, statistics + first_index, first_row, Lane(lane_index));
  const Rules<T> rules(params, sequence, bias, mask_classes, alibi_slopes, rng_state, head);
  thread const MaskBlocks& blocks = rules.blocks;

  const View view = view_of_queries(params, sequence, first_tile_row, first_tile_row + kSimdgroups * kRows);
  const Share<T, kBlockKeys, kHeadDim, Keys::kNeighbours, kThreads> key_share(head_keys, thread_index);
  const Share<T, kBlockKeys, kValueDim, 2, kThreads> value_share(head_values, thread_index);
  bool is_first = true;
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, first_tile_row); !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    if (walk.template classify<kSimdgroups * kRows, kBlockKeys>(blocks, first_tile_row, first_key) == kHidden) {
      continue;
    }
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    Keys::stage(paired_keys, true, keys, true, key_share, first_key);
    stage_pairs(values, value_share, first_key);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(blocks, first_row, first_key);
    if (rows.view.sees(first_key, kBlockKeys) && mask_class != kHidden) {
      rows.add_block(params, rules.in_block(mask_class, walk), Keys(paired_keys, keys), Values{values}, first_key);
    }
  }

  float factor[kRowTiles];
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    factor[r] = params.scale;
    if (wants_grad_alibi) {
      const float sum = row_sum(rows.alibi[r]);
      const int row = first_row + r * kFragment + rows.lane.row;
      if (rows.lane.column == 0 && row < sequence.query_length) {
        grad_alibi[first_index + row] = sum;
      }
    }
  }
  store_rows<T, kHeadDim>(
      grad_query + (uint(sequence.index) * params.grad_query_strides[0] + uint(head) * params.grad_query_strides[1] +
                    uint(sequence.first_query) * params.grad_query_strides[2]),
      params.grad_query_strides[2], first_row, sequence.query_length, head_dim, rows.grad_query, factor, rows.lane);
}

#define BACKWARD_DQ(dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys)                               \
  template [[host_name("backward_dq_" #dtype "_d" #head_dim "_v" #value_dim "_" #own "_s" #simdgroups "_r" #row_tiles \
                       "_k" #block_keys)]] [[kernel]]                                                                 \
  decltype(backward_dq<dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys>)                           \
      backward_dq<dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys>;

}  // namespace mfa
