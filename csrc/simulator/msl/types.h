// Scalars, vectors, their constructors and conversions, as_type.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
using ::bfloat;
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
}  // namespace metal

#define MFA_SIM_VECTORS(T)         \
  using T##2 = ::metal::vec<T, 2>; \
  using T##3 = ::metal::vec<T, 3>; \
  using T##4 = ::metal::vec<T, 4>; \
  namespace metal {                \
  using ::T##2;                    \
  using ::T##3;                    \
  using ::T##4;                    \
  }
MFA_SIM_VECTORS(bool)
MFA_SIM_VECTORS(char)
MFA_SIM_VECTORS(uchar)
MFA_SIM_VECTORS(short)
MFA_SIM_VECTORS(ushort)
MFA_SIM_VECTORS(int)
MFA_SIM_VECTORS(uint)
MFA_SIM_VECTORS(long)
MFA_SIM_VECTORS(ulong)
MFA_SIM_VECTORS(half)
MFA_SIM_VECTORS(bfloat)
MFA_SIM_VECTORS(float)
#undef MFA_SIM_VECTORS

// 1.5h and 1.5bf.
constexpr half operator""h(long double x) { return static_cast<half>(x); }
constexpr half operator"" H(long double x) { return static_cast<half>(x); }
constexpr bfloat operator"" bf(long double x) { return static_cast<bfloat>(static_cast<float>(x)); }
constexpr bfloat operator"" BF(long double x) { return static_cast<bfloat>(static_cast<float>(x)); }

namespace mfa_sim {

// vector_of<V>: size 0 for a scalar.
template <typename T>
struct vector_of {
  using element = T;
  static constexpr int size = 0;
};
template <typename T, int N>
struct vector_of<metal::vec<T, N>> {
  using element = T;
  static constexpr int size = N;
};
template <typename T>
using element_of = typename vector_of<T>::element;
template <typename T>
constexpr int size_of = vector_of<T>::size;

// static_cast; clang refuses it between half and bfloat.
template <typename T, typename A>
MFA_SIM_INLINE constexpr T to(A x) {
  if constexpr ((__is_same(T, bfloat) && __is_same(A, half)) || (__is_same(T, half) && __is_same(A, bfloat))) {
    return static_cast<T>(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <typename V, typename A>
MFA_SIM_INLINE constexpr V convert(A x) {
  using T = element_of<V>;
  static_assert(!__is_same(T, bfloat) || !__is_integral(element_of<A>), "a vector of bfloat is built from floats");
  if constexpr (__is_same(V, A)) {
    return x;
  } else if constexpr (__is_same(T, bool) || __is_same(element_of<A>, bool) || (sizeof(T) == 2 && sizeof(x[0]) == 2)) {
    V y{};
    for (int i = 0; i < size_of<V>; ++i) {
      y[i] = to<T>(static_cast<element_of<A>>(x[i]));
    }
    return y;
  } else {
    return __builtin_convertvector(x, V);
  }
}

template <typename V, typename A>
MFA_SIM_INLINE void append(V& y, int& i, A x) {
  using T = element_of<V>;
  if constexpr (size_of<A> == 0) {
    y[i++] = to<T>(x);
  } else {
    for (int j = 0; j < size_of<A>; ++j) {
      y[i++] = to<T>(static_cast<element_of<A>>(x[j]));
    }
  }
}

// float4(...): one scalar fills, one vector converts, anything else must add up to the size.
template <typename V, typename... A>
MFA_SIM_INLINE constexpr V construct(A... arguments) {
  using T = element_of<V>;
  constexpr int N = size_of<V>;
  if constexpr (sizeof...(A) == 0) {
    return V{};
  } else if constexpr (sizeof...(A) == 1 && ((size_of<A> == 0) && ...)) {
    return V(to<T>(arguments)...);
  } else if constexpr (sizeof...(A) == 1 && ((size_of<A> == N) && ...)) {
    return convert<V>(arguments...);
  } else {
    constexpr int count = ((size_of<A> == 0 ? 1 : size_of<A>)+...);
    static_assert(count == N, "a vector is built from one scalar, or from as many elements as it has");
    if constexpr (count != N) {
      return V{};
    } else if constexpr (sizeof...(A) == N) {
      return V{to<T>(arguments)...};
    } else {
      V y;
      int i = 0;
      (append(y, i, arguments), ...);
      return y;
    }
  }
}

// Address spaces as numbers.
template <typename T>
constexpr int space_of = 0;
#ifndef MFA_SIM_FLAT
template <typename T>
constexpr int space_of<device T> = 1;
template <typename T>
constexpr int space_of<threadgroup T> = 2;
template <typename T>
constexpr int space_of<constant T> = 3;
#endif

template <typename T>
struct pointee {
  static constexpr int space = -1;  // not a pointer
};
template <typename T>
struct pointee<T*> {
  static constexpr int space = space_of<T>;
};
template <typename T>
struct pointee<T[]> {
  static constexpr int space = space_of<T>;
};
template <typename T, size_t N>
struct pointee<T[N]> {
  static constexpr int space = space_of<T>;
};

template <typename T>
struct dereferenced_cast;

// (T)x, spelt cast<T>{} ->* x by the translator: `->*` binds tighter than any binary operator and looser than what
// stands behind a C-style cast. Unlike clang's own cast it keeps address spaces and converts vectors by value.
template <typename T>
struct cast {
  template <typename S>
  MFA_SIM_INLINE constexpr T operator->*(S&& x) const {
    using Source = __remove_cvref(S);
    if constexpr (size_of<T> != 0) {
      return construct<T>(static_cast<metal::remove_addrspace_t<Source>>(x));
    } else {
      constexpr int from = pointee<metal::remove_cv_t<metal::remove_reference_t<S>>>::space;
      static_assert(from < 0 || from == pointee<T>::space, "C-style cast between address spaces");
      return (T)x;
    }
  }
  constexpr dereferenced_cast<T> operator*() const { return {}; }
};

template <typename T>
struct dereferenced_cast {
  template <typename S>
  MFA_SIM_INLINE constexpr auto operator->*(S&& x) const -> decltype(*(T) nullptr) {
    return *(cast<T>{}->*x);
  }
};

}  // namespace mfa_sim

namespace metal {
template <typename To, typename From>
MFA_SIM_INLINE constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  return __builtin_bit_cast(To, x);
}
}  // namespace metal
using metal::as_type;
