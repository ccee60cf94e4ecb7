// The two products that attention is made of, in 8x8 matrices; included by tile.h.
#pragma once

namespace mfa {

// In float32 a long sum is made of parts, each summed by itself first: one chain would lose more than PyTorch's own
// matrix products do. In 16-bit types the rounding of the inputs hides that.
template <typename T>
constant constexpr bool kSumsInParts = sizeof(T) == 4;

// Adds `columns` of a part to the columns `first` ... of the result.
template <int kRowTiles, int kColumnTiles, int kPartTiles>
inline void add_part(thread Fragment<float> (&result)[kRowTiles][kColumnTiles],
                     thread Fragment<float> (&part)[kRowTiles][kPartTiles], short first, short columns) {
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    MFA_UNROLL
    for (short c = 0; c < kPartTiles; ++c) {
      if (c < columns) {
        result[r][first + c] += part[r][c];
      }
    }
  }
}

// Column tiles of S that are loaded together: with two row tiles, four independent accumulation chains hide the latency
// of an MMA.
template <typename Left>
constant constexpr int kMostTogether = 2;

// S = A B': kDim values of the head dimension, kColumnTiles * 8 rows of B.
template <typename T, int kDim, int kRowTiles, int kColumnTiles, typename Left, typename Rows>
inline void multiply_transposed(thread Fragment<float> (&result)[kRowTiles][kColumnTiles], thread const Left& left,
                                Rows rows, Lane lane) {
  constexpr int kTogether = kColumnTiles % 2 == 0 ? kMostTogether<Left> : 1;
  clear(result);
  MFA_UNROLL
  for (short s = 0; s < sets_of(kDim); ++s) {
    Fragment<T> a[kRowTiles][kSetFragments];
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      left.fill(a[r], r, s, lane);
    }
    MFA_UNROLL
    for (short first = 0; first < kColumnTiles; first += kTogether) {
      Fragment<T> b[kTogether][kSetFragments];
      MFA_UNROLL
      for (short c = 0; c < kTogether; ++c) {
        load_right_transposed<kDim>(b[c], rows, first + c, s, lane);
      }
      Fragment<float> part[kRowTiles][kTogether];
      clear(part);
      MFA_UNROLL
      for (short j = 0; j < kSetFragments; ++j) {
        if (j >= fragments_of<kDim>(s)) {
          continue;
        }
        MFA_UNROLL
        for (short c = 0; c < kTogether; ++c) {
          MFA_UNROLL
          for (short r = 0; r < kRowTiles; ++r) {
            thread Fragment<float>& sum = kSumsInParts<T> ? part[r][c] : result[r][first + c];
            sum = multiply_add(a[r][j], b[c][j], sum);
          }
        }
      }
      if (kSumsInParts<T>) {
        add_part(result, part, first, kTogether);
      }
    }
  }
}

// A left operand of floats counts whole, so there is nothing to refine as on the matrix unit.
template <typename T>
constant constexpr bool kMayRefine = false;

// C += P B: kInnerTiles * 8 rows of B, kDim of its columns.
template <typename T, int kDim, int kRowTiles, int kInnerTiles, typename Rows>
inline void multiply_accumulate(thread Fragment<float> (&result)[kRowTiles][kDim / kFragment],
                                thread Fragment<float> (&left)[kRowTiles][kInnerTiles], Rows rows, Lane lane,
                                bool = false) {
  MFA_UNROLL
  for (short s = 0; s < sets_of(kDim); ++s) {
    const short first = s * kSetFragments;
    Fragment<float> part[kRowTiles][kSetFragments];
    clear(part);
    MFA_UNROLL
    for (short k = 0; k < kInnerTiles; ++k) {
      Fragment<T> b[kSetFragments];
      load_right<kDim>(b, rows, k, s, lane);
      MFA_UNROLL
      for (short j = 0; j < kSetFragments; ++j) {
        if (j >= fragments_of<kDim>(s)) {
          continue;
        }
        MFA_UNROLL
        for (short r = 0; r < kRowTiles; ++r) {
          thread Fragment<float>& sum = kSumsInParts<T> ? part[r][j] : result[r][first + j];
          sum = multiply_add(left[r][k], b[j], sum);
        }
      }
    }
    if (kSumsInParts<T>) {
      add_part(result, part, first, fragments_of<kDim>(s));
    }
  }
}

}  // namespace mfa
