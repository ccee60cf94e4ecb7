// As backward_dq, by a team: one threadgroup per (query head, kRowTiles * 8 queries, batch), whose members each keep a
// slice of dQ. K is in threadgroup memory. For dP each member reads its slice of V straight from device memory: nobody
// else needs it.
//
//   for each key block that a row of the tile sees:
//     dP = dO V', S = Q K'                            members' parts, exchanged one after the other
//     P = exp2(scale S - lse), dS = P (dP - delta)    by the tile's owner, exchanged
//     dQ += dS K
//   store scale dQ
#pragma once

#include "backward_team.h"

namespace mfa {

// What a score tile's owner does: dS of its 8 queries x 8 keys.
template <typename T, typename Exchange>
struct OwnedQueries {
  Exchange exchange;
  Lane lane;
  Sequence sequence;
  View view;         // of the team's queries
  int query;         // this lane's
  float lse, delta;  // of it
  float alibi;       // this lane's part of sum over keys of dS * d score / d slope

  // `statistics` starts at the sequence's first row.
  OwnedQueries(Exchange exchange_, Lane lane_, Sequence sequence_, View view_, const device float2* statistics,
               int first_row)
      : exchange(exchange_),
        lane(lane_),
        sequence(sequence_),
        view(view_),
        query(first_row + exchange_.row_tile() * kFragment + lane_.row),
        lse(kUnseenLse),
        delta(0),
        alibi(0) {
    if (exchange.owns_tile() && query < sequence.query_length) {
      lse = statistics[query].x;
      delta = statistics[query].y;
    }
  }

  void make(constant AttentionParams& params, Rules<T> rules, int first_key, int block_keys, float2 dp) {
    const int key = first_key + exchange.column_tile() * kFragment + lane.column;
    float2 derivative;
    float2 p = probability(params, rules, exchange.sum(), int2(query), int2(key, key + 1), float2(lse), derivative);
    if (!view.sees_all(first_key, block_keys)) {
      p = visible_keys(params, sequence, query).keep(p, key);
    }
    float2 grad = dp;
    if (has_dropout) {
      grad *= rules.dropout.of_keys(query, key);
    }
    grad = p * (grad - delta);
    if (wants_grad_alibi) {
      const int diagonal = query + sequence.key_length - sequence.query_length;
      alibi -= dot(grad, float2(abs(diagonal - int2(key, key + 1))));
    }
    if (has_softcap) {
      grad *= derivative;
    }
    exchange.put(grad);
  }
};

template <typename T, Own kOwn, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq_team(BACKWARD_DQ_ARGUMENTS,
                                                                                      ushort thread_index
                                                                                      [[thread_index_in_threadgroup]]) {
  static_assert(kHeadDim >= kValueDim && kHeadDim % (kSimdgroups * kSetWidth) == 0, "slices of whole sets hold Dv too");
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kSlice = kHeadDim / kSimdgroups;
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kKeyTiles = kBlockKeys / kFragment;
  typedef StagedRows<T, kHeadDim, both> Keys;
  typedef TeamScores<kSimdgroups, kRowTiles, kKeyTiles> Exchange;
  typedef OwnOperand<T, kOwn, kRowTiles, kSlice, GuardedRows<T>> Operand;
  threadgroup uint4
      memory[backward_dq_threadgroup_bytes(team, kHeadDim, kValueDim, kSimdgroups, kRowTiles, kBlockKeys, sizeof(T)) /
             16];
  threadgroup T* staged_rows = (threadgroup T*)memory;

  const Tile tile =
      query_tile(params, {tile_map, query_starts, key_starts, key_lengths}, bias, position, grid.y, kRows);
  const Sequence sequence = tile.sequence;
  const int head = position.x;
  const int key_head = head / params.group_size;
  const int first_row = tile.index * kRows;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;
  const HeadRows<T> head_keys = key_rows(key, params.key_strides, sequence, key_head, head_dim);
  const short first_dim = simdgroup * kSlice;
  const Lane lane(lane_index);
  const HeadRows<T> own_queries =
      slice_of<kSlice, kHeadDim>(query_rows(query, params.query_strides, sequence, head, head_dim), first_dim);
  const Operand queries(own_queries.from(first_row), lane);
  const Operand grad_outs(
      slice_of<kSlice, kValueDim>(query_rows(grad_out, params.grad_out_strides, sequence, head, value_dim), first_dim)
          .from(first_row),
      lane);
  const MemberColumns<T> values(
      slice_of<kSlice, kValueDim>(key_rows(value, params.value_strides, sequence, key_head, value_dim), first_dim),
      lane);
  const View view = view_of_queries(params, sequence, first_row, first_row + kRows);
  const long first_index = first_row_index(params, sequence, head);
  const Exchange exchange(staged_rows + kBlockKeys * Keys::kStride, simdgroup, lane_index);
  OwnedQueries<T, Exchange> owned(exchange, lane, sequence, view, statistics + first_index, first_row);
  const Rules<T> rules(params, sequence, bias, mask_classes, alibi_slopes, rng_state, head);
  thread const MaskBlocks& blocks = rules.blocks;
  Fragment<float> result[kRowTiles][kSlice / kFragment];
  clear(result);

  bool is_first = true;
  for (BlockWalk<kBlockKeys, true> walk(rules.scores.block_mask, view, first_row); !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    const MaskClass mask_class = walk.template classify<kRows, kBlockKeys>(blocks, first_row, first_key);
    if (mask_class == kHidden) {
      continue;
    }
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    Fragment<float> scores[kRowTiles][kKeyTiles];
    stage_rows<T, kBlockKeys, kHeadDim, both, kThreads>(staged_rows, head_keys.from(first_key), thread_index);
    multiply_transposed<T, kSlice>(scores, grad_outs.operand, values.from(first_key), lane);
    exchange.write(scores);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float2 dp = exchange.owns_tile() ? exchange.sum() : float2(0);
    multiply_transposed<T, kSlice>(scores, queries.operand, Keys{staged_rows + first_dim}, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    exchange.write(scores);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (exchange.owns_tile()) {
      owned.make(params, rules.in_block(mask_class, walk), first_key, kBlockKeys, dp);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    exchange.take(scores);
    multiply_accumulate<T, kSlice>(result, scores, Keys{staged_rows + first_dim}, lane);
  }

  if (wants_grad_alibi) {
    // The key tiles of a row tile have an owner each.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (exchange.owns_tile()) {
      exchange.put(float2(row_sum(owned.alibi), 0));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (exchange.owns_tile() && exchange.column_tile() == 0 && lane.column == 0 &&
        owned.query < sequence.query_length) {
      float sum = 0;
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; ++n) {
        sum += exchange.lane_base[(simdgroup + n) * 32].x;
      }
      grad_alibi[first_index + owned.query] = sum;
    }
  }
  float factor[kRowTiles];
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    factor[r] = params.scale;
  }
  store_rows<T, kSlice>(
      grad_query + (sequence.index * params.grad_query_strides[0] + head * params.grad_query_strides[1] +
                    sequence.first_query * params.grad_query_strides[2] + first_dim),
      params.grad_query_strides[2], first_row, own_queries.length, own_queries.dim, result, factor, lane);
}

}  // namespace mfa
