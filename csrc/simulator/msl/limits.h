// <metal_limits> and the constants of <metal_math>.
#pragma once

namespace metal {

template <typename T>
struct numeric_limits {
  static constexpr bool is_specialized = false;
};

#define MFA_SIM_INTEGER_LIMITS(T)                                                                   \
  template <>                                                                                       \
  struct numeric_limits<T> {                                                                        \
    static constexpr bool is_specialized = true, is_integer = true, is_exact = true;                \
    static constexpr bool is_signed = static_cast<T>(-1) < static_cast<T>(0);                       \
    static constexpr bool has_infinity = false, has_quiet_NaN = false;                              \
    static constexpr int digits = 8 * sizeof(T) - is_signed;                                        \
    static constexpr T max() { return static_cast<T>(~0ul >> (64 - digits)); }                      \
    static constexpr T min() { return is_signed ? static_cast<T>(-max() - 1) : static_cast<T>(0); } \
    static constexpr T lowest() { return min(); }                                                   \
    static constexpr T infinity() { return 0; }                                                     \
    static constexpr T quiet_NaN() { return 0; }                                                    \
  };
MFA_SIM_INTEGER_LIMITS(char)
MFA_SIM_INTEGER_LIMITS(signed char)
MFA_SIM_INTEGER_LIMITS(uchar)
MFA_SIM_INTEGER_LIMITS(short)
MFA_SIM_INTEGER_LIMITS(ushort)
MFA_SIM_INTEGER_LIMITS(int)
MFA_SIM_INTEGER_LIMITS(uint)
MFA_SIM_INTEGER_LIMITS(long)
MFA_SIM_INTEGER_LIMITS(ulong)
#undef MFA_SIM_INTEGER_LIMITS

#define MFA_SIM_FLOAT_LIMITS(T, U, digits_, max_, min_, epsilon_, denormal_, infinity_, nan_) \
  template <>                                                                                 \
  struct numeric_limits<T> {                                                                  \
    static constexpr bool is_specialized = true, is_integer = false, is_exact = false;        \
    static constexpr bool is_signed = true, has_infinity = true, has_quiet_NaN = true;        \
    static constexpr int digits = digits_;                                                    \
    static constexpr T of(U bits) { return __builtin_bit_cast(T, bits); }                     \
    static constexpr T max() { return of(max_); }                                             \
    static constexpr T lowest() { return -of(max_); }                                         \
    static constexpr T min() { return of(min_); }                                             \
    static constexpr T epsilon() { return of(epsilon_); }                                     \
    static constexpr T denorm_min() { return of(denormal_); }                                 \
    static constexpr T infinity() { return of(infinity_); }                                   \
    static constexpr T quiet_NaN() { return of(nan_); }                                       \
    static constexpr T signaling_NaN() { return of(nan_); }                                   \
  };
MFA_SIM_FLOAT_LIMITS(half, ushort, 11, 0x7bff, 0x0400, 0x1400, 1, 0x7c00, 0x7e00)
MFA_SIM_FLOAT_LIMITS(bfloat, ushort, 8, 0x7f7f, 0x0080, 0x3c00, 1, 0x7f80, 0x7fc0)
MFA_SIM_FLOAT_LIMITS(float, uint, 24, 0x7f7fffff, 0x00800000, 0x34000000, 1, 0x7f800000, 0x7fc00000)
#undef MFA_SIM_FLOAT_LIMITS

}  // namespace metal

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define HUGE_VALH (::metal::numeric_limits<half>::infinity())
#define MAXFLOAT 3.40282347e+38f
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define MAXHALF (::metal::numeric_limits<half>::max())
#define HALF_MAX (::metal::numeric_limits<half>::max())
#define HALF_MIN (::metal::numeric_limits<half>::min())
#define HALF_EPSILON (::metal::numeric_limits<half>::epsilon())
#define BFLOAT_MAX (::metal::numeric_limits<bfloat>::max())
#define CHAR_BIT 8
#define CHAR_MAX 127
#define CHAR_MIN (-128)
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul

#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#define M_E_H half(M_E_F)
#define M_LOG2E_H half(M_LOG2E_F)
#define M_LN2_H half(M_LN2_F)
#define M_PI_H half(M_PI_F)
