// The class of every 16 queries x 16 keys of a mask or bias, in one pass over it. One SIMD-group per class; grid:
// column tiles, row tiles, batch * heads of the bias.
#pragma once

#include "mask_classes.h"
#include "types.h"

namespace mfa {

template <typename T, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void mask_blocks(
    const device uchar* bias [[buffer(kBias)]], device uchar* classes [[buffer(kMaskClasses)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  const int column_tiles = mask_tiles(params.bias_columns);
  const int tile = position.x * kSimdgroups + simdgroup;
  const device uchar* head = bias + (position.z / params.bias_heads * params.bias_strides[0] +
                                     position.z % params.bias_heads * params.bias_strides[1]) *
                                        bias_element_size<T>();
  bool sees = false;
  bool hides = false;
  MFA_UNROLL
  for (short e = 0; e < kMaskTile * kMaskTile / 32; ++e) {
    const int row = position.y * kMaskTile + (e * 32 + lane) / kMaskTile;
    const int column = tile * kMaskTile + lane % kMaskTile;
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
  const bool any_sees = simd_any(sees);
  const bool any_hides = simd_any(hides);
  if (lane == 0 && tile < column_tiles) {
    classes[(long(position.z) * mask_tiles(params.bias_rows) + position.y) * column_tiles + tile] =
        any_sees ? any_hides ? kMixed : kOpen : kHidden;
  }
}

#define MASK_BLOCKS(dtype, simdgroups)                                      \
  template [[host_name("mask_blocks_" #dtype "_s" #simdgroups)]] [[kernel]] \
  decltype(mask_blocks<dtype, simdgroups>) mask_blocks<dtype, simdgroups>;

}  // namespace mfa
