// The rows of a SIMD-group on the matrix unit: ../forward_rows.h, but for what most blocks need not do. Where the
// scores of a row stay below a limit, its maximum stays where it is and no P of it is large; one vote per block asks
// for that.
#pragma once

#include "../forward_rows.h"

namespace mfa {

// 11 bits of P are too few for the numerics rule where P is more than a part of its row's sum: of float16, a smaller
// one for training, which asks for more. In bfloat the rounding of the output hides it, but not from backward: delta,
// made of O before it was rounded, cancels most of dP in a row that one key dominates.
constant constexpr float kLargeShare = 1.0f / 8;
constant constexpr float kLargeTrainedShare = 1.0f / 16;

template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys, bool kPacked = false>
struct UnitForward : Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys, kPacked> {
  typedef Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys, kPacked> Base;
  using Base::kKeyTiles;
  using Base::row;
  using Base::score;

  float limit[kRowTiles];  // of scores, for this lane

  UnitForward(constant AttentionParams& params, Sequence sequence, int first_row, const device float* sinks,
              const device float* slopes, int head, bool counts_sink, ushort lane_index)
      : Base(params, sequence, first_row, sinks, slopes, head, counts_sink, lane_index) {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      limit[r] = -INFINITY;
    }
  }

  // P = softmax step of the scores that S makes. Whether it has to count with more bits than the unit's.
  template <bool kIsOpen>
  bool softmax(constant AttentionParams& params, Rules<T> rules, int first_key) {
    const float scale = this->template make_scores<kIsOpen>(params, rules, first_key);
    float excess = fma(this->largest_score(0), scale, -limit[0]);
    MFA_UNROLL
    for (short r = 1; r < kRowTiles; ++r) {
      excess = max(excess, fma(this->largest_score(r), scale, -limit[r]));
    }
    const bool exceeds = simd_any(excess > 0);
    if (exceeds) {
      this->rescale(scale);
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; ++r) {
        this->subtract_maximum(r, scale);
      }
    } else {
      MFA_UNROLL
      for (short r = 0; r < kRowTiles; ++r) {
        this->subtract_exactly(r, scale);
      }
    }
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      this->exponentiate(r, rules, first_key);
    }
    // Gradients of bias, sinks and slopes are plain sums of dS, which delta, made of O, reaches: 11 bits of P would
    // show there in any type.
    return sums_score_gradient || (exceeds && has_large());
  }

  // Whether any P of the block is large, each lane's own against its own part of the sum, a quarter of the row's. New
  // limits: the sum only grows until then.
  bool has_large() {
    const bool may_refine = kMayRefine<T> || has_correction;
    const float share = 4 * (kMayRefine<T> && has_correction ? kLargeTrainedShare : kLargeShare);
    bool is_large = false;
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      float most = kRescaleThreshold;
      if (may_refine) {
        is_large = is_large || this->largest_score(r) > share * row[r].sum;
        // Dropout scales P after the sum.
        most = has_dropout ? -INFINITY : min(most, fast::log2(share * row[r].sum));
      }
      limit[r] = fabs(row[r].maximum) > kExactProduct ? -INFINITY : row[r].maximum + most;
    }
    return may_refine && simd_any(is_large);
  }
};

}  // namespace mfa
