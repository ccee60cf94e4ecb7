// <metal_relational>. clang compares vectors into integer vectors (0 or -1), MSL into bool vectors: both are taken.
#pragma once

namespace metal {

#define MFA_SIM_PREDICATE(name, expression)                             \
  MFA_SIM_INLINE constexpr bool name(float x) { return expression; }    \
  MFA_SIM_INLINE constexpr bool name(half x) { return name(float(x)); } \
  template <typename T, int N, ::mfa_sim::only_if<MFA_SIM_REAL> = 0>    \
  MFA_SIM_INLINE vec<bool, N> name(vec<T, N> x) {                       \
    vec<bool, N> y;                                                     \
    for (int i = 0; i < N; ++i) y[i] = name(static_cast<T>(x[i]));      \
    return y;                                                           \
  }
MFA_SIM_PREDICATE(isnan, __builtin_isnan(x))
MFA_SIM_PREDICATE(isinf, __builtin_isinf(x))
MFA_SIM_PREDICATE(isfinite, __builtin_isfinite(x))
MFA_SIM_PREDICATE(signbit, __builtin_signbit(x) != 0)
#undef MFA_SIM_PREDICATE
MFA_SIM_INLINE constexpr bool isnormal(float x) { return __builtin_isnormal(x); }
MFA_SIM_INLINE constexpr bool isnan(bfloat x) { return __builtin_isnan(static_cast<float>(x)); }
MFA_SIM_INLINE constexpr bool isinf(bfloat x) { return __builtin_isinf(static_cast<float>(x)); }

MFA_SIM_INLINE constexpr bool any(bool x) { return x; }
MFA_SIM_INLINE constexpr bool all(bool x) { return x; }
template <typename T, int N, ::mfa_sim::only_if<is_integral_v<T>> = 0>
MFA_SIM_INLINE bool any(vec<T, N> x) {
  bool y = false;
  for (int i = 0; i < N; ++i) y |= x[i] != 0;
  return y;
}
template <typename T, int N, ::mfa_sim::only_if<is_integral_v<T>> = 0>
MFA_SIM_INLINE bool all(vec<T, N> x) {
  bool y = true;
  for (int i = 0; i < N; ++i) y &= x[i] != 0;
  return y;
}

template <typename T, ::mfa_sim::only_if<::mfa_sim::size_of<T> == 0> = 0>
MFA_SIM_INLINE constexpr T select(T a, T b, bool condition) {
  return condition ? b : a;
}
template <typename T, int N, typename C, ::mfa_sim::only_if<is_integral_v<C>> = 0>
MFA_SIM_INLINE vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> condition) {
  for (int i = 0; i < N; ++i) a[i] = condition[i] != 0 ? b[i] : a[i];
  return a;
}

}  // namespace metal
