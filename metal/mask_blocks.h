// What every 16 queries x 16 keys of a mask or bias see and hide, in one pass over it (mask_classes.h). A threadgroup
// has a block of 128 x 128, of which each SIMD-group makes a word; grid: column blocks, row blocks, batch * heads of
// the bias.
#pragma once

#include "mask_classes.h"
#include "types.h"

namespace mfa {

template <typename T, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void mask_blocks(
    const device uchar* bias [[buffer(kBias)]], device uint* classes [[buffer(kMaskClasses)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    uint3 grid [[threadgroups_per_grid]], ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  static_assert(kSimdgroups == 4, "a word each");
  const device uchar* head = bias + (position.z / params.bias_heads * params.bias_strides[0] +
                                     position.z % params.bias_heads * params.bias_strides[1]) *
                                        bias_element_size<T>();
  uint tiles = 0;
  for (short tile = 0; tile < 2 * kMaskBlockTiles; ++tile) {
    const int first_row = position.y * kMaskBlock + (simdgroup * 2 + tile / kMaskBlockTiles) * kMaskTile;
    const int column = position.x * kMaskBlock + tile % kMaskBlockTiles * kMaskTile + lane % kMaskTile;
    bool sees = false;
    bool hides = false;
    MFA_UNROLL
    for (short e = 0; e < kMaskTile * kMaskTile / 32; ++e) {
      const int row = first_row + (e * 32 + lane) / kMaskTile;
      if (row < params.bias_rows && column < params.bias_columns) {
        const long index = row * params.bias_strides[2] + column * params.bias_strides[3];
        if (has_mask) {
          sees = sees || head[index] != 0;
          hides = hides || head[index] == 0;
        } else {
          sees = sees || !(bias_value<T>(head, index) <= kHidingBias);  // a NaN must be seen
          hides = true;
        }
      }
    }
    tiles |= ((simd_any(sees) ? 1u : 0u) | (simd_any(hides) ? 2u : 0u)) << 2 * tile;
  }
  if (lane == 0) {
    classes[((long(position.z) * grid.y + position.y) * grid.x + position.x) * kSimdgroups + simdgroup] = tiles;
  }
}

#define MASK_BLOCKS(dtype, simdgroups)                                      \
  template [[host_name("mask_blocks_" #dtype "_s" #simdgroups)]] [[kernel]] \
  decltype(mask_blocks<dtype, simdgroups>) mask_blocks<dtype, simdgroups>;

}  // namespace mfa
