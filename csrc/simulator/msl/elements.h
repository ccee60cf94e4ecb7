// How an 8x8 matrix is spread over the lanes of a SIMD-group; the same on every engine.
//
// Lane l owns (row, column) and (row, column + 1), row = ((l/4) & 4) + (l/2) % 4, column = ((l/4) & 2)*2 + (l%2)*2.
#pragma once

namespace mfa_sim {

template <typename T>
constexpr bool is_matrix_element = __is_same(T, half) || __is_same(T, bfloat) || __is_same(T, float);

// What thread_elements() refers to. No vec<T, 2>: only a reinterpret_cast opens it, as with Apple's wider storage type.
template <typename T>
struct alignas(2 * sizeof(T)) Elements {
  T at[2];
  MFA_SIM_INLINE constexpr T& operator[](int i) { return at[i]; }
  MFA_SIM_INLINE constexpr const T& operator[](int i) const { return at[i]; }
};

MFA_SIM_INLINE constexpr int row_of(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
MFA_SIM_INLINE constexpr int column_of(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

}  // namespace mfa_sim
