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

// Where a threadgroup works, and its key head's rows.
template <typename T>
struct KeyTile {
  int key_head, head_dim, value_dim;
  Sequence sequence;
  int first_key;
  HeadRows<T> keys, values;

  KeyTile(constant AttentionParams& params, Tile tile, const device T* key, const device T* value, int unit,
          int block_keys, int head_dim_, int value_dim_)
      : key_head(unit % params.key_heads),
        head_dim(head_dim_),
        value_dim(value_dim_),
        sequence(tile.sequence),
        first_key(tile.index * block_keys),
        keys(key_rows(key, params.key_strides, sequence, key_head, head_dim)),
        values(key_rows(value, params.value_strides, sequence, key_head, value_dim)) {}
};

// The statistics of a block's queries in threadgroup memory; of those that fragments have in column tile n.
struct StagedStatistics {
  const threadgroup float* lse_row;
  const threadgroup float* delta_row;
  Lane lane;

  float2 lse(short n) const { return pair(lse_row, n); }
  float2 delta(short n) const { return pair(delta_row, n); }

  float2 pair(const threadgroup float* row, short n) const {
    return *(const threadgroup float2*)(row + Lane::column_step(n) + lane.first_column());
  }
};

constant constexpr float kFlat = 1.0f / 512;  // a few units of the 11 bits that P is rounded to

template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockQueries>
struct BackwardKeys {
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kQueryTiles = kBlockQueries / kFragment;

  Fragment<float> grad_key[kRowTiles][kHeadDim / kFragment];
  Fragment<float> grad_value[kRowTiles][kValueDim / kFragment];
  // Of the block: P', then dS'; and d score / d (scale product).
  Fragment<float> p[kRowTiles][kQueryTiles];
  float2 derivative[kRowTiles][kQueryTiles];
  bool refines;
  // Read again for every block: dK and dV need the registers.
  ReadRows<T, kHeadDim, OwnRows<T, kRowTiles>> key;
  ReadRows<T, kValueDim, OwnRows<T, kRowTiles>> value;
  Lane lane;
  Sequence sequence;
  View view;
  int first_key;

  BackwardKeys(constant AttentionParams& params, KeyTile<T> tile, int first_key_, Lane lane_)
      : key{{tile.keys, first_key_, lane_}},
        value{{tile.values, first_key_, lane_}},
        lane(lane_),
        sequence(tile.sequence),
        view(view_of_keys(params, sequence, first_key_, first_key_ + kRows)),
        first_key(first_key_) {
    clear(grad_key);
    clear(grad_value);
  }

  // S'.
  template <typename Queries>
  void multiply_queries(Queries queries) {
    multiply_transposed<T, kHeadDim>(p, key, queries, lane);
  }

  // P' of it. kIsOpen: every key is known to be seen by the whole block.
  template <bool kIsOpen, typename Statistics>
  void make_probabilities(constant AttentionParams& params, Rules<T> rules, Statistics statistics, int first_query) {
    const bool masked = !kIsOpen && (!has_window || !view.sees_all(first_query, kBlockQueries));
    float largest = 0;
    MFA_UNROLL
    for (short n = 0; n < kQueryTiles; ++n) {
      const float2 lse = statistics.lse(n);
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; ++r) {
        const int key_row = first_key + r * kFragment + lane.row;
        const int query = first_query + lane.column_of(n);
        float2 x = probability(params, rules, p[r][n], int2(query, query + 1), int2(key_row), lse, derivative[r][n]);
        if (masked) {
          x = visible_queries(params, sequence, key_row).keep(x, query);
        }
        if (kMayRefine<T>) {
          largest = max(largest, max(x.x, x.y));
        }
        p[r][n] = x;
      }
    }
    refines = needs_refinement<T>(largest, rules.dropout) || (kMayRefine<T> && wants_grad_value && is_flat());
  }

  // Whether P' hardly changes from query to query: what rounding takes from it would then add up. Each lane compares
  // two that it has; those that are not seen do not count.
  bool is_flat() const {
    const float first = p[0][0].x;
    const float last = p[0][kQueryTiles - 1].y;
    return !simd_any(first > 0 && last > 0 && fabs(first - last) > kFlat * first);
  }

  // P' as dV takes it: what dropout keeps.
  void keep(Rules<T> rules, int first_query, thread Fragment<float> (&kept)[kRowTiles][kQueryTiles]) const {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kQueryTiles; ++n) {
        kept[r][n] = has_dropout ? p[r][n] * kept_factor(rules.dropout, first_query, r, n) : p[r][n];
      }
    }
  }

  // dV += P' dO.
  template <typename GradOuts>
  void add_values(Rules<T> rules, GradOuts grad_outs, int first_query) {
    if (!has_dropout) {
      multiply_accumulate<T, kValueDim>(grad_value, p, grad_outs, lane, refines);
      return;
    }
    Fragment<float> kept[kRowTiles][kQueryTiles];
    keep(rules, first_query, kept);
    multiply_accumulate<T, kValueDim>(grad_value, kept, grad_outs, lane, refines);
  }

  // dP' = V dO'.
  template <typename GradOuts>
  void multiply_grad_outs(GradOuts grad_outs, thread Fragment<float> (&dp)[kRowTiles][kQueryTiles]) {
    multiply_transposed<T, kValueDim>(dp, value, grad_outs, lane);
  }

  // dS' = P' (dP' - delta).
  template <typename Statistics>
  void make_score_gradient(Rules<T> rules, thread Fragment<float> (&dp)[kRowTiles][kQueryTiles], Statistics statistics,
                           int first_query) {
    MFA_UNROLL
    for (short n = 0; n < kQueryTiles; ++n) {
      const float2 delta = statistics.delta(n);
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; ++r) {
        float2 grad = dp[r][n];
        if (has_dropout) {
          grad *= kept_factor(rules.dropout, first_query, r, n);
        }
        grad = p[r][n] * (grad - delta);
        if (has_softcap) {
          grad *= derivative[r][n];
        }
        p[r][n] = grad;
      }
    }
  }

  void store_score_gradient(ScoreGradient score_gradient, int first_query) {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kQueryTiles; ++n) {
        score_gradient.store(p[r][n], r, first_query / kFragment + n);
      }
    }
  }

  // dK += dS' Q.
  template <typename Queries>
  void add_keys(Queries queries) {
    multiply_accumulate<T, kHeadDim>(grad_key, p, queries, lane, refines);
  }

  // Drawn twice rather than kept: registers are what this kernel is short of.
  float2 kept_factor(Dropout dropout, int first_query, short r, short n) const {
    return dropout.of_queries(first_query + lane.column_of(n), first_key + r * kFragment + lane.row);
  }

  // `first_dim` and `first_value_dim` are those of slices of D and Dv, of which these are one.
  void store(constant AttentionParams& params, device T* key_tensor, device T* value_tensor, KeyTile<T> tile,
             int first_dim = 0, int first_value_dim = 0) {
    float key_factor[kRowTiles], value_factor[kRowTiles];
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      key_factor[r] = params.scale;
      value_factor[r] = 1;
    }
    if (wants_grad_key) {
      store_rows<T, kHeadDim>(key_tensor + (uint(sequence.index) * params.grad_key_strides[0] +
                                            uint(tile.key_head) * params.grad_key_strides[1] +
                                            uint(sequence.first_key) * params.grad_key_strides[2] + first_dim),
                              params.grad_key_strides[2], first_key, sequence.key_length, tile.head_dim, grad_key,
                              key_factor, lane);
    }
    if (wants_grad_value) {
      store_rows<T, kValueDim>(
          value_tensor + (uint(sequence.index) * params.grad_value_strides[0] +
                          uint(tile.key_head) * params.grad_value_strides[1] +
                          uint(sequence.first_key) * params.grad_value_strides[2] + first_value_dim),
          params.grad_value_strides[2], first_key, sequence.key_length, tile.value_dim, grad_value, value_factor, lane);
    }
  }
};

template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockQueries>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dkdv_staged(
    BACKWARD_DKDV_ARGUMENTS,
    device float* score_gradient [[buffer(kScoreGradient), function_constant(writes_score_gradient)]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kRowTiles * kFragment;
  typedef StagedTwice<T, kHeadDim> Queries;
  typedef StagedTwice<T, kValueDim> GradOuts;
  threadgroup uint4 memory[backward_dkdv_threadgroup_bytes(staged, kHeadDim, kValueDim, kSimdgroups, kRowTiles,
                                                           kBlockQueries, sizeof(T)) /
                           16];
  threadgroup float* lse = (threadgroup float*)memory;
  threadgroup float* delta = lse + kBlockQueries;
  threadgroup T* paired_queries = (threadgroup T*)(delta + kBlockQueries);
  threadgroup T* paired_grad_outs = paired_queries + kBlockQueries * Queries::kPairedStride;
  threadgroup T* queries = paired_grad_outs + kBlockQueries * GradOuts::kPairedStride;
  threadgroup T* grad_outs =
      queries + (plain_copies_take_turns(kHeadDim, kValueDim, sizeof(T)) ? 0 : kBlockQueries * Queries::kPlainStride);

  const int unit = first_unit + position.x;  // (batch, key head)
  const KeyTile<T> tile(
      params,
      key_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, unit, position.y, kSimdgroups * kRows),
      key, value, unit, kSimdgroups * kRows, is_exact_head ? kHeadDim : params.head_dim,
      is_exact_head ? kValueDim : params.value_dim);
  const Sequence sequence = tile.sequence;
  BackwardKeys<T, kHeadDim, kValueDim, kRowTiles, kBlockQueries> rows(params, tile, tile.first_key + simdgroup * kRows,
                                                                      Lane(lane_index));

  const View view = view_of_keys(params, sequence, tile.first_key, tile.first_key + kSimdgroups * kRows);
  bool is_first = true;
  for (int member = 0; member < params.group_size; ++member) {
    const int head = tile.key_head * params.group_size + member;
    const Share<T, kBlockQueries, kHeadDim, Queries::kNeighbours, kThreads> query_share(
        query_rows(query, params.query_strides, sequence, head, tile.head_dim), thread_index);
    const Share<T, kBlockQueries, kValueDim, GradOuts::kNeighbours, kThreads> grad_out_share(
        query_rows(grad_out, params.grad_out_strides, sequence, head, tile.value_dim), thread_index);
    const uint head_row = first_row_index(params, sequence, head);
    const ScoreGradient blobs(score_gradient, params, position.x * params.group_size + member, lane_index,
                              rows.first_key / kFragment);
    const Rules<T> rules(params, sequence, bias, mask_classes, alibi_slopes, rng_state, head);
    thread const MaskBlocks& blocks = rules.blocks;
    for (BlockWalk<kBlockQueries, false> walk(rules.scores.block_mask, view, tile.first_key); !walk.is_done();
         walk.next()) {
      const int first_query = walk.first;
      if (walk.template classify<kBlockQueries, kSimdgroups * kRows>(blocks, first_query, tile.first_key) == kHidden) {
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
      const MaskClass mask_class = walk.template classify<kBlockQueries, kRows>(blocks, first_query, rows.first_key);
      if (!rows.view.sees(first_query, kBlockQueries) || mask_class == kHidden) {
        continue;
      }
      const Rules<T> own_rules = rules.in_block(mask_class, walk);
      const Queries staged_queries(paired_queries, queries);
      const GradOuts staged_grad_outs(paired_grad_outs, grad_outs);
      const StagedStatistics row_statistics = {lse, delta, rows.lane};
      rows.multiply_queries(staged_queries);
      rows.template make_probabilities<false>(params, own_rules, row_statistics, first_query);
      if (wants_grad_value) {
        rows.add_values(own_rules, staged_grad_outs, first_query);
      }
      if (wants_grad_key) {
        Fragment<float> dp[kRowTiles][kBlockQueries / kFragment];
        rows.multiply_grad_outs(staged_grad_outs, dp);
        rows.make_score_gradient(own_rules, dp, row_statistics, first_query);
        if (writes_score_gradient) {
          rows.store_score_gradient(blobs, first_query);
        }
        rows.add_keys(staged_queries);
      }
    }
  }
  rows.store(params, grad_key, grad_value, tile);
}

}  // namespace mfa
