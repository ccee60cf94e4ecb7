// As backward_dkdv, by a team: one threadgroup per (batch and key head, kRowTiles * 8 keys), whose members each keep a
// slice of dK and of dV. Q and then dO are in threadgroup memory. For dP' each member reads its slice of dO straight
// from device memory: nobody else needs it.
//
//   for each query head of the group, for each query block that sees a key of the tile:
//     dP' = V dO', S' = K Q'                               members' parts, exchanged
//     P' = exp2(scale S' - lse), dS' = P' (dP' - delta)    by the tile's owner, exchanged
//     dK += dS' Q
//     dV += P' dO
//   store dV, scale dK
#pragma once

#include "backward_team.h"
#include "score_gradient.h"

namespace mfa {

// What is exchanged: S', then P'; dP', then dS'.
enum { kScore, kGradient };

// What a score tile's owner does: P' and dS' of its 8 keys x 8 queries.
template <typename T, typename Exchange>
struct OwnedKeys {
  Exchange exchange;
  Lane lane;
  Sequence sequence;
  View view;  // of the team's keys
  int first_key;

  void make(constant AttentionParams& params, Rules<T> rules, const device float2* statistics, int first_query,
            int block_queries, ScoreGradient score_gradient) const {
    const int own_query = first_query + exchange.column_tile() * kFragment;
    const int own_key = first_key + exchange.row_tile() * kFragment;
    const int key = own_key + lane.row;
    const int query = own_query + lane.column;
    const float2 none = float2(kUnseenLse, 0);
    const float2 first = query < sequence.query_length ? statistics[query] : none;  // lse, delta
    const float2 second = query + 1 < sequence.query_length ? statistics[query + 1] : none;
    float2 derivative;
    float2 p = probability(params, rules, exchange.sum(kScore), int2(query, query + 1), int2(key),
                           float2(first.x, second.x), derivative);
    if (!view.sees_all(first_query, block_queries)) {
      const Range seen = key < sequence.key_length ? visible_queries(params, sequence, key) : Range{0, -1};
      p = seen.keep(p, query);
    }
    const float2 kept = has_dropout ? rules.dropout.of_queries(query, key) : float2(1);
    exchange.put(p * kept, kScore);
    if (wants_grad_key) {
      float2 grad = p * (exchange.sum(kGradient) * kept - float2(first.y, second.y));
      if (has_softcap) {
        grad *= derivative;
      }
      exchange.put(grad, kGradient);
      if (writes_score_gradient) {
        score_gradient.store(grad, own_key / kFragment, own_query / kFragment);
      }
    }
  }
};

template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockQueries>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dkdv_team(
    BACKWARD_DKDV_ARGUMENTS,
    device float* score_gradient [[buffer(kScoreGradient), function_constant(writes_score_gradient)]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  static_assert(kHeadDim >= kValueDim && kHeadDim % (kSimdgroups * kSetWidth) == 0, "slices of whole sets hold Dv too");
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kSlice = kHeadDim / kSimdgroups;
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kQueryTiles = kBlockQueries / kFragment;
  typedef StagedRows<T, kHeadDim, both> Queries;
  typedef StagedRows<T, kHeadDim, octets> GradOuts;
  typedef TeamScores<kSimdgroups, kRowTiles, kQueryTiles> Exchange;
  threadgroup uint4 memory[backward_dkdv_threadgroup_bytes(team, kHeadDim, kValueDim, kSimdgroups, kRowTiles,
                                                           kBlockQueries, sizeof(T)) /
                           16];
  threadgroup T* staged_rows = (threadgroup T*)memory;

  const int unit = first_unit + position.x;  // (batch, key head)
  const int key_head = unit % params.key_heads;
  const Tile tile = key_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, unit, position.y, kRows);
  const Sequence sequence = tile.sequence;
  const int first_key = tile.index * kRows;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const short first_dim = simdgroup * kSlice;
  const Lane lane(lane_index);
  const HeadRows<T> own_keys =
      slice_of<kSlice, kHeadDim>(key_rows(key, params.key_strides, sequence, key_head, head_dim), first_dim);
  const HeadRows<T> own_values =
      slice_of<kSlice, kValueDim>(key_rows(value, params.value_strides, sequence, key_head, value_dim), first_dim);
  const MemberRows<T> keys(own_keys.from(first_key), lane);
  const MemberRows<T> values(own_values.from(first_key), lane);
  const View view = view_of_keys(params, sequence, first_key, first_key + kRows);
  const Exchange exchange(staged_rows + kBlockQueries * larger(Queries::kStride, GradOuts::kStride), simdgroup,
                          lane_index);
  const OwnedKeys<T, Exchange> owned = {exchange, lane, sequence, view, first_key};
  Fragment<float> key_result[kRowTiles][kSlice / kFragment];
  Fragment<float> value_result[kRowTiles][kSlice / kFragment];
  clear(key_result);
  clear(value_result);

  bool is_first = true;
  for (int index = 0; index < params.group_size; ++index) {
    const int head = key_head * params.group_size + index;
    const HeadRows<T> queries = query_rows(query, params.query_strides, sequence, head, head_dim);
    const HeadRows<T> grad_outs = query_rows(grad_out, params.grad_out_strides, sequence, head, value_dim);
    const MemberColumns<T> own_grad_outs(slice_of<kSlice, kValueDim>(grad_outs, first_dim), lane);
    const device float2* head_statistics = statistics + first_row_index(params, sequence, head);
    const ScoreGradient blobs(score_gradient, params, position.x * params.group_size + index, lane_index);
    const Rules<T> rules(params, sequence, bias, mask_classes, alibi_slopes, rng_state, head);
    thread const MaskBlocks& blocks = rules.blocks;
    for (BlockWalk<kBlockQueries, false> walk(rules.scores.block_mask, view, first_key); !walk.is_done(); walk.next()) {
      const int first_query = walk.first;
      const MaskClass mask_class = walk.template classify<kBlockQueries, kRows>(blocks, first_query, first_key);
      if (mask_class == kHidden) {
        continue;
      }
      if (!is_first) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      is_first = false;
      Fragment<float> scores[kRowTiles][kQueryTiles];
      stage_rows<T, kBlockQueries, kHeadDim, both, kThreads>(staged_rows, queries.from(first_query), thread_index);
      if (wants_grad_key) {
        multiply_transposed<T, kSlice>(scores, values, own_grad_outs.from(first_query), lane);
        exchange.write(scores, kGradient);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      multiply_transposed<T, kSlice>(scores, keys, Queries{staged_rows + first_dim}, lane);
      exchange.write(scores, kScore);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (exchange.owns_tile()) {
        owned.make(params, rules.in_block(mask_class, walk), head_statistics, first_query, kBlockQueries, blobs);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (wants_grad_key) {
        exchange.take(scores, kGradient);
        multiply_accumulate<T, kSlice>(key_result, scores, Queries{staged_rows + first_dim}, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      if (wants_grad_value) {
        stage_rows<T, kBlockQueries, kHeadDim, octets, kThreads>(staged_rows, grad_outs.from(first_query),
                                                                 thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        exchange.take(scores, kScore);
        multiply_accumulate<T, kSlice>(value_result, scores, GradOuts{staged_rows + first_dim}, lane);
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
    store_rows<T, kSlice>(
        grad_key + (sequence.index * params.grad_key_strides[0] + key_head * params.grad_key_strides[1] +
                    sequence.first_key * params.grad_key_strides[2] + first_dim),
        params.grad_key_strides[2], first_key, own_keys.length, own_keys.dim, key_result, key_factor, lane);
  }
  if (wants_grad_value) {
    store_rows<T, kSlice>(
        grad_value + (sequence.index * params.grad_value_strides[0] + key_head * params.grad_value_strides[1] +
                      sequence.first_key * params.grad_value_strides[2] + first_dim),
        params.grad_value_strides[2], first_key, own_values.length, own_values.dim, value_result, value_factor, lane);
  }
}

}  // namespace mfa
