// dQ' = scale K' dS', dS' as backward_dkdv left it: the fifth GEMM of the five-GEMM backward. One threadgroup per
// (query head, query tile, part of D); a SIMD-group owns kQueryTiles * 8 queries.
//
//   for each key block that a row of the tile sees:
//     dQ' += K' dS'
//   store scale dQ
#pragma once

#include "backward.h"
#include "score_gradient.h"

namespace mfa {

template <typename T, int kHeadDim, int kSimdgroups, int kQueryTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dq_from_ds(
    const device T* key [[buffer(kKey)]], device float* score_gradient [[buffer(kScoreGradient)]],
    device T* grad_query [[buffer(kGradQuery)]],
    const device uchar* mask_classes [[buffer(kMaskClasses), function_constant(has_mask_blocks)]], MFA_PLACE_ARGUMENTS,
    constant int& first_unit [[buffer(kFirstUnit)]], uint3 grid [[threadgroups_per_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kRows = kQueryTiles * kFragment;
  typedef StagedRows<T, kHeadDim, pairs> Keys;
  threadgroup uint4 memory[backward_dq_from_ds_threadgroup_bytes(kHeadDim, kBlockKeys, sizeof(T)) / 16];
  threadgroup T* keys = (threadgroup T*)memory;

  const Lane lane(lane_index);
  const int unit = first_unit + position.x / params.group_size;  // (batch, key head)
  const int batch = unit / params.key_heads;
  const Sequence sequence = {batch, params.query_length, params.key_length, 0, 0};
  const int key_head = unit % params.key_heads;
  const int head = key_head * params.group_size + position.x % params.group_size;
  const int tile = params.heavy_first ? grid.y - 1 - position.y : position.y;
  const int first_tile_row = tile * kSimdgroups * kRows;
  const int first_row = first_tile_row + simdgroup * kRows;
  const int first_dim = position.z * kHeadDim;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim - first_dim;
  const HeadRows<T> head_keys = key_rows(key + first_dim, params.key_strides, sequence, key_head, head_dim);
  const MaskBlocks blocks(params, mask_classes, batch, head);
  const ScoreGradient blobs(score_gradient, params, position.x, lane_index);

  Fragment<float> result[kQueryTiles][kHeadDim / kFragment];  // [q][4s + j]: fragment j of set s, transposed
  clear(result);
  const View tile_view = view_of_queries(params, sequence, first_tile_row, first_tile_row + kSimdgroups * kRows);
  const int begin = tile_view.first_block(kBlockKeys) * kBlockKeys;
  const int end = tile_view.end();
  const Share<T, kBlockKeys, kHeadDim, 2, kThreads> share(head_keys, thread_index);
  bool is_first = true;
  for (int first_key = begin; first_key < end; first_key += kBlockKeys) {
    if (blocks.classify<kSimdgroups * kRows, kBlockKeys>(first_tile_row, first_key) == kHidden) {
      continue;
    }
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    stage_pairs(keys, share, first_key);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MFA_UNROLL
    for (short k = 0; k < kBlockKeys / kFragment; ++k) {
      Fragment<float> ds[kQueryTiles];
      MFA_UNROLL
      for (short q = 0; q < kQueryTiles; ++q) {
        const int row = first_row + q * kFragment;
        ds[q] = float2(0);
        const int tile_key = first_key + k * kFragment;
        if (view_of_queries(params, sequence, row, row + kFragment).sees(tile_key, kFragment) &&
            blocks.classify<kFragment, kFragment>(row, tile_key) != kHidden) {
          ds[q] = blobs.load(first_key / kFragment + k, row / kFragment);
        }
      }
      MFA_UNROLL
      for (short s = 0; s < sets_of(kHeadDim); ++s) {
        Fragment<T> a[kSetFragments];  // K' as left operand: row r of fragment j is d = J*r + j
        load_right_transposed<kHeadDim>(a, Keys{keys}, k, s, lane);
        MFA_UNROLL
        for (short j = 0; j < kSetFragments; ++j) {
          if (j >= fragments_of<kHeadDim>(s)) {
            continue;
          }
          MFA_UNROLL
          for (short q = 0; q < kQueryTiles; ++q) {
            thread Fragment<float>& c = result[q][s * kSetFragments + j];
            c = multiply_add(a[j], ds[q], c);
          }
        }
      }
    }
  }

  // This lane holds d = J * lane.row + j of queries lane.column and lane.column + 1, J being the set's fragments.
  device T* out = grad_query + batch * params.grad_query_strides[0] + head * params.grad_query_strides[1] + first_dim;
  MFA_UNROLL
  for (short q = 0; q < kQueryTiles; ++q) {
    MFA_UNROLL
    for (short s = 0; s < sets_of(kHeadDim); ++s) {
      MFA_UNROLL
      for (short e = 0; e < 2; ++e) {
        const int row = first_row + q * kFragment + lane.column + e;
        if (row < params.query_length) {
          float4 x = float4(0);
          MFA_UNROLL
          for (short j = 0; j < kSetFragments; ++j) {
            if (j < fragments_of<kHeadDim>(s)) {
              x[j] = result[q][s * kSetFragments + j][e] * params.scale;
            }
          }
          device T* target = out + row * params.grad_query_strides[2];
          if (is_whole<kHeadDim>(s)) {
            store_quad_guarded(target, x, s * kSetWidth + 4 * lane.row, head_dim);
          } else {
            store_pair_guarded(target, x.xy, s * kSetWidth + 2 * lane.row, head_dim);
          }
        }
      }
    }
  }
}

#define BACKWARD_DQ_FROM_DS(dtype, head_dim, simdgroups, query_tiles, block_keys)                      \
  template [[host_name("backward_dq_from_ds_" #dtype "_d" #head_dim "_s" #simdgroups "_q" #query_tiles \
                       "_k" #block_keys)]] [[kernel]]                                                  \
  decltype(backward_dq_from_ds<dtype, head_dim, simdgroups, query_tiles, block_keys>)                  \
      backward_dq_from_ds<dtype, head_dim, simdgroups, query_tiles, block_keys>;

}  // namespace mfa
