// A product on M5's matrix unit. The backend has no such instruction: it is MMAs of 8x8x8 here that take the same
// operands from the same registers, and leave their sum where it was. Their number and their result mean nothing.
#pragma once

#include "msl/cooperative_tensor.h"
#include "msl/unit.h"

namespace mfa_sim {

template <int kM, int kN, int kK, bool kIsLeftTransposed, bool kIsRightTransposed, bool kAccumulates, typename L,
          typename R, typename D>
struct UnitProduct {
  template <typename T, int kCapacity>
  MFA_SIM_INLINE static auto pair(const Share<T, kCapacity>& share, int i) {
    const int first = 2 * i % kCapacity;
    return bits_of(Elements<T>{{share.at[first], share.at[first + 1]}});
  }

  template <int kLeft, int kRight, int kSum>
  MFA_SIM_COLLECTIVE static Share<D, kSum> run(const Share<L, kLeft>& left, const Share<R, kRight>& right,
                                               Share<D, kSum> sum, const char*, int) {
    constexpr int kPairs = (kLeft > kRight ? (kLeft > kSum ? kLeft : kSum) : (kRight > kSum ? kRight : kSum)) / 2;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int to = 2 * i % kSum;
      agx_float2 d = {sum.at[to], sum.at[to + 1]};
      if (!kAccumulates && 2 * i < kSum) d = {0, 0};
      d = multiply(pair(left, i), pair(right, i), d);
      sum.at[to] = d.x;
      sum.at[to + 1] = d.y;
    }
    return sum;
  }
};

}  // namespace mfa_sim
