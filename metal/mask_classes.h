// A coarse view of a mask or bias: what each 16 queries x 16 keys see and hide, so that blocks in which nothing is seen
// are skipped, and those in which a bool mask hides nothing run without mask code. Made by mask_blocks.h in one pass
// over the mask, which all heads and both directions then share; block masks bring their own.
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

enum MaskClass : uchar { kHidden, kMixed, kOpen };

// Of a block of 128 queries x 128 keys: eight tiles of keys in a row, for each whether any score is seen, and whether
// any is hidden. Tiles behind the end have neither.
constant constexpr int kMaskBlock = kMaskBlockRows;
constant constexpr int kMaskBlockTiles = kMaskBlock / kMaskTile;
constant constexpr uint kTilesSeen = 0x55555555, kTilesHidden = 0xaaaaaaaa;

inline MaskClass class_of(uint tiles) {
  return (tiles & kTilesSeen) == 0 ? kHidden : (tiles & kTilesHidden) == 0 ? kOpen : kMixed;
}

// The tiles of a row of a block, in the lower half.
inline uint row_of_tiles(uint4 classes, int row) { return classes[row / 2] >> (row % 2 * 2 * kMaskBlockTiles); }

// Of all these tiles, those of kKeys from key on.
template <int kKeys>
inline uint tiles_of_keys(uint tiles, int key) {
  constexpr int kTiles = kKeys < kMaskTile ? 1 : kKeys / kMaskTile;
  return tiles >> (key % kMaskBlock / kMaskTile * 2) & ((1u << 2 * kTiles) - 1);
}

// Of kQueries x kKeys from (query, key) on; both start at a multiple of their number.
template <int kQueries, int kKeys>
inline MaskClass class_of(uint4 classes, int query, int key) {
  const int first = kQueries == kMaskBlock ? 0 : query % kMaskBlock;
  uint tiles = 0;
  MFA_UNROLL
  for (short i = 0; i < kQueries; i += kMaskTile) {
    tiles |= row_of_tiles(classes, (first + i) / kMaskTile);
  }
  return class_of(tiles_of_keys<kKeys>(tiles, key));
}

inline int mask_blocks_of(int length) { return (length + kMaskBlock - 1) / kMaskBlock; }

// The classes of one (batch, query head).
struct MaskBlocks {
  const device uint4* classes;
  int rows, columns;

  MaskBlocks(constant AttentionParams& params, const device uchar* all, int batch, int head)
      : classes((const device uint4*)all), rows(params.bias_rows), columns(params.bias_columns) {
    if (has_mask_blocks) {
      const int b = params.bias_batch == 1 ? 0 : batch;
      const int h = params.bias_heads == 1 ? 0 : head;
      classes += (long(b) * params.bias_heads + h) * mask_blocks_of(rows) * mask_blocks_of(columns);
    }
  }

  template <int kQueries, int kKeys>
  MaskClass classify(int query, int key) const {
    if (!has_mask_blocks) {
      return kMixed;
    }
    const int row = rows == 1 ? 0 : query;  // a dimension that broadcasts has one tile
    const int column = columns == 1 ? 0 : key;
    const int down = min(row / kMaskBlock, mask_blocks_of(rows) - 1);  // who asks may be behind the end
    const int across = min(column / kMaskBlock, mask_blocks_of(columns) - 1);
    return class_of<kQueries, kKeys>(classes[long(down) * mask_blocks_of(columns) + across], row, column);
  }
};

}  // namespace mfa
