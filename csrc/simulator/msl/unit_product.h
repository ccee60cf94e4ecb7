// A product on the matrix unit: one collective of the SIMD-group.
#pragma once

#include "cooperative_tensor.h"
#include "unit.h"

namespace mfa_sim {

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
