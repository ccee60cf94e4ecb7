// What the backward kernels share: P recomputed from the saved log-sum-exp, and dS = P * (dP - delta).
#pragma once

#include "dropout.h"
#include "mask.h"
#include "score.h"
#include "tile.h"

namespace mfa {

// Of one query row, as backward_delta leaves it.
struct Statistics {
  float lse;    // log-sum-exp in base 2; kUnseenLse for a row that sees nothing, so that its P is 0
  float delta;  // rowsum(dO * O) - dLSE
};

constant constexpr float kUnseenLse = 3e38f;

// P of two neighbours, from products q.k. `derivative` is d score / d (scale product).
template <typename T>
inline float2 probability(constant AttentionParams& params, Scores<T> scores, float2 product, int2 query, int2 key,
                          float slope_log2, float2 lse, thread float2& derivative) {
  if (scores.are_modified()) {
    return fast::exp2(scores.apply(params, product, query, key, slope_log2, derivative) - lse);
  }
  return fast::exp2(fma(product, float2(params.scale_log2), -lse));
}

}  // namespace mfa
