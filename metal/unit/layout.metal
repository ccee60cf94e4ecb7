// Whether the matrix unit has a lane's elements where product.h takes them to be. Apple calls the layout implementation
// defined, so the host asks once per process, before it plans with these kernels (csrc/metal/unit_layout.cpp).
#define MFA_MATRIX_UNIT
#include "product.h"

namespace mfa {

// Small whole numbers, so that every sum is exact; no two rows or columns are alike.
inline int left_entry(int row, int k) { return (row * row + 3 * k + row * k) % 11 - 5; }
inline int right_entry(int k, int column) { return (column * column + 2 * k + 5 * k * column) % 13 - 6; }

// One product of multiply_tiles().
template <int kColumns, int kDepth, bool kTransposed, typename A, typename B>
inline bool is_right(Lane lane) {
  vec<A, 4> left[kDepth / 8];
  for (short i = 0; i < kDepth / 8; ++i) {
    for (short e = 0; e < 4; ++e) {
      left[i][e] = A(left_entry(lane.row + i % 2 * kFragment, i / 2 * 16 + 2 * lane.column + e));
    }
  }
  vec<B, 4> right[kColumns * kDepth / 128];
  constexpr bool kTilesInColumns = kTransposed ? kDepth == 32 : kColumns == 32;
  for (short i = 0; i < kColumns * kDepth / 128; ++i) {
    for (short e = 0; e < 4; ++e) {
      const short row = lane.row + i % 2 * kFragment + (kTilesInColumns ? 0 : i / 2 * 16);
      const short column = 2 * lane.column + e + (kTilesInColumns ? i / 2 * 16 : 0);
      right[i][e] = B(kTransposed ? right_entry(column, row) : right_entry(row, column));
    }
  }
  Fragment<float> sums[2][kColumns / kFragment];
  for (short n = 0; n < kColumns / kFragment; ++n) {
    sums[0][n] = sums[1][n] = Fragment<float>(0);
  }
  multiply_tiles<kColumns, kDepth, kTransposed>(sums[0], sums[1], left, right);
  bool right_so_far = true;
  for (short n = 0; n < kColumns / kFragment; ++n) {
    for (short e = 0; e < 4; ++e) {
      const short row = lane.row + e / 2 * kFragment, column = lane.column_of(n) + e % 2;
      int expected = 0;
      for (short k = 0; k < kDepth; ++k) {
        expected += left_entry(row, k) * right_entry(k, column);
      }
      right_so_far = right_so_far && sums[e / 2][n][e % 2] == expected;
    }
  }
  return right_so_far;
}

// All products that are made in one type. S = Q K' of 32 keys and of 16, and P V with and without the second half of a
// set.
template <typename T>
inline bool is_right_in(Lane lane) {
  return is_right<32, 16, true, T, T>(lane) && is_right<16, 32, true, T, T>(lane) &&
         is_right<32, 16, false, float, T>(lane) && is_right<16, 32, false, float, T>(lane);
}

// is_wrong: one per lane.
[[kernel, max_total_threads_per_threadgroup(32)]] void unit_layout(device uint* is_wrong [[buffer(0)]],
                                                                   ushort lane_index [[thread_index_in_simdgroup]]) {
  const Lane lane(lane_index);
  is_wrong[lane_index] = is_right_in<half>(lane) && is_right_in<bfloat>(lane) ? 0 : 1;
}

}  // namespace mfa
