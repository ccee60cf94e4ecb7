// 8-bit numbers with a scale per row, bit for bit those of mfa.quantize_kv: row / scale, where the scale takes the
// row's largest absolute value to the largest number of the format.
#pragma once

#include "features.h"
#include "unroll.h"

namespace mfa {

using namespace metal;

struct Format {
  bool is_int8, is_e5m2;  // neither: float8_e4m3fn

  float largest() const { return is_int8 ? 127 : is_e5m2 ? 57344 : 448; }

  // `magnitude`: the bits of a row's largest absolute value; those of a NaN are above all others.
  float scale(uint magnitude) const {
    const float x = as_type<float>(magnitude) / largest();
    return x < FLT_MIN ? FLT_MIN : x;  // a normal number, which a GPU doesn't round to 0; and a NaN stays
  }
};

inline uint magnitude(float x) { return as_type<uint>(x) & 0x7fffffff; }

// To the nearest, of ties the even one; NaN is 0, whose scale tells.
inline char int8_of(float x) { return isnan(x) ? 0 : char(clamp(rint(x), -127.0f, 127.0f)); }

// To the nearest, of ties the even one; numbers beyond the largest are that.
inline uchar float8_of(float x, Format format) {
  const int mantissa_bits = format.is_e5m2 ? 2 : 3;
  const int dropped = 23 - mantissa_bits;
  const uint bits = min(magnitude(x), as_type<uint>(format.largest()));
  const uint sign = as_type<uint>(x) >> 24 & 0x80;
  // Below the smallest normal number codes count the smallest number; the first normal one is next.
  const float smallest_normal = format.is_e5m2 ? 1.0f / 16384 : 1.0f / 64;
  const float per_smallest = format.is_e5m2 ? 65536 : 512;
  uint code = uint(rint(as_type<float>(bits) * per_smallest));
  if (as_type<float>(bits) >= smallest_normal) {
    const uint rounded = bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1);
    code = (rounded >> dropped) - ((format.is_e5m2 ? 127 - 15 : 127 - 7) << mantissa_bits);
  }
  return isnan(x) ? 0x7f | sign : code | sign;
}

}  // namespace mfa
