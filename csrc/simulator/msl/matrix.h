// <metal_simdgroup_matrix>: 8x8 matrices spread over the lanes of a SIMD-group.
#pragma once

#include "elements.h"

namespace mfa_sim {

template <int N>
using Floats = metal::vec<float, N>;
using Row = Floats<8>;

// One row of a matrix to float: bfloat by shifting, half by F16C where there is one.
template <typename T>
MFA_SIM_UNCHECKED MFA_SIM_INLINE Row widen(const T* row) {
  if constexpr (__is_same(T, bfloat)) {
    metal::vec<ushort, 8> bits;
    __builtin_memcpy(&bits, row, sizeof bits);
    return __builtin_bit_cast(Row, __builtin_convertvector(bits, metal::vec<uint, 8>) << 16);
  } else {
    metal::vec<T, 8> x;
    __builtin_memcpy(&x, row, sizeof x);
    return __builtin_convertvector(x, Row);
  }
}

// Rounded to nearest even.
template <typename T>
MFA_SIM_UNCHECKED MFA_SIM_INLINE void narrow(T* row, Row x) {
  if constexpr (__is_same(T, bfloat)) {
    const auto bits = __builtin_bit_cast(metal::vec<uint, 8>, x);
    const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const auto is_nan = __builtin_bit_cast(metal::vec<uint, 8>, x != x);
    const auto y =
        __builtin_convertvector((is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded), metal::vec<ushort, 8>);
    __builtin_memcpy(row, &y, sizeof y);
  } else {
    const auto y = __builtin_convertvector(x, metal::vec<T, 8>);
    __builtin_memcpy(row, &y, sizeof y);
  }
}

template <typename D, typename A, typename B, typename C>
struct Multiply {
  Elements<A> a;
  Elements<B> b;
  Elements<C> c;
  Elements<D> d;
};

// The operands of all lanes as a row-major matrix.
#define MFA_SIM_GATHER(T, field, target)                                                    \
  alignas(32) T target[64];                                                                 \
  _Pragma("clang loop unroll(full)") for (int lane = 0; lane < kLanes; ++lane) {            \
    __builtin_memcpy(target + 8 * row_of(lane) + column_of(lane),                           \
                     &static_cast<const Argument*>(arguments[lane])->field, 2 * sizeof(T)); \
  }

// D = A B + C: fp32 FMA over k = 0 .. 7 in order, rounded once.
template <typename D, typename A, typename B, typename C>
MFA_SIM_UNCHECKED void multiply_lanes(void* const* arguments) {
  using Argument = Multiply<D, A, B, C>;
  MFA_SIM_GATHER(A, a, a_matrix)
  MFA_SIM_GATHER(B, b, b_matrix)
  MFA_SIM_GATHER(C, c, c_matrix)
  Row b[8];
  for (int k = 0; k < 8; ++k) b[k] = widen(b_matrix + 8 * k);
  alignas(32) D d_matrix[64];
  for (int row = 0; row < 8; ++row) {
    const Row a = widen(a_matrix + 8 * row);
    Row sum = widen(c_matrix + 8 * row);
    for (int k = 0; k < 8; ++k) sum = __builtin_elementwise_fma(Row(a[k]), b[k], sum);
    narrow(d_matrix + 8 * row, sum);
  }
  _Pragma("clang loop unroll(full)") for (int lane = 0; lane < kLanes; ++lane) {
    __builtin_memcpy(&static_cast<Argument*>(arguments[lane])->d, d_matrix + 8 * row_of(lane) + column_of(lane),
                     2 * sizeof(D));
  }
}
#undef MFA_SIM_GATHER

template <typename D, typename A, typename B, typename C>
MFA_SIM_OUTLINED Elements<D> multiply(Elements<A> a, Elements<B> b, Elements<C> c, const char* name, const char* file,
                                      int line) {
#ifdef MFA_SIM_STATIC
  Elements<D> d;
  __asm__("mma %0"
          : "=x"(d.at[0]), "=x"(d.at[1])
          : "x"(a.at[0]), "x"(a.at[1]), "x"(b.at[0]), "x"(b.at[1]), "x"(c.at[0]), "x"(c.at[1]));
  return d;
#else
  Multiply<D, A, B, C> argument;
  argument.a = a;
  argument.b = b;
  argument.c = c;
  mfa_sim_collective(&multiply_lanes<D, A, B, C>, &argument, MFA_SIM_MMA, 0, name, file, line);
  return argument.d;
#endif
}

// Loads, stores and diagonals only meet: each lane then moves its own two elements, in the kernel's own accesses.
MFA_SIM_UNCHECKED inline void meet_lanes(void* const*) {}

MFA_SIM_INLINE uint64_t mix_key(uint64_t key, uint64_t x) { return (key ^ x) * 0x9e3779b97f4a7c15u + (x >> 29); }

MFA_SIM_COLLECTIVE void meet(uint64_t address, ulong stride, ulong2 origin, bool is_transposed, const char* name,
                             const char* file, int line) {
  uint64_t key = mix_key(1, address);
  key = mix_key(key, stride);
  key = mix_key(key, origin.x);
  key = mix_key(key, origin.y);
  char dummy;
  mfa_sim_collective(&meet_lanes, &dummy, MFA_SIM_MATRIX, mix_key(key, is_transposed), name, file, line);
}

// The offset of this lane's element i in memory.
MFA_SIM_INLINE ulong element_offset(int i, ulong stride, ulong2 origin, bool is_transposed) {
  const int lane = static_cast<int>(lane_index());
  const ulong row = row_of(lane), column = column_of(lane) + i;
  return (origin.y + (is_transposed ? column : row)) * stride + origin.x + (is_transposed ? row : column);
}

}  // namespace mfa_sim

namespace metal {

template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(::mfa_sim::is_matrix_element<T>, "simdgroup_matrix holds half, bfloat or float");
  static_assert(Columns == 8 && Rows == 8, "simdgroup_matrix is 8x8");

#if defined(MFA_SIM_COUNT) || defined(MFA_SIM_ASAN)
  MFA_SIM_INLINE simdgroup_matrix() { elements.at[0] = elements.at[1] = numeric_limits<T>::quiet_NaN(); }
#else
  simdgroup_matrix() = default;
#endif
  // A diagonal matrix.
  MFA_SIM_COLLECTIVE explicit simdgroup_matrix(T value, MFA_SIM_SITE) {
    ::mfa_sim::meet(0, 0, ulong2(0), false, "simdgroup_matrix", MFA_SIM_HERE);
    const int lane = static_cast<int>(::mfa_sim::lane_index());
    for (int i = 0; i < 2; ++i) {
      elements.at[i] = ::mfa_sim::row_of(lane) == ::mfa_sim::column_of(lane) + i ? value : T(0);
    }
  }
  MFA_SIM_INLINE thread::mfa_sim::Elements<T>& thread_elements() { return elements; }
  MFA_SIM_INLINE const thread::mfa_sim::Elements<T>& thread_elements() const { return elements; }

  ::mfa_sim::Elements<T> elements;
};

using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;

template <typename T, int Columns, int Rows>
MFA_SIM_COLLECTIVE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.elements.at[0] = m.elements.at[1] = value;
  return m;
}
template <typename T, int Columns, int Rows>
MFA_SIM_COLLECTIVE simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T value, MFA_SIM_SITE) {
  return simdgroup_matrix<T, Columns, Rows>(value, MFA_SIM_HERE);
}

#define MFA_SIM_TRANSFER(space)                                                                                     \
  template <typename T>                                                                                             \
  MFA_SIM_COLLECTIVE void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const space T* source,                \
                                         ulong elements_per_row = 8, ulong2 matrix_origin = ulong2(0),              \
                                         bool transpose_matrix = false, MFA_SIM_SITE) {                             \
    ::mfa_sim::meet(reinterpret_cast<uint64_t>(source), elements_per_row, matrix_origin, transpose_matrix,          \
                    "simdgroup_load", MFA_SIM_HERE);                                                                \
    for (int i = 0; i < 2; ++i) {                                                                                   \
      d.elements.at[i] = source[::mfa_sim::element_offset(i, elements_per_row, matrix_origin, transpose_matrix)];   \
    }                                                                                                               \
  }                                                                                                                 \
  template <typename T>                                                                                             \
  MFA_SIM_COLLECTIVE void simdgroup_store(simdgroup_matrix<T, 8, 8> a, space T* target, ulong elements_per_row = 8, \
                                          ulong2 matrix_origin = ulong2(0), bool transpose_matrix = false,          \
                                          MFA_SIM_SITE) {                                                           \
    ::mfa_sim::meet(reinterpret_cast<uint64_t>(target), elements_per_row, matrix_origin, transpose_matrix,          \
                    "simdgroup_store", MFA_SIM_HERE);                                                               \
    for (int i = 0; i < 2; ++i) {                                                                                   \
      target[::mfa_sim::element_offset(i, elements_per_row, matrix_origin, transpose_matrix)] = a.elements.at[i];   \
    }                                                                                                               \
  }
MFA_SIM_TRANSFER(threadgroup)
#ifndef MFA_SIM_FLAT
MFA_SIM_TRANSFER(device)
#endif
#undef MFA_SIM_TRANSFER

// Any mix of element types; Apple may allow fewer.
template <typename D, typename A, typename B, typename C>
MFA_SIM_COLLECTIVE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                                      simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                                      MFA_SIM_SITE) {
  d.elements =
      ::mfa_sim::multiply<D>(a.elements, b.elements, c.elements, "simdgroup_multiply_accumulate", MFA_SIM_HERE);
}
template <typename D, typename A, typename B>
MFA_SIM_COLLECTIVE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                           simdgroup_matrix<B, 8, 8> b, MFA_SIM_SITE) {
  const ::mfa_sim::Elements<float> zero = {{0, 0}};
  d.elements = ::mfa_sim::multiply<D>(a.elements, b.elements, zero, "simdgroup_multiply", MFA_SIM_HERE);
}

}  // namespace metal
