// A product on M5's matrix unit, by shuffles and FMAs in float32: the layout and the order of sums of ../msl/unit.h,
// and so the same bits as in the simulator. A tensor core rounds in another way.
#pragma once

#include "../msl/cooperative_tensor.h"
#include "../msl/unit.h"

namespace mfa_sim {

// The lane that has row r of a tile, and its columns 4 q to 4 q + 3.
MFA_SIM_INLINE constexpr int lane_of_quad(int r, int q) { return 16 * (r % 8 / 4) + 8 * (q / 2) + 2 * (r % 4) + q % 2; }

// Element first + kStep * which of that lane, as this lane numbers it.
template <int kCount, int kStep, typename T, int N>
MFA_SIM_COLLECTIVE T taken(const Share<T, N>& share, int first, int which, int lane) {
  T found = metal::simd_shuffle(share.at[first], lane);
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    const T other = metal::simd_shuffle(share.at[first + kStep * i], lane);
    found = i == which ? other : found;
  }
  return found;
}

// L, R, D: element types. A lane makes what it holds of the destination: in each tile columns 4 q to 4 q + 3 of rows r
// and r + 8.
template <int kM, int kN, int kK, bool kIsLeftTransposed, bool kIsRightTransposed, bool kAccumulates, typename L,
          typename R, typename D>
struct UnitProduct {
  static_assert(MFA_SIM_UNIT_LAYOUT >= 10, "written for M5's layout");
  using Left = Spread<kM, kK, kIsLeftTransposed>;
  using Right = Spread<kK, kN, kIsRightTransposed>;
  using Destination = Spread<kM, kN, false>;
  using Sum = decltype(seen(L()));

  // (r + 8 half of a row of tiles, k)
  MFA_SIM_COLLECTIVE static Sum left_at(const Share<L, Left::kCapacity>& left, int tile_row, int half, int k, int r) {
    if constexpr (kIsLeftTransposed) {
      const int tile = k / 16 * (kM / 16) + tile_row;
      return seen(taken<4, 1>(left, 8 * tile + k / 8 % 2 * 4, r % 4, lane_of_quad(k, 2 * half + r / 4)));
    } else {
      const int tile = tile_row * (kK / 16) + k / 16;
      return seen(taken<1, 1>(left, 8 * tile + 4 * half + k % 4, 0, lane_of_quad(r, k % 16 / 4)));
    }
  }

  // (k, 4 q + e of a column of tiles)
  MFA_SIM_COLLECTIVE static Sum right_at(const Share<R, Right::kCapacity>& right, int tile_column, int e, int k,
                                         int q) {
    if constexpr (kIsRightTransposed) {
      const int tile = tile_column * (kK / 16) + k / 16;
      return seen(taken<2, 4>(right, 8 * tile + k % 4, q / 2, lane_of_quad(4 * q + e, k % 16 / 4)));
    } else {
      const int tile = k / 16 * (kN / 16) + tile_column;
      return seen(taken<1, 1>(right, 8 * tile + k / 8 % 2 * 4 + e, 0, lane_of_quad(k, q)));
    }
  }

  MFA_SIM_COLLECTIVE static auto run(const Share<L, Left::kCapacity>& left, const Share<R, Right::kCapacity>& right,
                                     Share<D, Destination::kCapacity> destination, const char*, int) {
    constexpr int kRows = kM / 8, kColumns = kN / 4;  // of this lane
    const int r = row_of(lane_index()), q = column_of(lane_index()) / 2;
    Sum sums[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) {
      const int row = i / 8 / (kN / 16) * 2 + i / 4 % 2, column = i / 8 % (kN / 16) * 4 + i % 4;
      sums[row][column] = kAccumulates ? Sum(destination.at[i]) : Sum(0);
    }
#pragma unroll
    for (int first = 0; first < kK; first += 16) {
      Sum rows[kRows][16];
#pragma unroll
      for (int i = 0; i < kRows * 16; ++i) {
        rows[i / 16][i % 16] = left_at(left, i / 32, i / 16 % 2, first + i % 16, r);
      }
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        Sum terms[16];
#pragma unroll
        for (int k = 0; k < 16; ++k) terms[k] = right_at(right, column / 4, column % 4, first + k, q);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          sums[row][column] = add_products(sums[row][column], rows[row], terms);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) {
      const int row = i / 8 / (kN / 16) * 2 + i / 4 % 2, column = i / 8 % (kN / 16) * 4 + i % 4;
      destination.at[i] = D(sums[row][column]);
    }
    return destination;
  }
};

}  // namespace mfa_sim
