// Rows of a block in device memory, for fragments that come straight from there. Where rows are aligned and a head has
// no tail, no load is guarded: a row past the last one reads as the last. And no row has a pointer: an address is the
// block's and a 32-bit sum.
#pragma once

#include "loader.h"

namespace mfa {

// At the start of a step that reads a left operand again: else a compiler reads it once, before the loop, into
// registers that it doesn't have.
inline void keep_in_loop() { simdgroup_barrier(mem_flags::mem_none); }

// This lane's first element of a whole set. As part of the pointer it leaves a constant for each set to add; a half set
// comes after a whole one, so that what it adds isn't negative.
template <Loads kLoads>
inline short own_part(Lane lane) {
  return 4 * (kLoads == quads ? lane.row : lane.column);
}

// Of a block whose last row is `last`, the row to read.
inline int row_to_read(short tile, short row, int last) {
  return tile * kFragment + min(int(row), last - tile * kFragment);
}

// Whether a row must read as zeros: 0 * NaN would reach the output. What is made of quads is masked.
template <Loads kLoads>
inline bool reads_as_zeros(short tile, short row, int last) {
  return kLoads == octets && row > last - tile * kFragment;
}

// Of element d of an aligned row, in chunks from the start of a block. 32 bits hold it, see rows_aligned.
inline uint chunk_index(int row, long stride, int d, int chunk) {
  return uint(row) * uint(stride / chunk) + uint(d) / chunk;
}

template <typename T>
inline Octet<T> load_octet(const device T* block, int row, long stride, int d) {
  constexpr int kChunk = 16 / sizeof(T);
  return load_octet(block + kChunk * ulong(chunk_index(row, stride, d, kChunk)));
}

template <typename T, int kDim, Loads kLoads>
struct DeviceRows {
  static_assert(kDim >= kSetWidth && kLoads != both, "see own_part");

  const device T* base;  // of the block, and this lane's part
  long stride;
  int last, dim;
  short own;

  // At least one row is valid.
  DeviceRows(GuardedRows<T> rows, Lane lane)
      : base(rows.base + own_part<kLoads>(lane)),
        stride(rows.stride),
        last(rows.valid - 1),
        dim(rows.dim),
        own(own_part<kLoads>(lane)) {}

  vec<T, 2> pair(short tile, short row, short d) const {
    if (!is_aligned || (!is_exact_head && d + 2 > dim)) {
      return guarded().pair(tile, row, d);
    }
    const vec<T, 2> x = load_pair(base + 2 * ulong(chunk_index(row_to_read(tile, row, last), stride, d - own, 2)));
    return reads_as_zeros<kLoads>(tile, row, last) ? vec<T, 2>(0) : x;
  }

  vec<T, 4> quad(short tile, short row, short d) const {
    if (!is_aligned || (!is_exact_head && d + 4 > dim)) {
      return guarded().quad(tile, row, d);
    }
    const vec<T, 4> x = load_quad(base + 4 * ulong(chunk_index(row_to_read(tile, row, last), stride, d - own, 4)));
    return reads_as_zeros<kLoads>(tile, row, last) ? vec<T, 4>(0) : x;
  }

  Octet<T> octet(short tile, short row, short d) const {
    if (!is_aligned || (!is_exact_head && d + 8 > dim)) {
      return guarded().octet(tile, row, d);
    }
    const Octet<T> x = load_octet(base, row_to_read(tile, row, last), stride, d - own);
    const bool zeros = reads_as_zeros<kLoads>(tile, row, last);
    return {zeros ? vec<T, 4>(0) : x.low, zeros ? vec<T, 4>(0) : x.high};
  }

  GuardedRows<T> guarded() const { return {base - own, stride, last + 1, dim}; }
};

}  // namespace mfa
