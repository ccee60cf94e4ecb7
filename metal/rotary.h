// Rotary embeddings (Su et al. 2021): a pair (a, b) of a row's dimensions becomes (a cos - b sin, b cos + a sin), in
// float. Interleaved pairs are 2i and 2i + 1, the others i and i + R/2; dimensions from R on stay as they are.
#pragma once

#include "loader.h"

namespace mfa {

// Of rows at one position.
template <typename T>
struct Rotation {
  const device uchar* cosines;  // [R/2]
  const device uchar* sines;
  int pairs;  // R/2; 0: nothing turns

  Rotation() : cosines(nullptr), sines(nullptr), pairs(0) {}

  // Positions that the tables don't have are the nearest that they have.
  Rotation(constant AttentionParams& params, const device uchar* cos, const device uchar* sin, int first, int token)
      : pairs(params.rotary_pairs) {
    const int last = params.rotary_positions - 1;
    const int position = min(min(max(first, 0), last) + token, last);
    const long offset = long(position) * pairs * (is_rotary_float ? sizeof(float) : sizeof(T));
    cosines = cos + offset;
    sines = sin + offset;
  }

  static float entry(const device uchar* table, int pair) {
    return is_rotary_float ? ((const device float*)table)[pair] : float(((const device T*)table)[pair]);
  }

  // Dimension d < R of a row that has x there.
  T turned(const device T* row, T x, int d) const {
    const bool is_first = is_rotary_interleaved ? d % 2 == 0 : d < pairs;
    const int pair = is_rotary_interleaved ? d / 2 : is_first ? d : d - pairs;
    const int other = is_rotary_interleaved ? d ^ 1 : is_first ? d + pairs : d - pairs;
    // Statements of their own: within one, a compiler may contract a product and a sum to an fma, and composed
    // operations of PyTorch round both.
    const float own = float(x) * entry(cosines, pair);
    const float crossed = float(row[other]) * entry(sines, pair);
    return T(is_first ? own - crossed : own + crossed);
  }

  // Four dimensions from d on; zeros where the row ends.
  vec<T, 4> quad(const device T* row, int d, int dim) const {
    vec<T, 4> x = GuardedRows<T>{row, 0, 1, dim}.quad(0, 0, d);
    if (has_rotary) {
      MFA_UNROLL
      for (short e = 0; e < 4; ++e) {
        if (d + e < 2 * pairs) {
          x[e] = turned(row, x[e], d + e);
        }
      }
    }
    return x;
  }
};

}  // namespace mfa
