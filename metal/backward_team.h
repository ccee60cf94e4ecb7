// A team of SIMD-groups that shares rows in the backward pass, where dK and dV, or dQ, are too long for the registers
// of one: each member has a slice of D and of Dv, of its operands as of its results. S and dP are sums of what the
// members make of their columns. They exchange them through threadgroup memory, a score tile's owner makes P and dS of
// them, and all take these from there. The team is the whole threadgroup.
#pragma once

#include "backward.h"

namespace mfa {

// A member's kSlice columns of rows of a head, from first_dim on. Who is past the last of the kernel's kDim has no rows
// instead: then all have as many columns, which a compiler knows.
template <int kSlice, int kDim, typename T>
inline HeadRows<T> slice_of(HeadRows<T> rows, int first_dim) {
  rows.base += first_dim;
  rows.dim = is_exact_head ? kSlice : rows.dim - first_dim;
  rows.length = first_dim < kDim ? rows.length : 0;
  return rows;
}

// A member's slice of the team's own rows as left operand, read again for every product. The base is this lane's, so
// that sets of columns are a constant away.
template <typename T>
struct MemberRows {
  GuardedRows<T> rows;

  MemberRows(GuardedRows<T> own, Lane lane)
      : rows{own.base + (lane.row * own.stride + 4 * lane.column), own.stride, own.valid - lane.row,
             own.dim - 4 * lane.column} {}

  void fill(thread Fragment<T>* set, short r, short s, Lane) const { fill_left(set, rows.octet(r, 0, s * kSetWidth)); }
};

// A member's slice of rows of the other side, transposed, as right operand. The base is this lane's as well.
template <typename T>
struct MemberColumns {
  HeadRows<T> rows;
  Lane lane;

  MemberColumns(HeadRows<T> all, Lane lane_) : rows(all), lane(lane_) {
    rows.base += lane.column * rows.stride + 4 * lane.row;
    rows.length -= lane.column;
    rows.dim -= 4 * lane.row;
  }

  struct Block {
    GuardedRows<T> rows;
    Lane lane;

    vec<T, 4> quad(short tile, short row, short d) const {
      return rows.quad(tile, short(row - lane.column), short(d - 4 * lane.row));
    }
    vec<T, 2> pair(short, short, short) const { return vec<T, 2>(0); }  // of a half set, which slices don't have
  };

  Block from(int row) const { return {rows.from(row), lane}; }
};

// Score tiles of a step in threadgroup memory, [regions][members][kTiles] fragments, a lane's two elements together:
// the members' parts, and then, over the first member's, what the owners make of their sum.
template <int kMembers, int kRowTiles, int kColumnTiles>
struct TeamScores {
  static constant constexpr int kTiles = kRowTiles * kColumnTiles;
  static_assert(kTiles <= kMembers, "a member owns one tile or none");

  threadgroup float2* lane_base;  // this lane's element of the first fragment
  short member;

  TeamScores(threadgroup void* memory, ushort member_, ushort lane_index)
      : lane_base((threadgroup float2*)memory + lane_index), member(member_) {}

  bool owns_tile() const { return member < kTiles; }
  short row_tile() const { return member / kColumnTiles; }
  short column_tile() const { return member % kColumnTiles; }

  threadgroup float2* at(short region) const { return lane_base + region * kMembers * kTiles * 32; }

  // This member's part.
  void write(thread Fragment<float> (&part)[kRowTiles][kColumnTiles], short region = 0) const {
    threadgroup float2* own = at(region) + member * kTiles * 32;
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kColumnTiles; ++n) {
        own[(r * kColumnTiles + n) * 32] = part[r][n];
      }
    }
  }

  // Of the own tile, in the members' order.
  float2 sum(short region = 0) const {
    const threadgroup float2* own = at(region) + member * 32;
    float2 total = own[0];
    MFA_UNROLL
    for (short other = 1; other < kMembers; ++other) {
      total += own[other * kTiles * 32];
    }
    return total;
  }

  // The own tile; and then all of them.
  void put(float2 x, short region = 0) const { at(region)[member * 32] = x; }
  void take(thread Fragment<float> (&scores)[kRowTiles][kColumnTiles], short region = 0) const {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      MFA_UNROLL
      for (short n = 0; n < kColumnTiles; ++n) {
        scores[r][n] = at(region)[(r * kColumnTiles + n) * 32];
      }
    }
  }
};

}  // namespace mfa
