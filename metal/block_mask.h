// A packed block mask (src/mfa/block_mask.py), and the way through the blocks of the other side that a tile of rows
// visits: all of a range, or those that the mask lists.
#pragma once

#include "mask.h"
#include "mask_classes.h"

namespace mfa {

// Instead of a block's number among those that are seen in part.
constant constexpr int kSeenWhole = -1, kNotListed = -2;

// One block that is seen, as the table has it.
struct MaskEntry {
  int query_block, key_block;
  int mixed;      // its number among those that are seen in part, or kSeenWhole
  uint4 classes;  // of its tiles
};

// The lists of one (batch, query head). Contents are not trusted: whatever they hold, nothing outside of them is read.
struct BlockMask {
  const device int* data;
  int words;
  int map;  // (batch, head) in the mask

  BlockMask(constant AttentionParams& params, const device uchar* bias, int batch, int head)
      : data((const device int*)bias), words(params.block_mask_words), map(0) {
    if (has_block_mask) {
      map = (header(kMaskBatch) == 1 ? 0 : batch) * header(kMaskHeads) + (header(kMaskHeads) == 1 ? 0 : head);
    }
  }

  int word(long index) const { return data[min(max(index, 0L), long(words - 1))]; }
  int header(int field) const { return word(field); }
  int section(int field, long index) const { return word(header(field) + index); }

  // Of a head further on.
  BlockMask of_member(int member) const {
    BlockMask mask = *this;
    mask.map += header(kMaskHeads) == 1 ? 0 : member;
    return mask;
  }

  // Where the entries of a row of blocks (of queries or of keys) begin, and their end.
  int2 entries(int starts, int blocks, int block) const {
    const long first = long(map) * (header(blocks) + 1) + block;
    return int2(section(starts, first), section(starts, first + 1));
  }

  int key_block(int entry) const { return word(header(kMaskTable) + long(entry) * kMaskTableColumns + 1); }

  // Of the entries first .. end - 1 of a row of blocks of queries, the first at or behind a block of keys; or end.
  int first_entry(int first, int end, int block) const {
    while (first < end) {
      const int middle = first + (end - first) / 2;
      if (key_block(middle) < block) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }

  // The entries of the first row of blocks of queries that have some of keys first .. end - 1.
  int2 entries_of_keys(int first, int end) const {
    const int2 all = entries(kMaskQueryStarts, kMaskQueryBlocks, 0);
    const int last = min(all.y, words);
    const int begin = first_entry(max(all.x, 0), last, first / kMaskBlock);
    return int2(begin, first_entry(begin, last, (end + kMaskBlock - 1) / kMaskBlock));
  }

  MaskEntry entry(int number) const {
    const long first = header(kMaskTable) + long(number) * kMaskTableColumns;
    return {word(first),
            word(first + 1),
            word(first + 2),
            {uint(word(first + 4)), uint(word(first + 5)), uint(word(first + 6)), uint(word(first + 7))}};
  }

  // Whether a query sees a key of a block that is seen in part.
  bool sees(int mixed, int query, int key) const {
    const long row = long(mixed) * kMaskBlock + query % kMaskBlock;
    const int bits = section(kMaskBits, row * (kMaskBlock / 32) + key % kMaskBlock / 32);
    return ((bits >> (key % 32)) & 1) != 0;
  }

  // The tile of rows that threadgroup y has: tiles of rows of blocks that have most entries come first.
  int tile(int order, int blocks, int y, int tile_rows, int length) const {
    const int each = kMaskBlock / tile_rows;
    const int block = section(order, long(map) * header(blocks) + y / each);
    return min(max(block, 0), (length - 1) / kMaskBlock) * each + y % each;
  }
};

// The blocks of kBlock rows that a tile of rows visits on the other side: of keys for a tile of queries, or the
// reverse. All of what its view has, or, of a block mask, those that the tile's list names.
template <int kBlock, bool kOfKeys>
struct BlockWalk {
  BlockMask mask;
  MaskEntry entry;      // that the block is part of
  int first;            // row of the block
  int begin, end;       // of the view
  int stop;             // where the entry ends
  int number, entries;  // the entry's, and where the list ends

  BlockWalk(BlockMask mask_, View view, int first_row)
      : mask(mask_),
        entry{0, 0, -1, uint4(0)},
        first(view.first_block(kBlock) * kBlock),
        begin(first),
        end(view.end()),
        stop(end),
        number(0),
        entries(0) {
    if (has_block_mask) {
      const int row = first_row / kMaskBlock;
      const int2 list = kOfKeys ? mask.entries(kMaskQueryStarts, kMaskQueryBlocks, row)
                                : mask.entries(kMaskKeyStarts, kMaskKeyBlocks, row);
      number = max(list.x, 0);
      entries = min(list.y, mask.words);
      find();
    }
  }

  bool is_done() const { return first >= end; }

  void next() {
    first += kBlock;
    if (has_block_mask && first >= stop) {
      ++number;
      find();
    }
  }

  // The first entry from `number` on that the view has something of.
  void find() {
    for (; number < entries; ++number) {
      entry = mask.entry(kOfKeys ? number : mask.section(kMaskKeyEntries, number));
      const int entry_first = min(max(kOfKeys ? entry.key_block : entry.query_block, 0), end) * kMaskBlock;
      first = max(entry_first, begin);
      stop = min(entry_first + kMaskBlock, end);
      if (first < stop) {
        return;
      }
    }
    first = end;
  }

  int mixed() const { return entry.mixed; }

  // Of kQueries x kKeys from (query, key) on, in the block.
  template <int kQueries, int kKeys>
  MaskClass classify(MaskBlocks blocks, int query, int key) const {
    if (!has_block_mask) {
      return blocks.classify<kQueries, kKeys>(query, key);
    }
    return entry.mixed < 0 ? kOpen : class_of<kQueries, kKeys>(entry.classes, query, key);
  }
};

// The tiles of a threadgroup: of queries of a head, at `position` (head, tile, batch) of a grid with so many tiles; and
// of keys of a unit, a (batch, key head).
inline Tile query_tile(constant AttentionParams& params, Layout layout, const device uchar* bias, uint3 position,
                       uint tiles, int tile_rows) {
  Tile tile(params, layout, position.z, position.y, tiles);
  if (has_block_mask) {
    const BlockMask mask(params, bias, position.z, position.x);
    tile.index = mask.tile(kMaskQueryOrder, kMaskQueryBlocks, position.y, tile_rows, params.query_length);
  }
  return tile;
}

inline Tile key_tile(constant AttentionParams& params, Layout layout, const device uchar* bias, int unit, int y,
                     int tile_rows) {
  Tile tile(params, layout, unit / params.key_heads, y, 0);
  if (has_block_mask) {
    const BlockMask mask(params, bias, unit / params.key_heads, unit % params.key_heads * params.group_size);
    tile.index = mask.tile(kMaskKeyOrder, kMaskKeyBlocks, y, tile_rows, params.key_length);
  }
  return tile;
}

}  // namespace mfa
