// The way of a tile of decode's rows through their part of the keys: through all blocks that they see, or, of a block
// mask, through those that a head of theirs lists. Parts divide what is listed, not what there is.
#pragma once

#include "block_mask.h"

namespace mfa {

// A tile of kRows rows: row = query * group_size + member of the group. All queries are of the mask's first row of
// blocks. Heads may have lists of their own, of which each lane follows kLists.
template <int kRows, int kBlock>
struct DecodeWalk {
  static constant constexpr int kLists = (kRows + 31) / 32;
  static constant constexpr int kSteps = kMaskBlock / kBlock;

  BlockMask mask;
  int first, end;                       // keys: of this step, and behind the last
  int stop;                             // where the mask's block ends
  int last_block;                       // of the view
  int number[kLists], entries[kLists];  // the next entry of each list, and where it ends
  int first_tile, end_tile;             // of queries
  uint tiles;                           // of the block's keys: what all rows see and hide
  int own_mixed;                        // the block's number in the list of the lane's own row
  ushort own;                           // that list

  // `keys` are the part's blocks where there is no block mask; `first_head` is that of the group.
  DecodeWalk(constant AttentionParams& params, BlockMask first_head, View view, Range keys, int first_row,
             int row_count, int part, int own_row, ushort lane_index)
      : mask(first_head), first(keys.first * kBlock), end((keys.last + 1) * kBlock), stop(end), own_mixed(kSeenWhole) {
    if (has_block_mask) {
      const bool is_shared = mask.header(kMaskHeads) == 1;
      const int rows = min(kRows, row_count - first_row);
      const int heads = is_shared ? 1 : min(rows, params.group_size);
      own = is_shared ? 0 : (own_row - first_row) % params.group_size;
      first_tile = first_row / params.group_size / kMaskTile;
      end_tile = (first_row + rows - 1) / params.group_size / kMaskTile + 1;
      first = view.begin();
      end = view.end();
      last_block = end / kMaskBlock;
      int2 part_keys = int2(end);
      MFA_UNROLL
      for (short i = 0; i < kLists; ++i) {
        const int head = lane_index + 32 * i < heads ? lane_index + 32 * i : 0;
        const int2 list = mask.of_member((first_row + head) % params.group_size).entries_of_keys(first, end);
        number[i] = list.x;
        entries[i] = list.y;
        part_keys = min(part_keys,
                        int2(start_of_part(list, part, params.splits), start_of_part(list, part + 1, params.splits)));
      }
      first = max(simd_min(part_keys.x), first / kBlock * kBlock);
      end = simd_min(part_keys.y);
      MFA_UNROLL
      for (short i = 0; i < kLists; ++i) {
        number[i] = mask.first_entry(number[i], entries[i], first / kMaskBlock);
      }
      find();
    }
  }

  bool is_done() const { return first >= end; }

  void next() {
    first += kBlock;
    if (has_block_mask && first >= stop) {
      find();
    }
  }

  int mixed() const { return own_mixed; }

  // What the mask does to this step, for all rows of the tile.
  MaskClass mask_class() const { return class_of(tiles_of_keys<kBlock>(tiles, first)); }

  int key_block(int entry) const { return min(max(mask.key_block(entry), 0), last_block); }

  // The first key of a part, if parts have a list's steps in equal shares.
  int start_of_part(int2 list, uint part, uint parts) const {
    const uint steps = uint(list.y - list.x) * kSteps;
    const uint step = steps / parts * part + steps % parts * part / parts;
    const int entry = list.x + int(step / kSteps);
    return entry < list.y ? key_block(entry) * kMaskBlock + int(step % kSteps) * kBlock : end;
  }

  // The next block that is in a list.
  void find() {
    int nearest = last_block + 1;
    MFA_UNROLL
    for (short i = 0; i < kLists; ++i) {
      nearest = number[i] < entries[i] ? min(nearest, key_block(number[i])) : nearest;
    }
    const int block = simd_min(nearest);
    first = max(first, block * kMaskBlock);
    stop = block * kMaskBlock + kMaskBlock;
    if (block > last_block) {
      return;
    }
    uint found = 0;
    MFA_UNROLL
    for (short i = 0; i < kLists; ++i) {
      const bool is_listed = number[i] < entries[i] && key_block(number[i]) == block;
      const MaskEntry entry = mask.entry(number[i]);
      found |= is_listed ? tiles_of(entry) : kTilesHidden;
      const int mixed = simd_shuffle(is_listed ? max(entry.mixed, kSeenWhole) : kNotListed, ushort(own % 32));
      own_mixed = own / 32 == i ? mixed : own_mixed;
      number[i] += is_listed ? 1 : 0;
    }
    tiles = simd_or(found);
  }

  // Of the tile's queries.
  uint tiles_of(MaskEntry entry) const {
    if (entry.mixed < 0) {
      return kTilesSeen;
    }
    uint found = 0;
    for (int i = first_tile; i < end_tile; ++i) {
      found |= row_of_tiles(entry.classes, i);
    }
    return found;
  }
};

}  // namespace mfa
