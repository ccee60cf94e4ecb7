// What the backward kernels share: P recomputed from the saved log-sum-exp, and dS = P * (dP - delta).
#pragma once

#include "arguments.h"
#include "mask.h"
#include "rules.h"
#include "tile.h"

namespace mfa {

// backward_delta leaves two floats of each query row: its log-sum-exp in base 2, and delta = rowsum(dO * O) - dLSE. A
// row that sees nothing has this for the first, so that its P is 0.
constant constexpr float kUnseenLse = 3e38f;

// P of two neighbours, from products q.k. `derivative` is d score / d (scale product).
template <typename T>
inline float2 probability(constant AttentionParams& params, Rules<T> rules, float2 product, int2 query, int2 key,
                          float2 lse, thread float2& derivative) {
  float2 exponent;
  if (rules.scores.are_modified()) {
    exponent = rules.scores.apply(params, product, query, key, rules.slope_log2, derivative) - lse;
  } else {
    exponent = fma(product, float2(params.scale_log2), -lse);
  }
  // P is at most 1, but the log-sum-exp of huge scores is rounded by more than an exponent holds. NaN passes.
  return fast::exp2(float2(exponent.x > 0 ? 0 : exponent.x, exponent.y > 0 ? 0 : exponent.y));
}

}  // namespace mfa
