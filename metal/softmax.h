// Online softmax over rows of fragments, in base 2 (FlashAttention, Dao et al. 2022; the lazy rescale is that of
// FlashAttention-4).
#pragma once

#include "fragment.h"

namespace mfa {

// Finite sentinels: no inf is ever formed, so no test for it is needed. exp2(kMasked - m) is exactly 0 for every m that
// can occur, since m starts at kUnseen.
constant constexpr float kMasked = -3e38f;
constant constexpr float kUnseen = -1e38f * M_LOG2E_F;  // so that a bias of -1e38 masks its key
// A row keeps its maximum until the true one exceeds it by this much: P then stays below 2^8, and O is rarely rescaled.
constant constexpr float kRescaleThreshold = 8.0f;
// Up to here half a unit in the last place of a score is a harmless exponent.
constant constexpr float kExactProduct = 1e6f;

// One row's running maximum (shared by its four lanes) and this lane's part of the sum.
struct SoftmaxRow {
  float maximum = kUnseen;
  float sum = 0;
  float excess = 0;  // what rounding added to the sum: of 2^17 keys it would reach the log-sum-exp

  // A sink is a first key without a value: it counts once per row, so in one of the row's four lanes.
  void start_with_sink(float sink, bool counts) {
    const float score = sink * M_LOG2E_F;
    if (!(score <= kUnseen)) {
      maximum = score;
      sum = counts ? 1 : 0;
    }
  }

  // Compensated (Kahan 1965). Once per block: the terms of one are few, and alike.
  void add(float block) {
    const float term = block - excess;
    const float next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }

  bool is_exceeded(float candidate) const { return candidate - maximum > kRescaleThreshold; }

  // Returns the factor for what else was accumulated under the old maximum.
  float move_to(float candidate) {
    const float factor = fast::exp2(maximum - candidate);
    maximum = candidate;
    sum *= factor;
    excess *= factor;
    return factor;
  }
};

// Natural-log log-sum-exp of a row whose lanes' sums add up to `sum`; -inf for a row that saw nothing. Rounded once: of
// a large maximum each rounding is as large as plain PyTorch's whole error.
inline float log_sum_exp(float maximum, float sum) {
  return sum == 0 ? -INFINITY : fma(maximum, M_LN2_F, log2(sum) * M_LN2_F);
}

}  // namespace mfa
