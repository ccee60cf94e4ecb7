// A coarse view of a mask or bias: one class per 16 queries x 16 keys, so that blocks in which nothing is seen are
// skipped, and those in which a bool mask hides nothing run without mask code. Made by mask_blocks in one pass over the
// mask, which all heads and both directions then share.
#pragma once

#include "layout.h"

namespace mfa {

using namespace metal;

constant constexpr int kMaskTile = 16;
constant constexpr float kHidingBias = -1e38f;  // a bias of at most this hides its key

// A bias is of bools, of float32 or of the query's dtype.
template <typename T>
inline int bias_element_size() {
  return has_mask ? 1 : has_float_bias ? int(sizeof(float)) : int(sizeof(T));
}

// Of a bias that is not of bools.
template <typename T>
inline float bias_value(const device uchar* bias, long index) {
  return has_float_bias ? ((const device float*)bias)[index] : float(((const device T*)bias)[index]);
}

enum MaskClass : uchar {
  kHidden = 0,  // nothing is seen
  kMixed = 1,
  kOpen = 2,  // a bool mask that hides nothing
};

inline int mask_tiles(int length) { return (length + kMaskTile - 1) / kMaskTile; }

// The classes of one (batch, query head).
struct MaskBlocks {
  const device uchar* classes;
  int row_tiles, column_tiles;

  MaskBlocks(constant AttentionParams& params, const device uchar* all, int batch, int head)
      : classes(all), row_tiles(mask_tiles(params.bias_rows)), column_tiles(mask_tiles(params.bias_columns)) {
    if (has_mask_blocks) {
      const int b = params.bias_batch == 1 ? 0 : batch;
      const int h = params.bias_heads == 1 ? 0 : head;
      classes += (long(b) * params.bias_heads + h) * row_tiles * column_tiles;
    }
  }

  // Of kQueries x kKeys from (query, key) on; both start at a multiple of their number.
  template <int kQueries, int kKeys>
  MaskClass classify(int query, int key) const {
    if (!has_mask_blocks) {
      return kMixed;
    }
    bool hidden = true;
    bool open = true;
#pragma unroll
    for (short i = 0; i < kQueries; i += kMaskTile) {
#pragma unroll
      for (short j = 0; j < kKeys; j += kMaskTile) {
        // A broadcast dimension has one tile; the last block may reach past the last tile.
        const int row = min((query + i) / kMaskTile, row_tiles - 1);
        const int column = min((key + j) / kMaskTile, column_tiles - 1);
        const uchar x = classes[long(row) * column_tiles + column];
        hidden = hidden && x == kHidden;
        open = open && x == kOpen;
      }
    }
    return hidden ? kHidden : open ? kOpen : kMixed;
  }
};

// One SIMD-group per class. Grid: column tiles, row tiles, batch * heads of the bias.
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
#pragma unroll
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
