// <metal_atomic>, relaxed only. Fibers never interleave inside one of these, and none is instrumented: atomics race
// with nothing.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || __is_same(T, bool), "no such atomic type");
  T mfa_sim_value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;
using atomic_ulong = atomic<ulong>;

}  // namespace metal

namespace mfa_sim {

struct Exchanged {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T, T b) {
    return b;
  }
};
struct Difference {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return static_cast<T>(a - b);
  }
};

// Operation applied in place; the old value.
template <typename Operation, typename T>
inline MFA_SIM_UNCHECKED __attribute__((noinline)) T update(volatile T* target, T operand) {
  const T old = *target;
  *target = Operation::apply(old, operand);
  return old;
}
template <typename T>
inline MFA_SIM_UNCHECKED __attribute__((noinline)) T read(const volatile T* source) {
  return *source;
}
template <typename T>
inline MFA_SIM_UNCHECKED __attribute__((noinline)) bool compare_exchange(volatile T* target, T* expected, T desired) {
  const T old = *target;
  if (old == *expected) {
    *target = desired;
    return true;
  }
  *expected = old;
  return false;
}

template <typename T>
struct Same {
  using type = T;
};
template <typename T>
using same = typename Same<T>::type;

}  // namespace mfa_sim

namespace metal {

#define MFA_SIM_UPDATE(space, name, result, ret, operation)                                                   \
  template <typename T>                                                                                       \
  MFA_SIM_INLINE result name(volatile space atomic<T>* object, ::mfa_sim::same<T> operand, memory_order) {    \
    ret::mfa_sim::update<::mfa_sim::operation>((volatile T*)&object->mfa_sim_value, static_cast<T>(operand)); \
  }
#define MFA_SIM_ATOMICS(space)                                                                                        \
  template <typename T>                                                                                               \
  MFA_SIM_INLINE T atomic_load_explicit(const volatile space atomic<T>* object, memory_order) {                       \
    return ::mfa_sim::read((const volatile T*)&object->mfa_sim_value);                                                \
  }                                                                                                                   \
  MFA_SIM_UPDATE(space, atomic_store_explicit, void, , Exchanged)                                                     \
  MFA_SIM_UPDATE(space, atomic_exchange_explicit, T, return, Exchanged)                                               \
  MFA_SIM_UPDATE(space, atomic_fetch_add_explicit, T, return, Sum)                                                    \
  MFA_SIM_UPDATE(space, atomic_fetch_sub_explicit, T, return, Difference)                                             \
  MFA_SIM_UPDATE(space, atomic_fetch_and_explicit, T, return, And)                                                    \
  MFA_SIM_UPDATE(space, atomic_fetch_or_explicit, T, return, Or)                                                      \
  MFA_SIM_UPDATE(space, atomic_fetch_xor_explicit, T, return, ExclusiveOr)                                            \
  MFA_SIM_UPDATE(space, atomic_fetch_min_explicit, T, return, Minimum)                                                \
  MFA_SIM_UPDATE(space, atomic_fetch_max_explicit, T, return, Maximum)                                                \
  MFA_SIM_UPDATE(space, atomic_min_explicit, void, , Minimum)                                                         \
  MFA_SIM_UPDATE(space, atomic_max_explicit, void, , Maximum)                                                         \
  template <typename T>                                                                                               \
  MFA_SIM_INLINE bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object, thread T* expected,     \
                                                            ::mfa_sim::same<T> desired, memory_order, memory_order) { \
    return ::mfa_sim::compare_exchange((volatile T*)&object->mfa_sim_value, expected, desired);                       \
  }
MFA_SIM_ATOMICS(threadgroup)
#ifndef MFA_SIM_FLAT
MFA_SIM_ATOMICS(device)
#endif
#undef MFA_SIM_ATOMICS
#undef MFA_SIM_UPDATE

}  // namespace metal
