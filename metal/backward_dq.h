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

// Where a threadgroup works, and its heads' rows.
template <typename T>
struct QueryTile {
  int head, head_dim;
  Sequence sequence;
  int first_row;
  HeadRows<T> queries, grad_outs, keys, values;
  long first_index;  // of the sequence's rows, in tensors of floats

  QueryTile(constant AttentionParams& params, Tile tile, const device T* query, const device T* key,
            const device T* value, const device T* grad_out, int head_, int block_queries, int head_dim_, int value_dim)
      : head(head_),
        head_dim(head_dim_),
        sequence(tile.sequence),
        first_row(tile.index * block_queries),
        queries(query_rows(query, params.query_strides, sequence, head, head_dim)),
        grad_outs(query_rows(grad_out, params.grad_out_strides, sequence, head, value_dim)),
        keys(key_rows(key, params.key_strides, sequence, head / params.group_size, head_dim)),
        values(key_rows(value, params.value_strides, sequence, head / params.group_size, value_dim)),
        first_index(first_row_index(params, sequence, head)) {}
};

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys>
struct BackwardQueries {
  static constant constexpr Own kOperands = kOwn;
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kKeyTiles = kBlockKeys / kFragment;

  Fragment<float> grad_query[kRowTiles][kHeadDim / kFragment];
  Fragment<float> ds[kRowTiles][kKeyTiles];  // of the block: S, then dS
  bool refines;
  OwnOperand<T, kOwn, kRowTiles, kHeadDim, OwnRows<T, kRowTiles>> query;
  OwnOperand<T, kOwn, kRowTiles, kValueDim, OwnRows<T, kRowTiles>> grad_out;
  float lse[kRowTiles], delta[kRowTiles];
  float alibi[kRowTiles];  // this lane's part of sum over keys of dS * d score / d slope
  Lane lane;
  View view;
  Sequence sequence;
  int first_row;

  BackwardQueries(constant AttentionParams& params, QueryTile<T> tile, const device float2* statistics, int first_row_,
                  Lane lane_)
      : query({tile.queries, first_row_, lane_}, lane_),
        grad_out({tile.grad_outs, first_row_, lane_}, lane_),
        lane(lane_),
        view(view_of_queries(params, tile.sequence, first_row_, first_row_ + kRows)),
        sequence(tile.sequence),
        first_row(first_row_) {
    clear(grad_query);
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const int row = first_row + r * kFragment + lane.row;
      const float2 row_statistics =
          row < sequence.query_length ? (statistics + tile.first_index)[row] : float2(kUnseenLse, 0);
      lse[r] = row_statistics.x;
      delta[r] = row_statistics.y;
      alibi[r] = 0;
    }
  }

  // S.
  template <typename Keys>
  void multiply_keys(Keys keys) {
    multiply_transposed<T, kHeadDim>(ds, query.operand, keys, lane);
  }

  // dP = dO V'.
  template <typename Values>
  void multiply_values(Values values, thread Fragment<float> (&dp)[kRowTiles][kKeyTiles]) {
    multiply_transposed<T, kValueDim>(dp, grad_out.operand, values, lane);
  }

  // dS = P (dP - delta), P of S. kIsOpen: every query is known to see the whole block.
  template <bool kIsOpen>
  void make_score_gradient(constant AttentionParams& params, Rules<T> rules,
                           thread Fragment<float> (&dp)[kRowTiles][kKeyTiles], int first_key) {
    const bool masked = !kIsOpen && (!has_window || !view.sees_all(first_key, kBlockKeys));
    float largest = 0;
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
        if (kMayRefine<T>) {
          largest = max(largest, max(p.x, p.y));
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
    refines = needs_refinement<T>(largest, rules.dropout);
  }

  // dQ += dS K.
  template <typename Keys>
  void add_queries(Keys keys) {
    multiply_accumulate<T, kHeadDim>(grad_query, ds, keys, lane, refines);
  }

  // `first_dim` is that of a slice of D, of which this is one.
  void store(constant AttentionParams& params, device T* query_tensor, device float* grad_alibi, QueryTile<T> tile,
             int first_dim = 0) {
    float factor[kRowTiles];
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      factor[r] = params.scale;
      if (wants_grad_alibi && first_dim == 0) {
        const float sum = row_sum(alibi[r]);
        const int row = first_row + r * kFragment + lane.row;
        if (lane.column == 0 && row < sequence.query_length) {
          grad_alibi[tile.first_index + row] = sum;
        }
      }
    }
    store_rows<T, kHeadDim>(query_tensor + (uint(sequence.index) * params.grad_query_strides[0] +
                                            uint(tile.head) * params.grad_query_strides[1] +
                                            uint(sequence.first_query) * params.grad_query_strides[2] + first_dim),
                            params.grad_query_strides[2], first_row, sequence.query_length, tile.head_dim, grad_query,
                            factor, lane);
  }
};

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq_staged(
    BACKWARD_DQ_ARGUMENTS, ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kRowTiles * kFragment;
  typedef StagedTwice<T, kHeadDim> Keys;
  typedef StagedRows<T, kValueDim, pairs> Values;
  threadgroup uint4
      memory[backward_dq_threadgroup_bytes(staged, kHeadDim, kValueDim, kSimdgroups, kRowTiles, kBlockKeys, sizeof(T)) /
             16];
  threadgroup T* paired_keys = (threadgroup T*)memory;
  threadgroup T* keys = paired_keys + kBlockKeys * Keys::kPairedStride;
  threadgroup T* values = keys + kBlockKeys * Keys::kPlainStride;

  const QueryTile<T> tile(params,
                          query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y,
                                     kSimdgroups * kRows),
                          query, key, value, grad_out, position.x, kSimdgroups * kRows,
                          is_exact_head ? kHeadDim : params.head_dim, is_exact_head ? kValueDim : params.value_dim);
  if (tile.sequence.query_length == 0) {
    return;  // a threadgroup without work: there is not even a last row to read
  }
  BackwardQueries<T, kOwn, kHeadDim, kValueDim, kRowTiles, kBlockKeys> rows(
      params, tile, statistics, tile.first_row + simdgroup * kRows, Lane(lane_index));
  const Rules<T> rules(params, tile.sequence, bias, mask_classes, alibi_slopes, rng_state, tile.head);
  thread const MaskBlocks& blocks = rules.blocks;

  const View view = view_of_queries(params, tile.sequence, tile.first_row, tile.first_row + kSimdgroups * kRows);
  const Share<T, kBlockKeys, kHeadDim, Keys::kNeighbours, kThreads> key_share(tile.keys, thread_index);
  const Share<T, kBlockKeys, kValueDim, 2, kThreads> value_share(tile.values, thread_index);
  bool is_first = true;
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, tile.first_row); !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    if (walk.template classify<kSimdgroups * kRows, kBlockKeys>(blocks, tile.first_row, first_key) == kHidden) {
      continue;
    }
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    Keys::stage(paired_keys, true, keys, true, key_share, first_key);
    stage_pairs(values, value_share, first_key);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(blocks, rows.first_row, first_key);
    if (rows.view.sees(first_key, kBlockKeys) && mask_class != kHidden) {
      const Keys staged_keys(paired_keys, keys);
      Fragment<float> dp[kRowTiles][kBlockKeys / kFragment];
      rows.multiply_keys(staged_keys);
      rows.multiply_values(Values{values}, dp);
      rows.template make_score_gradient<false>(params, rules.in_block(mask_class, walk), dp, first_key);
      rows.add_queries(staged_keys);
    }
  }
  rows.store(params, grad_query, grad_alibi, tile);
}

}  // namespace mfa
