// Rows in threadgroup memory, in pairs: rows 2i and 2i + 1 lie there element by element, (x[d], y[d]), as a lane needs
// them of rows that are read transposed (fragment.h). And how the threads of a group copy the rows of a head there, in
// pairs, as they are, or both.
#pragma once

#include "loader.h"

namespace mfa {

// The octet at `at`, its 16-byte chunks where a swizzle of so many elements puts them.
template <typename T>
inline Octet<T> load_swizzled(const threadgroup T* source, int at, int swizzle) {
  return load_octet(source + (at ^ swizzle));
}

inline Octet<float> load_swizzled(const threadgroup float* source, int at, int swizzle) {
  return {load_quad(source + (at ^ swizzle)), load_quad(source + ((at + 4) ^ swizzle))};
}

template <typename T, int kDim>
struct StagedRows<T, kDim, pairs> {
  static constant constexpr int kStride = padded_row_bytes(kDim, sizeof(T), pairs) / sizeof(T);  // half of a pair's

  const threadgroup T* base;

  // What a lane needs of a set, interleaved: J elements of two rows.
  Octet<T> whole_set(short tile, short set, Lane lane) const {
    const threadgroup T* at = set_of_pair(tile, set, lane);
    return load_swizzled(at, 8 * lane.row, swizzle(lane, true));
  }
  vec<T, 4> half_set(short tile, short set, Lane lane) const {
    return load_quad(set_of_pair(tile, set, lane) + ((4 * lane.row) ^ swizzle(lane, false)));
  }

  const threadgroup T* set_of_pair(short tile, short set, Lane lane) const {
    return base + (tile * kFragment + lane.column) * kStride + set * 2 * kSetWidth;
  }
  static int swizzle(Lane lane, bool whole) {
    return swizzle_of_pair(kDim, sizeof(T), lane.column / 2, whole) * (16 / sizeof(T));
  }
};

template <int kDim, typename T>
inline void load_right_transposed(thread Fragment<T>* fragments, StagedRows<T, kDim, pairs> rows, short tile, short set,
                                  Lane lane) {
  if (is_whole<kDim>(set)) {
    fill_right(fragments, rows.whole_set(tile, set, lane));
  } else {
    fill_right(fragments, rows.half_set(tile, set, lane));
  }
}

// A thread's share of the rows of a head that a threadgroup stages, kRows at a time: 16 bytes, of one row or half each
// of two neighbours, in the same place of every kStep-th. Threads that would begin rows but not finish them rest. The
// address of the first is known before the first block, and costs no more registers than that of the head.
template <typename T, int kRows, int kDim, int kNeighbours, int kThreads>
struct Share {
  static constant constexpr int kChunk = 16 / kNeighbours / sizeof(T);
  static constant constexpr int kChunks = kDim / kChunk;
  static constant constexpr int kAcross = kThreads < kChunks ? kThreads : kChunks;
  static constant constexpr int kStep = kThreads / kAcross * kNeighbours;

  short row, d;
  const device T* base;  // of that row and element of the head
  long stride;
  int length, dim;

  Share(HeadRows<T> rows, ushort thread_index)
      : row(thread_index < kThreads / kAcross * kAcross ? thread_index / kAcross * kNeighbours : kRows),
        d(thread_index % kAcross * kChunk),
        base(rows.base + (uint(row) * rows.stride + d)),
        stride(rows.stride),
        length(rows.length),
        dim(rows.dim) {}

  const device T* at(int first) const { return base + uint(first) * stride; }
};

// Copies rows `first` ... of a head into a tile, with zeros from the last row and element on.
template <Loads kLoads, typename T, int kRows, int kDim, int kThreads>
inline void stage(threadgroup T* tile, Share<T, kRows, kDim, 1, kThreads> share, int first) {
  typedef Share<T, kRows, kDim, 1, kThreads> Shared;
  constexpr int kStride = StagedRows<T, kDim, kLoads>::kStride;
  const device T* source = share.at(first);
  for (int row = share.row; row < kRows; row += Shared::kStep) {
    MFA_UNROLL
    for (short e = 0; e < kDim; e += Shared::kAcross * Shared::kChunk) {
      if (share.d + e < kDim) {
        copy_chunk(tile + row * kStride + share.d + e, source + e, row < share.length - first, share.d + e, share.dim);
      }
    }
    if (Shared::kStep >= kRows) {
      return;
    }
    source += Shared::kStep * share.stride;
  }
}

// Two rows, element by element: 8 bytes of each, as fill_right() takes them.
template <typename T>
inline uint4 interleaved(vec<T, 4> x, vec<T, 4> y) {
  Fragment<T> set[kSetFragments];
  fill_right_transposed(set, x, y);
  return uint4(as_type<uint>(set[0]), as_type<uint>(set[1]), as_type<uint>(set[2]), as_type<uint>(set[3]));
}

inline uint4 interleaved(float2 x, float2 y) { return as_type<uint4>(float4(x.x, y.x, x.y, y.y)); }

// 8 bytes of a row from d on.
template <typename T>
inline vec<T, 8 / sizeof(T)> load_chunk(const device T* source, bool is_valid, int d, int dim) {
  constexpr int kChunk = 8 / sizeof(T);
  if (is_aligned && is_valid && d + kChunk <= dim) {
    return *(const device vec<T, kChunk>*)source;
  }
  vec<T, kChunk> x;
  MFA_UNROLL
  for (short e = 0; e < kChunk; ++e) {
    x[e] = is_valid && d + e < dim ? source[e] : T(0);
  }
  return x;
}

// As stage(), in pairs (at `paired`), as they are (at `plain`), or both.
template <typename T, int kRows, int kDim, int kThreads>
inline void stage_copies(threadgroup T* paired, bool wants_paired, threadgroup T* plain, bool wants_plain,
                         Share<T, kRows, kDim, 2, kThreads> share, int first) {
  typedef Share<T, kRows, kDim, 2, kThreads> Shared;
  typedef vec<T, Shared::kChunk> Chunk;
  constexpr int kPairStride = 2 * StagedRows<T, kDim, pairs>::kStride;
  constexpr int kPlainStride = StagedRows<T, kDim, octets>::kStride;
  const device T* source = share.at(first);
  const int valid = share.length - first;
  for (int row = share.row; row < kRows; row += Shared::kStep) {
    MFA_UNROLL
    for (short e = 0; e < kDim; e += Shared::kAcross * Shared::kChunk) {
      const int d = share.d + e;
      if (d >= kDim) {
        continue;
      }
      const Chunk x = load_chunk(source + e, row < valid, d, share.dim);
      const Chunk y = load_chunk(source + share.stride + e, row + 1 < valid, d, share.dim);
      if (wants_paired) {
        const int swizzle = swizzle_of_pair(kDim, sizeof(T), row / 2, is_whole<kDim>(d / kSetWidth));
        ((threadgroup uint4*)(paired + row / 2 * kPairStride))[(d / Shared::kChunk) ^ swizzle] = interleaved(x, y);
      }
      if (wants_plain) {
        threadgroup T* target = plain + row * kPlainStride + d;
        *(threadgroup Chunk*)target = x;
        *(threadgroup Chunk*)(target + kPlainStride) = y;
      }
    }
    if (Shared::kStep >= kRows) {
      return;
    }
    source += Shared::kStep * share.stride;
  }
}

template <typename T, int kRows, int kDim, int kThreads>
inline void stage_pairs(threadgroup T* tile, Share<T, kRows, kDim, 2, kThreads> share, int first) {
  stage_copies(tile, true, tile, false, share, first);
}

// Rows that are read in both ways: a copy for each ...
template <typename T, int kDim, bool kTwice = sizeof(T) == 2>
struct StagedTwice {
  static constant constexpr int kPairedStride = paired_row_bytes(kDim, sizeof(T)) / sizeof(T);
  static constant constexpr int kPlainStride = plain_row_bytes(kDim, sizeof(T)) / sizeof(T);
  static constant constexpr int kNeighbours = 2;

  StagedRows<T, kDim, pairs> paired;
  StagedRows<T, kDim, octets> plain;

  StagedTwice(const threadgroup T* paired_, const threadgroup T* plain_) : paired{paired_}, plain{plain_} {}

  template <typename Shared>
  static void stage(threadgroup T* paired, bool wants_paired, threadgroup T* plain, bool wants_plain, Shared share,
                    int first) {
    stage_copies(paired, wants_paired, plain, wants_plain, share, first);
  }
};

// ... or, of 32 bits, the plain one for both.
template <typename T, int kDim>
struct StagedTwice<T, kDim, false> {
  static constant constexpr int kPairedStride = 0;
  static constant constexpr int kPlainStride = plain_row_bytes(kDim, sizeof(T)) / sizeof(T);
  static constant constexpr int kNeighbours = 1;

  StagedRows<T, kDim, both> paired, plain;

  StagedTwice(const threadgroup T*, const threadgroup T* plain_) : paired{plain_}, plain{plain_} {}

  template <typename Shared>
  static void stage(threadgroup T*, bool, threadgroup T* plain, bool, Shared share, int first) {
    mfa::stage<both>(plain, share, first);
  }
};

template <int kDim, typename T>
inline void load_right_transposed(thread Fragment<T>* fragments, StagedTwice<T, kDim> rows, short tile, short set,
                                  Lane lane) {
  load_right_transposed<kDim>(fragments, rows.paired, tile, set, lane);
}

template <int kDim, typename T>
inline void load_right(thread Fragment<T>* fragments, StagedTwice<T, kDim> rows, short tile, short set, Lane lane) {
  load_right<kDim>(fragments, rows.plain, tile, set, lane);
}

}  // namespace mfa
