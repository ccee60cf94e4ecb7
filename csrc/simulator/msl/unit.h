// The matrix unit of M5: how its operands are spread over the lanes of a SIMD-group, and how it multiplies.
#pragma once

#include "elements.h"

namespace mfa_sim {

struct Place {
  int row, column;
};
constexpr bool operator==(Place a, Place b) { return a.row == b.row && a.column == b.column; }

// A kRows x kColumns operand, stored as its transpose if so. MFA_SIM_UNIT_LAYOUT, an Apple GPU family, says whose
// layout it is. Both go by tiles of 16x16, of which a lane has 8 elements in 2 rows, 8 apart.
template <int kRows, int kColumns, bool kIsTransposed>
struct Spread {
  static constexpr int kCapacity = kRows * kColumns / kLanes;

  static constexpr Place stored(int lane, int i) {
#if MFA_SIM_UNIT_LAYOUT >= 10
    // Of the matrix in memory: four neighbours per row, and one tile after the other. How tiles of several rows follow
    // each other has been seen for a right operand of 32 rows; where there are several rows and columns of tiles it is
    // a guess.
    constexpr int kTiles = (kIsTransposed ? kRows : kColumns) / 16;
    const int tile = i / 8;
    return {16 * (tile / kTiles) + row_of(lane) + 8 * (i / 4 % 2), 16 * (tile % kTiles) + 2 * column_of(lane) + i % 4};
#else
    // Of the operand, in simdgroup_matrices of 8x8: the upper halves of a row of tiles first.
    constexpr int kTiles = kColumns / 16;
    const int half = i / (4 * kTiles), tile = i / 4 % kTiles;
    const Place place = {8 * half + row_of(lane), 16 * tile + column_of(lane) + i % 2 + 8 * (i / 2 % 2)};
    return kIsTransposed ? Place{place.column, place.row} : place;
#endif
  }
  static constexpr Place logical(int lane, int i) {
    const Place place = stored(lane, i);
    return kIsTransposed ? Place{place.column, place.row} : place;
  }

  // By lane and element: offsets into a row-major kRows x kColumns matrix.
  struct Offsets {
    ushort of[kLanes][kCapacity];
    constexpr Offsets() : of() {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < kCapacity; ++i) {
          const Place place = logical(lane, i);
          of[lane][i] = static_cast<ushort>(place.row * kColumns + place.column);
        }
      }
    }
  };
  static constexpr Offsets kOffsets{};
};

// What the unit sees of an element: of a float 10 bits of the mantissa, cut towards zero.
MFA_SIM_UNCHECKED MFA_SIM_INLINE float seen(float x) {
  return x == x ? __builtin_bit_cast(float, __builtin_bit_cast(uint, x) & 0xffffe000u) : x;
}
MFA_SIM_UNCHECKED MFA_SIM_INLINE float seen(half x) { return static_cast<float>(x); }
MFA_SIM_UNCHECKED MFA_SIM_INLINE float seen(bfloat x) { return static_cast<float>(x); }
MFA_SIM_UNCHECKED MFA_SIM_INLINE int seen(char x) { return x; }
MFA_SIM_UNCHECKED MFA_SIM_INLINE int seen(signed char x) { return x; }
MFA_SIM_UNCHECKED MFA_SIM_INLINE int seen(uchar x) { return x; }

// sum += left right over 16 terms: pairs, pairs that lie 8 apart, then these four in order. Rounded at each step;
// products are exact.
template <typename V>
MFA_SIM_UNCHECKED MFA_SIM_INLINE V add_products(V sum, const float* left, const V* right) {
  V pair[8];
  for (int i = 0; i < 8; ++i) {
    pair[i] = __builtin_elementwise_fma(V(left[2 * i]), right[2 * i], left[2 * i + 1] * right[2 * i + 1]);
  }
  for (int j = 0; j < 4; ++j) sum += pair[j] + pair[j + 4];
  return sum;
}
template <typename V>
MFA_SIM_UNCHECKED MFA_SIM_INLINE V add_products(V sum, const int* left, const V* right) {
  for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
  return sum;
}

#ifdef MFA_SIM_STATIC
// A share as an inline assembly takes it, which has few operands: in vectors of 16 bytes.
template <typename T, int N>
struct Packed {
  static constexpr int kWidth = 16 / sizeof(T);
  static_assert(N <= 4 * kWidth, "a product of more than 16 x 32");
  typedef T Vector __attribute__((ext_vector_type(kWidth)));
  Vector at[4] = {};

  MFA_SIM_INLINE explicit Packed(const Share<T, N>& share) {
    for (int i = 0; i < N; ++i) at[i / kWidth][i % kWidth] = share.at[i];
  }
  MFA_SIM_INLINE Share<T, N> share() const {
    Share<T, N> share;
    for (int i = 0; i < N; ++i) share.at[i] = at[i / kWidth][i % kWidth];
    return share;
  }
};
#endif

// A product of kM x kN x kK. L, R, D: element types.
template <int kM, int kN, int kK, bool kIsLeftTransposed, bool kIsRightTransposed, bool kAccumulates, typename L,
          typename R, typename D>
struct UnitProduct {
  using Left = Spread<kM, kK, kIsLeftTransposed>;
  using Right = Spread<kK, kN, kIsRightTransposed>;
  using Destination = Spread<kM, kN, false>;
  using Sum = decltype(seen(L()));
  static constexpr int kProducts = kM * kN * kK / 4096;  // of 16x16x16, which counters count

  struct Argument {
    Share<L, Left::kCapacity> left;
    Share<R, Right::kCapacity> right;
    Share<D, Destination::kCapacity> destination;
  };

  MFA_SIM_UNCHECKED static void multiply_lanes(void* const* arguments) {
    using Row = metal::vec<Sum, kN>;
    alignas(Row) Sum left[kM][kK], right[kK][kN], sum[kM][kN];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& argument = *static_cast<const Argument*>(arguments[lane]);
      for (int i = 0; i < Left::kCapacity; ++i) {
        (&left[0][0])[Left::kOffsets.of[lane][i]] = seen(argument.left.at[i]);
      }
      for (int i = 0; i < Right::kCapacity; ++i) {
        (&right[0][0])[Right::kOffsets.of[lane][i]] = seen(argument.right.at[i]);
      }
      for (int i = 0; i < Destination::kCapacity; ++i) {
        (&sum[0][0])[Destination::kOffsets.of[lane][i]] =
            kAccumulates ? static_cast<Sum>(argument.destination.at[i]) : Sum(0);
      }
    }
    for (int row = 0; row < kM; ++row) {
      Row& target = reinterpret_cast<Row&>(sum[row]);
      for (int k = 0; k < kK; k += 16) {
        target = add_products(target, left[row] + k, reinterpret_cast<const Row*>(right[k]));
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      auto& target = static_cast<Argument*>(arguments[lane])->destination;
      for (int i = 0; i < Destination::kCapacity; ++i) {
        target.at[i] = static_cast<D>((&sum[0][0])[Destination::kOffsets.of[lane][i]]);
      }
    }
  }

  template <typename T, int N>
  MFA_SIM_UNCHECKED static void require_written(const Share<T, N>& share, const char* message, const char* file,
                                                int line) {
    const T unwritten = poison<T>();
    for (int i = 0; i < N; ++i) {
      if (__builtin_memcmp(&share.at[i], &unwritten, sizeof(T)) == 0) mfa_sim_fail(message, file, line);
    }
  }

  MFA_SIM_OUTLINED static auto run(Share<L, Left::kCapacity> left, Share<R, Right::kCapacity> right,
                                   Share<D, Destination::kCapacity> destination, const char* file, int line) {
#if defined(MFA_SIM_COUNT) || defined(MFA_SIM_ASAN)
    if constexpr (!__is_integral(L)) {  // every integer is a value
      require_written(left, "matmul2d reads an uninitialised element of its left operand", file, line);
      require_written(right, "matmul2d reads an uninitialised element of its right operand", file, line);
      if constexpr (kAccumulates) {
        require_written(destination, "matmul2d adds to an uninitialised element of its destination", file, line);
      }
    }
#endif
#ifdef MFA_SIM_STATIC
    const Packed<L, Left::kCapacity> a(left);
    const Packed<R, Right::kCapacity> b(right);
    Packed<D, Destination::kCapacity> d(destination);
    __asm__("unit_mma %0"
            : "+x"(d.at[0]), "+x"(d.at[1]), "+x"(d.at[2]), "+x"(d.at[3])
            : "x"(a.at[0]), "x"(a.at[1]), "x"(a.at[2]), "x"(a.at[3]), "x"(b.at[0]), "x"(b.at[1]), "x"(b.at[2]),
              "x"(b.at[3]), "i"(kProducts));
    return d.share();
#else
    Argument argument{left, right, destination};
    mfa_sim_collective(&multiply_lanes, &argument, MFA_SIM_UNIT, kProducts, "matmul2d::run", file, line);
    return argument.destination;
#endif
  }
};

}  // namespace mfa_sim
