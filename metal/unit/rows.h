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

// Rows from `valid` on read as the last one, without a branch: for left operands, whose rows are those of results, of
// which nobody looks at these. At least one row is valid.
template <typename T>
struct ClampedRows {
  const device T* base;
  long stride;
  int valid;

  OpenRows<T> of(short tile, short row) const {
    return {base + min(tile * kFragment + row, valid - 1) * stride, stride};
  }
  vec<T, 4> quad(short tile, short row, short d) const { return of(tile, row).quad(0, 0, d); }
  Octet<T> octet(short tile, short row, short d) const { return of(tile, row).octet(0, 0, d); }
};

// Rows of a block: open or bounded.
template <bool kIsOpen, typename T>
inline conditional_t<kIsOpen, OpenRows<T>, BoundedRows<T>> unit_rows(GuardedRows<T> rows) {
  if constexpr (kIsOpen) {
    return {rows.base, rows.stride};
  } else {
    return {rows.base, rows.stride, rows.valid};
  }
}

}  // namespace mfa
