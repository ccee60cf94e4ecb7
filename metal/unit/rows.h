// Rows in device memory as operands of the matrix unit, of heads without a tail: aligned, and of the instance's head
// dimension.
#pragma once

#include "../loader.h"

namespace mfa {

// All rows of a head as a lane sees them: from its own row of a tile, and its octet of the first set, on.
template <typename T>
inline HeadRows<T> of_lane(HeadRows<T> rows, Lane lane) {
  rows.base += lane.row * rows.stride + 4 * lane.column;
  rows.length -= lane.row;
  return rows;
}

// Where a lane reads of kTiles row tiles. A pointer per tile, since other sets are a constant further, which is part of
// a load: between them, no address costs an instruction.
template <typename T, int kTiles, bool kIsBounded = false>
struct LaneRows {
  const device T* tiles[kTiles];
  int valid;  // bounded rows from here on read as zeros: they may hold NaN, and 0 * NaN would reach the output

  // Rows of a block, of_lane.
  explicit LaneRows(GuardedRows<T> block) : valid(block.valid) {
    MFA_UNROLL
    for (short i = 0; i < kTiles; ++i) {
      tiles[i] = block.base + i * kFragment * block.stride;
    }
  }

  // Rows first ... of a head, for left operands. One past the last reads as the last, without a branch: results of it
  // stay in its row, and nobody looks at them.
  LaneRows(HeadRows<T> rows, int first, Lane lane) : valid(0) {
    MFA_UNROLL
    for (short i = 0; i < kTiles; ++i) {
      const int row = max(0, min(first + i * kFragment + lane.row, rows.length - 1));
      tiles[i] = rows.from(row).base + 4 * lane.column;
    }
  }

  LaneRows from_set(int set) const {
    LaneRows rows = *this;
    MFA_UNROLL
    for (short i = 0; i < kTiles; ++i) {
      rows.tiles[i] += set * kSetWidth;
    }
    return rows;
  }

  bool has(short tile) const { return !kIsBounded || tile * kFragment < valid; }

  Octet<T> whole_set(short tile, short set) const {
    if (has(tile)) {
      return load_octet(tiles[tile] + set * kSetWidth);
    }
    return {vec<T, 4>(0), vec<T, 4>(0)};
  }

  vec<T, 4> half_set(short tile, short set, Lane lane) const {
    return has(tile) ? load_quad(tiles[tile] + set * kSetWidth - 2 * lane.column) : vec<T, 4>(0);
  }
};

// Of these rows, or of others that a lane sees so.
template <int kDim, typename T, int kTiles, bool kIsBounded, template <typename, int, bool> class Rows>
inline void load_right(thread Fragment<T>* fragments, Rows<T, kTiles, kIsBounded> rows, short tile, short set,
                       Lane lane) {
  if (is_whole<kDim>(set)) {
    fill_right(fragments, rows.whole_set(tile, set));
  } else {
    fill_right(fragments, rows.half_set(tile, set, lane));
  }
}

// A SIMD-group's own rows, as in ../backward.h.
template <typename T, int kRowTiles>
using OwnRows = LaneRows<T, kRowTiles>;

// Rows of a block, of_lane: open or bounded.
template <bool kIsOpen, int kTiles, typename T>
inline LaneRows<T, kTiles, !kIsOpen> unit_rows(GuardedRows<T> block) {
  return LaneRows<T, kTiles, !kIsOpen>(block);
}

}  // namespace mfa
