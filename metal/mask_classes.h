// A coarse view of a mask or bias: one class per 16 queries x 16 keys, so that blocks in which nothing is seen are
// skipped, and those in which a bool mask hides nothing run without mask code. Made by mask_blocks.h in one pass over
// the mask, which all heads and both directions then share.
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
    MFA_UNROLL
    for (short i = 0; i < kQueries; i += kMaskTile) {
      MFA_UNROLL
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

}  // namespace mfa
