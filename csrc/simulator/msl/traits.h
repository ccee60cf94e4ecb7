// <metal_type_traits>.
#pragma once

namespace metal {

template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;

// MFA_SIM_TRANSFORM(name, pattern): name<pattern>::type is T, name<other>::type is the other itself.
#define MFA_SIM_TRANSFORM(name, ...) \
  template <typename T>              \
  struct name {                      \
    using type = T;                  \
  };                                 \
  template <typename T>              \
  struct name<__VA_ARGS__> {         \
    using type = T;                  \
  };                                 \
  template <typename T>              \
  using name##_t = typename name<T>::type;
MFA_SIM_TRANSFORM(remove_const, const T)
MFA_SIM_TRANSFORM(remove_volatile, volatile T)
#undef MFA_SIM_TRANSFORM

template <typename T>
struct remove_cv {
  using type = remove_volatile_t<remove_const_t<T>>;
};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;

template <typename T>
struct remove_reference {
  using type = __remove_reference_t(T);
};
template <typename T>
using remove_reference_t = typename remove_reference<T>::type;

// The type without its address space (and, in Apple's header as here, without const).
template <typename T>
struct remove_addrspace {
  using type = T;
};
#ifndef MFA_SIM_FLAT
template <typename T>
struct remove_addrspace<device T> {
  using type = T;
};
template <typename T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <typename T>
struct remove_addrspace<constant T> {
  using type = T;
};
#endif
template <typename T>
using remove_addrspace_t = remove_cv_t<typename remove_addrspace<T>::type>;

template <typename T>
struct add_const {
  using type = const T;
};
template <typename T>
using add_const_t = const T;
template <typename T>
struct decay {
  using type = __decay(T);
};
template <typename T>
using decay_t = typename decay<T>::type;
template <typename T>
struct underlying_type {
  using type = __underlying_type(T);
};
template <typename T>
using underlying_type_t = typename underlying_type<T>::type;
template <typename T>
struct make_signed {
  using type = __make_signed(T);
};
template <typename T>
using make_signed_t = typename make_signed<T>::type;
template <typename T>
struct make_unsigned {
  using type = __make_unsigned(T);
};
template <typename T>
using make_unsigned_t = typename make_unsigned<T>::type;

// MFA_SIM_TRAIT(name, condition): name<T>::value and name_v<T>.
#define MFA_SIM_TRAIT(name, ...)               \
  template <typename T>                        \
  struct name : bool_constant<__VA_ARGS__> {}; \
  template <typename T>                        \
  constexpr bool name##_v = name<T>::value;
MFA_SIM_TRAIT(is_integral, __is_integral(remove_addrspace_t<T>))
MFA_SIM_TRAIT(is_floating_point, __is_floating_point(remove_addrspace_t<T>))
MFA_SIM_TRAIT(is_arithmetic, __is_arithmetic(remove_addrspace_t<T>))
MFA_SIM_TRAIT(is_scalar, __is_scalar(remove_addrspace_t<T>))
MFA_SIM_TRAIT(is_signed, __is_signed(remove_addrspace_t<T>))
MFA_SIM_TRAIT(is_unsigned, __is_unsigned(remove_addrspace_t<T>))
MFA_SIM_TRAIT(is_void, __is_void(T))
MFA_SIM_TRAIT(is_array, __is_array(T))
MFA_SIM_TRAIT(is_pointer, __is_pointer(T))
MFA_SIM_TRAIT(is_reference, __is_reference(T))
MFA_SIM_TRAIT(is_enum, __is_enum(T))
MFA_SIM_TRAIT(is_class, __is_class(T))
MFA_SIM_TRAIT(is_union, __is_union(T))
MFA_SIM_TRAIT(is_const, __is_const(T))
MFA_SIM_TRAIT(is_volatile, __is_volatile(T))
MFA_SIM_TRAIT(is_trivially_copyable, __is_trivially_copyable(T))
#undef MFA_SIM_TRAIT

template <typename T, typename U>
struct is_same : bool_constant<__is_same(T, U)> {};
template <typename T, typename U>
constexpr bool is_same_v = __is_same(T, U);
template <typename From, typename To>
struct is_convertible : bool_constant<__is_convertible(From, To)> {};
template <typename From, typename To>
constexpr bool is_convertible_v = __is_convertible(From, To);
template <typename Base, typename Derived>
struct is_base_of : bool_constant<__is_base_of(Base, Derived)> {};
template <typename Base, typename Derived>
constexpr bool is_base_of_v = __is_base_of(Base, Derived);
template <typename T, typename... A>
struct is_constructible : bool_constant<__is_constructible(T, A...)> {};

template <typename T>
constexpr remove_reference_t<T>&& move(T&& x) {
  return static_cast<remove_reference_t<T>&&>(x);
}
template <typename T>
constexpr T&& forward(remove_reference_t<T>& x) {
  return static_cast<T&&>(x);
}
template <typename T>
T&& declval();
template <typename T>
constexpr void swap(T& a, T& b) {
  T c = a;
  a = b;
  b = c;
}

// <metal_array>, thread memory only: no member function can take an address space here.
template <typename T, size_t N>
struct array {
  T elements[N];
  constexpr T& operator[](size_t i) { return elements[i]; }
  constexpr const T& operator[](size_t i) const { return elements[i]; }
  static constexpr size_t size() { return N; }
};

}  // namespace metal
