// 8x8 fragments and the three ways to fill a set of J of them (8 J values of the head dimension) from contiguous
// memory. J is 4; the last set of a head dimension that 32 does not divide has J = 2. The only file that knows which
// lane holds which element, but for unit/products.h: with MFA_MATRIX_UNIT the fills for left operands are not used.
//
// Lane l owns elements (row, column) and (row, column + 1). A contraction may visit its index in any order that both
// operands share, and the columns of a result may be dealt out in any order, so each lane takes what is contiguous:
//   left   X[row][J*column .. +2J-1]     fragment j = (x[j], x[J+j])     X as left operand; slot s of j is d = J*s + j
//   right' X[column], X[column+1] at [J*row .. +J-1]  j = (x[j], y[j])   X transposed as right operand, same slots
//   right  X[row][J*column .. +2J-1]     fragment j = (x[2j], x[2j+1])   X as right operand
// A result accumulated over `right` sets holds X[row][J*column + 2j], [.. + 1]: J fragments are 2 J neighbours.
#pragma once

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "types.h"
#include "unroll.h"

namespace mfa {

using namespace metal;

#ifdef __MFA_SIMULATOR__
#define MFA_COUNT_FRAGMENT_LOAD() mfa_sim_count_fragment_load()
#else
#define MFA_COUNT_FRAGMENT_LOAD()
#endif

constant constexpr int kFragment = 8;      // rows and columns
constant constexpr int kSetFragments = 4;  // fragments per set, but for a half one at the end
constant constexpr int kSetWidth = 32;     // values of the head dimension per set

// Sets of a head dimension, which is a multiple of 16.
constexpr short sets_of(int dim) { return (dim + kSetWidth - 1) / kSetWidth; }

template <int kDim>
inline bool is_whole(short set) {
  return kDim % kSetWidth == 0 || set < sets_of(kDim) - 1;
}

template <int kDim>
inline short fragments_of(short set) {
  return is_whole<kDim>(set) ? kSetFragments : kSetFragments / 2;
}

// One lane's two elements of a matrix.
template <typename T>
using Fragment = vec<T, 2>;

// Apple's thread_elements() has a wider storage type; the reference cast is the one portable way to it.
template <typename T>
inline thread Fragment<T>& elements(thread simdgroup_matrix<T, 8, 8>& matrix) {
  return reinterpret_cast<thread Fragment<T>&>(matrix.thread_elements());
}

// A B + C. A matrix of Metal's own type exists only here: Apple's compiler gives arrays of them memory, not registers.
template <typename A, typename B>
inline Fragment<float> multiply_add(Fragment<A> a, Fragment<B> b, Fragment<float> c) {
  simdgroup_matrix<A, 8, 8> left;
  simdgroup_matrix<B, 8, 8> right;
  simdgroup_matrix<float, 8, 8> sum;
  elements(left) = a;
  elements(right) = b;
  elements(sum) = c;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  return elements(sum);
}

struct Lane {
  short row, column;

  explicit Lane(ushort index)
      : row(((index / 4) & 4) + (index / 2) % 4), column(((index / 4) & 2) * 2 + (index % 2) * 2) {}

  // Where the lane's two elements of fragment n of a row of fragments are.
#ifdef MFA_MATRIX_UNIT
  static int column_step(short n) { return n / 2 * 16 + n % 2 * 2; }  // unit/products.h
  int first_column() const { return 2 * column; }
#else
  static int column_step(short n) { return n * kFragment; }
  int first_column() const { return column; }
#endif
  int column_of(short n) const { return column_step(n) + first_column(); }
};

// Four lanes share a row; they differ in bits 0 and 3 of the lane index.
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

inline float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

// Eight consecutive elements.
template <typename T>
struct Octet {
  vec<T, 4> low, high;
};

// Wide loads. 16-bit octets are one 16-byte load; MSL has no 8-wide vectors, hence uint4.
template <typename T>
inline Octet<T> load_octet(const threadgroup T* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  const uint4 words = *(const threadgroup uint4*)source;
  return {as_type<vec<T, 4>>(words.xy), as_type<vec<T, 4>>(words.zw)};
}

inline Octet<float> load_octet(const threadgroup float* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  MFA_COUNT_FRAGMENT_LOAD();
  const threadgroup float4* words = (const threadgroup float4*)source;
  return {words[0], words[1]};
}

template <typename T>
inline vec<T, 4> load_quad(const threadgroup T* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  return *(const threadgroup vec<T, 4>*)source;
}

template <typename T>
inline vec<T, 2> load_pair(const threadgroup T* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  return *(const threadgroup vec<T, 2>*)source;
}

template <typename T>
inline Octet<T> load_octet(const device T* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  const uint4 words = *(const device uint4*)source;
  return {as_type<vec<T, 4>>(words.xy), as_type<vec<T, 4>>(words.zw)};
}

inline Octet<float> load_octet(const device float* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  MFA_COUNT_FRAGMENT_LOAD();
  const device float4* words = (const device float4*)source;
  return {words[0], words[1]};
}

template <typename T>
inline vec<T, 4> load_quad(const device T* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  return *(const device vec<T, 4>*)source;
}

template <typename T>
inline vec<T, 2> load_pair(const device T* source) {
  MFA_COUNT_FRAGMENT_LOAD();
  return *(const device vec<T, 2>*)source;
}

template <typename T>
inline void store_octet(device T* target, Octet<T> x) {
  *(device uint4*)target = uint4(as_type<uint2>(x.low), as_type<uint2>(x.high));
}

inline void store_octet(device float* target, Octet<float> x) {
  device float4* words = (device float4*)target;
  words[0] = x.low;
  words[1] = x.high;
}

template <typename T>
inline void fill_left(thread Fragment<T>* set, Octet<T> x) {
  MFA_UNROLL
  for (short j = 0; j < kSetFragments; ++j) {
    set[j] = vec<T, 2>(x.low[j], x.high[j]);
  }
}

template <typename T>
inline void fill_left(thread Fragment<T>* half_set, vec<T, 4> x) {
  half_set[0] = x.xz;
  half_set[1] = x.yw;
}

template <typename T>
inline void fill_right_transposed(thread Fragment<T>* set, vec<T, 4> x, vec<T, 4> y) {
  MFA_UNROLL
  for (short j = 0; j < kSetFragments; ++j) {
    set[j] = vec<T, 2>(x[j], y[j]);
  }
}

template <typename T>
inline void fill_right_transposed(thread Fragment<T>* half_set, vec<T, 2> x, vec<T, 2> y) {
  half_set[0] = vec<T, 2>(x.x, y.x);
  half_set[1] = vec<T, 2>(x.y, y.y);
}

template <typename T>
inline void fill_right(thread Fragment<T>* set, Octet<T> x) {
  set[0] = x.low.xy;
  set[1] = x.low.zw;
  set[2] = x.high.xy;
  set[3] = x.high.zw;
}

template <typename T>
inline void fill_right(thread Fragment<T>* half_set, vec<T, 4> x) {
  half_set[0] = x.xy;
  half_set[1] = x.zw;
}

// The neighbours that a lane holds of a result accumulated over `right` sets: eight of a whole one, four of a half one.
inline Octet<float> octet_of(thread Fragment<float>* set) { return {float4(set[0], set[1]), float4(set[2], set[3])}; }

inline float4 quad_of(thread Fragment<float>* half_set) { return float4(half_set[0], half_set[1]); }

}  // namespace mfa
