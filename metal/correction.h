// What rounding took from `out`, for backward: delta = rowsum(dO * O) cancels most of dP in a row that a few keys
// dominate, and what remained would be the rounding of O. Of 16-bit types only. A half whatever the type: that is 19
// bits of O at least, and 22 of a half. Strides are those of out.
#pragma once

#include "tile.h"

namespace mfa {

// Replaces a tile by what store_rows() rounds off when it stores it; finite, since a bfloat may lose more than a half
// holds.
template <typename T, int kRowTiles, int kFragments>
inline void keep_rounding(thread Fragment<float> (&tile)[kRowTiles][kFragments], thread float* factor) {
  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    MFA_UNROLL
    for (short j = 0; j < kFragments; ++j) {
      const float2 x = tile[r][j] * factor[r];
      tile[r][j] = clamp(x - float2(vec<T, 2>(x)), -float(HALF_MAX), float(HALF_MAX));
    }
    factor[r] = 1;
  }
}

}  // namespace mfa
