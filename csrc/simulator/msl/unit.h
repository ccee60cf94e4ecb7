// The matrix unit of M5: how its operands are spread over the lanes of a SIMD-group, and its arithmetic; the same on
// every engine.
#pragma once

#include "elements.h"

namespace mfa_sim {

struct Place {
  int row, column;
};
constexpr bool operator==(Place a, Place b) { return a.row == b.row && a.column == b.column; }

// A kRows x kColumns operand, stored as its transpose if so. MFA_SIM_UNIT_LAYOUT, an Apple GPU family, says whose
// layout it is. Both go by tiles of 16x16, of which a lane has 8 elements in 2 rows, 8 apart.
template <int kRows, int kColumns, bool kIsTransposed>
struct Spread {
  static constexpr int kCapacity = kRows * kColumns / kLanes;

  static constexpr Place stored(int lane, int i) {
#if MFA_SIM_UNIT_LAYOUT >= 10
    // Of the matrix in memory: four neighbours per row, and one tile after the other. How tiles of several rows follow
    // each other has been seen for a right operand of 32 rows; where there are several rows and columns of tiles it is
    // a guess.
    constexpr int kTiles = (kIsTransposed ? kRows : kColumns) / 16;
    const int tile = i / 8;
    return {16 * (tile / kTiles) + row_of(lane) + 8 * (i / 4 % 2), 16 * (tile % kTiles) + 2 * column_of(lane) + i % 4};
#else
    // Of the operand, in simdgroup_matrices of 8x8: the upper halves of a row of tiles first.
    constexpr int kTiles = kColumns / 16;
    const int half = i / (4 * kTiles), tile = i / 4 % kTiles;
    const Place place = {8 * half + row_of(lane), 16 * tile + column_of(lane) + i % 2 + 8 * (i / 2 % 2)};
    return kIsTransposed ? Place{place.column, place.row} : place;
#endif
  }
  static constexpr Place logical(int lane, int i) {
    const Place place = stored(lane, i);
    return kIsTransposed ? Place{place.column, place.row} : place;
  }

  // By lane and element: offsets into a row-major kRows x kColumns matrix.
  struct Offsets {
    ushort of[kLanes][kCapacity];
    constexpr Offsets() : of() {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kCapacity; ++i) {
          const Place place = logical(lane, i);
          of[lane][i] = static_cast<ushort>(place.row * kColumns + place.column);
        }
      }
    }
  };
  static constexpr Offsets kOffsets{};
};

// What the unit sees of an element: of a float 10 bits of the mantissa, cut towards zero.
MFA_SIM_UNCHECKED MFA_SIM_INLINE float seen(float x) {
  return x == x ? __builtin_bit_cast(float, __builtin_bit_cast(uint, x) & 0xffffe000u) : x;
}
MFA_SIM_UNCHECKED MFA_SIM_INLINE float seen(half x) { return static_cast<float>(x); }
MFA_SIM_UNCHECKED MFA_SIM_INLINE float seen(bfloat x) { return static_cast<float>(x); }
MFA_SIM_UNCHECKED MFA_SIM_INLINE int seen(char x) { return x; }
MFA_SIM_UNCHECKED MFA_SIM_INLINE int seen(signed char x) { return x; }
MFA_SIM_UNCHECKED MFA_SIM_INLINE int seen(uchar x) { return x; }

// sum += left right over 16 terms: pairs, pairs that lie 8 apart, then these four in order. Rounded at each step;
// products are exact.
template <typename V>
MFA_SIM_UNCHECKED MFA_SIM_INLINE V add_products(V sum, const float* left, const V* right) {
  V pair[8];
  for (int i = 0; i < 8; ++i) {
    pair[i] = __builtin_elementwise_fma(V(left[2 * i]), right[2 * i], left[2 * i + 1] * right[2 * i + 1]);
  }
  for (int j = 0; j < 4; ++j) sum += pair[j] + pair[j + 4];
  return sum;
}
template <typename V>
MFA_SIM_UNCHECKED MFA_SIM_INLINE V add_products(V sum, const int* left, const V* right) {
  for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
  return sum;
}

}  // namespace mfa_sim
