// Rows in device memory as operands of the matrix unit, of heads without a tail: aligned, and of the instance's head
// dimension.
#pragma once

#include "../loader.h"

namespace mfa {

// All rows are there.
template <typename T>
struct OpenRows {
  const device T* base;
  long stride;

  vec<T, 4> quad(short tile, short row, short d) const {
    return load_quad(base + (tile * kFragment + row) * stride + d);
  }
  Octet<T> octet(short tile, short row, short d) const {
    return load_octet(base + (tile * kFragment + row) * stride + d);
  }
};

// Rows from `valid` on read as zeros: they may hold NaN, and 0 * NaN would reach the output.
template <typename T>
struct BoundedRows {
  const device T* base;
  long stride;
  int valid;

  vec<T, 4> quad(short tile, short row, short d) const {
    return tile * kFragment + row < valid ? OpenRows<T>{base, stride}.quad(tile, row, d) : vec<T, 4>(0);
  }
  Octet<T> octet(short tile, short row, short d) const {
    if (tile * kFragment + row < valid) {
      return OpenRows<T>{base, stride}.octet(tile, row, d);
    }
    return {vec<T, 4>(0), vec<T, 4>(0)};
  }
};

}  // namespace mfa
