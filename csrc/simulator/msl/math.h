// <metal_math>, <metal_integer>, <metal_common>, <metal_geometric>. fast:: and precise:: are the same functions.
//
// Scalar functions are plain overloads for half and float, so that max(float, half) and the like stay ambiguous, as
// they are in MSL. There is none for bfloat: Apple's header has none either.
#pragma once

namespace mfa_sim {
template <typename T>
constexpr bool is_real = __is_same(T, float) || __is_same(T, half);
template <typename T>
constexpr bool is_number = is_real<T> || (metal::is_integral_v<T> && !__is_same(T, bool));
template <bool B>
using only_if = metal::enable_if_t<B, int>;
using int128 = __int128;
using uint128 = unsigned __int128;
}  // namespace mfa_sim

namespace metal {

// MFA_SIM_MAP*(name, condition): the vector form of a scalar function, element by element.
#define MFA_SIM_MAP1(name, condition)                              \
  template <typename T, int N, ::mfa_sim::only_if<condition> = 0>  \
  MFA_SIM_INLINE vec<T, N> name(vec<T, N> x) {                     \
    vec<T, N> y;                                                   \
    for (int i = 0; i < N; ++i) y[i] = name(static_cast<T>(x[i])); \
    return y;                                                      \
  }
#define MFA_SIM_MAP2(name, condition)                                                    \
  template <typename T, int N, ::mfa_sim::only_if<condition> = 0>                        \
  MFA_SIM_INLINE vec<T, N> name(vec<T, N> a, vec<T, N> b) {                              \
    vec<T, N> y;                                                                         \
    for (int i = 0; i < N; ++i) y[i] = name(static_cast<T>(a[i]), static_cast<T>(b[i])); \
    return y;                                                                            \
  }
#define MFA_SIM_MAP3(name, condition)                                                                          \
  template <typename T, int N, ::mfa_sim::only_if<condition> = 0>                                              \
  MFA_SIM_INLINE vec<T, N> name(vec<T, N> a, vec<T, N> b, vec<T, N> c) {                                       \
    vec<T, N> y;                                                                                               \
    for (int i = 0; i < N; ++i) y[i] = name(static_cast<T>(a[i]), static_cast<T>(b[i]), static_cast<T>(c[i])); \
    return y;                                                                                                  \
  }
#define MFA_SIM_REAL ::mfa_sim::is_real<T>
#define MFA_SIM_NUMBER ::mfa_sim::is_number<T>
#define MFA_SIM_INTEGER (::mfa_sim::is_number<T> && !::mfa_sim::is_real<T>)

// MFA_SIM_REAL*(name, expression of floats): half goes through float.
#define MFA_SIM_REAL1(name, expression)                                       \
  MFA_SIM_INLINE constexpr float name(float x) { return expression; }         \
  MFA_SIM_INLINE constexpr half name(half x) { return half(name(float(x))); } \
  MFA_SIM_MAP1(name, MFA_SIM_REAL)
#define MFA_SIM_REAL2(name, expression)                                                         \
  MFA_SIM_INLINE constexpr float name(float a, float b) { return expression; }                  \
  MFA_SIM_INLINE constexpr half name(half a, half b) { return half(name(float(a), float(b))); } \
  MFA_SIM_MAP2(name, MFA_SIM_REAL)
#define MFA_SIM_REAL3(name, expression)                                                                           \
  MFA_SIM_INLINE constexpr float name(float a, float b, float c) { return expression; }                           \
  MFA_SIM_INLINE constexpr half name(half a, half b, half c) { return half(name(float(a), float(b), float(c))); } \
  MFA_SIM_MAP3(name, MFA_SIM_REAL)

MFA_SIM_REAL1(sqrt, __builtin_sqrtf(x))
MFA_SIM_REAL1(rsqrt, 1.0f / __builtin_sqrtf(x))
MFA_SIM_REAL1(exp, (MFA_SIM_COUNT_EXP(1), __builtin_expf(x)))
MFA_SIM_REAL1(exp2, (MFA_SIM_COUNT_EXP(1), __builtin_exp2f(x)))
MFA_SIM_REAL1(exp10, (MFA_SIM_COUNT_EXP(1), __builtin_powf(10.0f, x)))
MFA_SIM_REAL1(log, __builtin_logf(x))
MFA_SIM_REAL1(log2, __builtin_log2f(x))
MFA_SIM_REAL1(log10, __builtin_log10f(x))
MFA_SIM_REAL1(sin, __builtin_sinf(x))
MFA_SIM_REAL1(cos, __builtin_cosf(x))
MFA_SIM_REAL1(tan, __builtin_tanf(x))
MFA_SIM_REAL1(sinpi, __builtin_sinf(x * 3.14159265358979323846f))
MFA_SIM_REAL1(cospi, __builtin_cosf(x * 3.14159265358979323846f))
MFA_SIM_REAL1(tanpi, __builtin_tanf(x * 3.14159265358979323846f))
MFA_SIM_REAL1(asin, __builtin_asinf(x))
MFA_SIM_REAL1(acos, __builtin_acosf(x))
MFA_SIM_REAL1(atan, __builtin_atanf(x))
MFA_SIM_REAL1(sinh, __builtin_sinhf(x))
MFA_SIM_REAL1(cosh, __builtin_coshf(x))
MFA_SIM_REAL1(tanh, __builtin_tanhf(x))
MFA_SIM_REAL1(asinh, __builtin_asinhf(x))
MFA_SIM_REAL1(acosh, __builtin_acoshf(x))
MFA_SIM_REAL1(atanh, __builtin_atanhf(x))
MFA_SIM_REAL1(floor, __builtin_floorf(x))
MFA_SIM_REAL1(ceil, __builtin_ceilf(x))
MFA_SIM_REAL1(trunc, __builtin_truncf(x))
MFA_SIM_REAL1(round, __builtin_roundf(x))
MFA_SIM_REAL1(rint, __builtin_rintf(x))
MFA_SIM_REAL1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MFA_SIM_REAL1(fabs, __builtin_fabsf(x))
MFA_SIM_REAL1(abs, __builtin_fabsf(x))
MFA_SIM_REAL1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)
MFA_SIM_REAL1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
MFA_SIM_REAL2(pow, __builtin_powf(a, b))
MFA_SIM_REAL2(powr, __builtin_powf(a, b))
MFA_SIM_REAL2(atan2, __builtin_atan2f(a, b))
MFA_SIM_REAL2(fmod, __builtin_fmodf(a, b))
MFA_SIM_REAL2(fdim, __builtin_fdimf(a, b))
MFA_SIM_REAL2(copysign, __builtin_copysignf(a, b))
MFA_SIM_REAL2(divide, a / b)
MFA_SIM_REAL2(step, b < a ? 0.0f : 1.0f)
MFA_SIM_REAL2(min, __builtin_fminf(a, b))
MFA_SIM_REAL2(max, __builtin_fmaxf(a, b))
MFA_SIM_REAL2(fmin, __builtin_fminf(a, b))
MFA_SIM_REAL2(fmax, __builtin_fmaxf(a, b))
MFA_SIM_REAL3(fma, __builtin_fmaf(a, b, c))
MFA_SIM_REAL3(clamp, __builtin_fminf(__builtin_fmaxf(a, b), c))
MFA_SIM_REAL3(mix, a + (b - a) * c)
MFA_SIM_REAL3(min3, __builtin_fminf(__builtin_fminf(a, b), c))
MFA_SIM_REAL3(max3, __builtin_fmaxf(__builtin_fmaxf(a, b), c))
MFA_SIM_REAL3(fmin3, __builtin_fminf(__builtin_fminf(a, b), c))
MFA_SIM_REAL3(fmax3, __builtin_fmaxf(__builtin_fmaxf(a, b), c))
MFA_SIM_REAL3(median3, __builtin_fmaxf(__builtin_fminf(a, b), __builtin_fminf(__builtin_fmaxf(a, b), c)))
MFA_SIM_REAL3(smoothstep, (c = saturate((c - a) / (b - a)), c * c * (3.0f - 2.0f * c)))

MFA_SIM_INLINE half nextafter(half a, half b) {
  if (a != a || b != b || a == b) return a == b ? b : half(NAN);
  const short bits = as_type<short>(a);
  if (a == half(0)) return as_type<half>(short(b > a ? 1 : short(0x8001)));
  return as_type<half>(short((a < b) == (a > half(0)) ? bits + 1 : bits - 1));
}
MFA_SIM_INLINE float nextafter(float a, float b) { return __builtin_nextafterf(a, b); }
MFA_SIM_MAP2(nextafter, MFA_SIM_REAL)
MFA_SIM_INLINE float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
MFA_SIM_INLINE half ldexp(half x, int k) { return half(__builtin_ldexpf(x, k)); }
MFA_SIM_INLINE int ilogb(float x) { return __builtin_ilogbf(x); }
MFA_SIM_INLINE int ilogb(half x) { return __builtin_ilogbf(x); }
MFA_SIM_INLINE float frexp(float x, thread int& exponent) { return __builtin_frexpf(x, &exponent); }
MFA_SIM_INLINE half frexp(half x, thread int& exponent) { return half(__builtin_frexpf(x, &exponent)); }
MFA_SIM_INLINE float modf(float x, thread float& whole) {
  whole = __builtin_truncf(x);
  return __builtin_copysignf(x - whole, x);
}
MFA_SIM_INLINE float sincos(float x, thread float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}

// Integers.
#define MFA_SIM_INTEGERS(T, U, W)                                                                                      \
  MFA_SIM_INLINE constexpr T min(T a, T b) { return b < a ? b : a; }                                                   \
  MFA_SIM_INLINE constexpr T max(T a, T b) { return a < b ? b : a; }                                                   \
  MFA_SIM_INLINE constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }                                         \
  MFA_SIM_INLINE constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }                                         \
  MFA_SIM_INLINE constexpr T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }                      \
  MFA_SIM_INLINE constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }                              \
  MFA_SIM_INLINE constexpr T abs(T x) { return x < 0 ? static_cast<T>(-x) : x; }                                       \
  MFA_SIM_INLINE constexpr U absdiff(T a, T b) {                                                                       \
    return a < b ? static_cast<U>(U(b) - U(a)) : static_cast<U>(U(a) - U(b));                                          \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T addsat(T a, T b) {                                                                        \
    T y = 0;                                                                                                           \
    return !__builtin_add_overflow(a, b, &y) ? y : b < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();        \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T subsat(T a, T b) {                                                                        \
    T y = 0;                                                                                                           \
    return !__builtin_sub_overflow(a, b, &y) ? y : a < b ? numeric_limits<T>::min() : numeric_limits<T>::max();        \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T mulhi(T a, T b) { return static_cast<T>((W(a) * W(b)) >> (8 * sizeof(T))); }              \
  MFA_SIM_INLINE constexpr T madhi(T a, T b, T c) { return static_cast<T>(mulhi(a, b) + c); }                          \
  MFA_SIM_INLINE constexpr T hadd(T a, T b) { return static_cast<T>((W(a) + W(b)) >> 1); }                             \
  MFA_SIM_INLINE constexpr T rhadd(T a, T b) { return static_cast<T>((W(a) + W(b) + 1) >> 1); }                        \
  MFA_SIM_INLINE constexpr T rotate(T x, T by) {                                                                       \
    constexpr int bits = 8 * sizeof(T);                                                                                \
    const int n = static_cast<int>(U(by) % bits);                                                                      \
    return static_cast<T>(n == 0 ? U(x) : static_cast<U>(U(x) << n | U(x) >> (bits - n)));                             \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T popcount(T x) { return static_cast<T>(__builtin_popcountl(ulong(U(x)))); }                \
  MFA_SIM_INLINE constexpr T clz(T x) {                                                                                \
    return static_cast<T>(x == 0 ? 8 * sizeof(T) : __builtin_clzl(ulong(U(x))) - (64 - 8 * sizeof(T)));                \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T ctz(T x) { return static_cast<T>(x == 0 ? 8 * sizeof(T) : __builtin_ctzl(ulong(U(x)))); } \
  MFA_SIM_INLINE constexpr T reverse_bits(T x) {                                                                       \
    return static_cast<T>(__builtin_bitreverse64(ulong(U(x))) >> (64 - 8 * sizeof(T)));                                \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T extract_bits(T x, uint offset, uint bits) {                                               \
    constexpr uint width = 8 * sizeof(T);                                                                              \
    return bits == 0 ? T(0) : static_cast<T>(static_cast<T>(U(x) << (width - bits - offset)) >> (width - bits));       \
  }                                                                                                                    \
  MFA_SIM_INLINE constexpr T insert_bits(T base, T x, uint offset, uint bits) {                                        \
    const U mask = static_cast<U>((bits == 8 * sizeof(T) ? ~0ul : (1ul << bits) - 1) << offset);                       \
    return static_cast<T>((U(base) & ~mask) | (static_cast<U>(U(x) << offset) & mask));                                \
  }
MFA_SIM_INTEGERS(char, uchar, int)
MFA_SIM_INTEGERS(uchar, uchar, int)
MFA_SIM_INTEGERS(short, ushort, int)
MFA_SIM_INTEGERS(ushort, ushort, long)
MFA_SIM_INTEGERS(int, uint, long)
MFA_SIM_INTEGERS(uint, uint, ulong)
MFA_SIM_INTEGERS(long, ulong, ::mfa_sim::int128)
MFA_SIM_INTEGERS(ulong, ulong, ::mfa_sim::uint128)
#undef MFA_SIM_INTEGERS
MFA_SIM_MAP2(min, MFA_SIM_INTEGER)
MFA_SIM_MAP2(max, MFA_SIM_INTEGER)
MFA_SIM_MAP3(min3, MFA_SIM_INTEGER)
MFA_SIM_MAP3(max3, MFA_SIM_INTEGER)
MFA_SIM_MAP3(clamp, MFA_SIM_INTEGER)
MFA_SIM_MAP1(abs, MFA_SIM_INTEGER)
MFA_SIM_MAP2(addsat, MFA_SIM_INTEGER)
MFA_SIM_MAP2(subsat, MFA_SIM_INTEGER)
MFA_SIM_MAP2(mulhi, MFA_SIM_INTEGER)
MFA_SIM_MAP2(hadd, MFA_SIM_INTEGER)
MFA_SIM_MAP2(rhadd, MFA_SIM_INTEGER)
MFA_SIM_MAP2(rotate, MFA_SIM_INTEGER)
MFA_SIM_MAP1(popcount, MFA_SIM_INTEGER)
MFA_SIM_MAP1(clz, MFA_SIM_INTEGER)
MFA_SIM_MAP1(ctz, MFA_SIM_INTEGER)
MFA_SIM_MAP1(reverse_bits, MFA_SIM_INTEGER)
MFA_SIM_INLINE constexpr int mul24(int a, int b) { return a * b; }
MFA_SIM_INLINE constexpr uint mul24(uint a, uint b) { return a * b; }
MFA_SIM_INLINE constexpr int mad24(int a, int b, int c) { return a * b + c; }
MFA_SIM_INLINE constexpr uint mad24(uint a, uint b, uint c) { return a * b + c; }

// Forms that mix a vector with scalars.
template <typename T, int N>
MFA_SIM_INLINE vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return clamp(x, vec<T, N>(low), vec<T, N>(high));
}
template <typename T, int N>
MFA_SIM_INLINE vec<T, N> mix(vec<T, N> a, vec<T, N> b, T t) {
  return mix(a, b, vec<T, N>(t));
}
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE vec<T, N> ldexp(vec<T, N> x, vec<int, N> k) {
  for (int i = 0; i < N; ++i) x[i] = ldexp(static_cast<T>(x[i]), k[i]);
  return x;
}

// Geometry.
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum = fma(static_cast<T>(a[i]), static_cast<T>(b[i]), sum);
  return sum;
}
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE T length_squared(vec<T, N> x) {
  return dot(x, x);
}
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE T length(vec<T, N> x) {
  return sqrt(dot(x, x));
}
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE T distance_squared(vec<T, N> a, vec<T, N> b) {
  return length_squared(a - b);
}
template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE vec<T, N> normalize(vec<T, N> x) {
  return x * rsqrt(dot(x, x));
}
template <typename T, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>
MFA_SIM_INLINE vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}

#define MFA_SIM_VARIANTS                                                                                            \
  using metal::abs, metal::acos, metal::acosh, metal::asin, metal::asinh, metal::atan, metal::atan2, metal::atanh,  \
      metal::ceil, metal::clamp, metal::copysign, metal::cos, metal::cosh, metal::cospi, metal::divide, metal::dot, \
      metal::distance, metal::exp, metal::exp10, metal::exp2, metal::fabs, metal::fdim, metal::floor, metal::fma,   \
      metal::fmax, metal::fmax3, metal::fmin, metal::fmin3, metal::fmod, metal::fract, metal::frexp, metal::ldexp,  \
      metal::length, metal::log, metal::log10, metal::log2, metal::max, metal::max3, metal::median3, metal::min,    \
      metal::min3, metal::mix, metal::modf, metal::normalize, metal::pow, metal::powr, metal::rint, metal::round,   \
      metal::rsqrt, metal::saturate, metal::sign, metal::sin, metal::sincos, metal::sinh, metal::sinpi,             \
      metal::smoothstep, metal::sqrt, metal::step, metal::tan, metal::tanh, metal::tanpi, metal::trunc;
namespace fast {
MFA_SIM_VARIANTS
}
namespace precise {
MFA_SIM_VARIANTS
}
#undef MFA_SIM_VARIANTS

}  // namespace metal
