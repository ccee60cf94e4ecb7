// Conversions that clang leaves to the compiler's runtime and that libgcc 12 lacks, or has only for some targets.
// Round to nearest, ties to even; NaN stays NaN. A 16-bit float travels in a vector register whatever its format, so
// _Float16, which gcc knows, stands in for __bf16, which it does not.
#include <cstdint>
#include <cstring>

namespace {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

uint16_t bfloat_bits(float value) {
  const auto u = bits<uint32_t>(value);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Rounds to odd, so that rounding again to a shorter format rounds right.
float narrow(double value) {
  float f = static_cast<float>(value);
  if (value != value || static_cast<double>(f) == value) return f;
  auto u = bits<uint32_t>(f);
  const bool away = (static_cast<double>(f) > value) == (value > 0);
  if (away) --u;  // towards zero: an infinity becomes the largest number
  return bits<float>(u | 1);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {
_Float16 __truncsfbf2(float value) { return bits<_Float16>(bfloat_bits(value)); }
_Float16 __truncdfbf2(double value) { return bits<_Float16>(bfloat_bits(narrow(value))); }
}
#pragma GCC visibility pop
