// <metal_uniform>: a value that is the same in every lane. Here only a type: nothing checks that it is.
#pragma once

namespace metal {

template <typename T>
struct uniform {
  T value;
  MFA_SIM_INLINE constexpr uniform(T x) : value(x) {}
  MFA_SIM_INLINE constexpr operator T() const { return value; }
};
template <typename T>
MFA_SIM_INLINE constexpr uniform<T> make_uniform(T x) {
  return x;
}

#define MFA_SIM_UNIFORM(operation)                                               \
  template <typename T>                                                          \
  MFA_SIM_INLINE constexpr auto operator operation(uniform<T> a, uniform<T> b) { \
    return make_uniform(static_cast<T>(a.value operation b.value));              \
  }
MFA_SIM_UNIFORM(+)
MFA_SIM_UNIFORM(-)
MFA_SIM_UNIFORM(*)
MFA_SIM_UNIFORM(/)
#undef MFA_SIM_UNIFORM

}  // namespace metal
