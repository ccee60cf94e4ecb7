// From products q.k to the scores that softmax sees, in base 2: scale -> softcap -> + bias, ALiBi -> mask. Every
// feature is a function constant; with all of them off a kernel folds the scale into the exponential and never calls
// this.
#pragma once

#include "block_mask.h"
#include "softmax.h"

namespace mfa {

// Of one (batch, query head).
template <typename T>
struct Scores {
  const device uchar* bias;
  int query_length, key_length;
  int first_biased = 0;       // the key of the bias's first column
  bool ignores_bias = false;  // in a block that a mask leaves open
  BlockMask block_mask;
  int mixed = 0;  // the number of the block mask's block, or why it has none

  Scores(constant AttentionParams& params, Sequence sequence, const device uchar* bias_, int head)
      : bias(bias_),
        query_length(sequence.query_length),
        key_length(sequence.key_length),
        block_mask(params, bias_, sequence.index, head) {
    if (bias_is_of_last_keys) {
      first_biased = key_length - params.bias_columns;
    }
    if (has_bias) {
      bias += (sequence.index * params.bias_strides[0] + head * params.bias_strides[1]) * bias_element_size<T>();
    }
  }

  // Of a head further on.
  Scores of_member(constant AttentionParams& params, int member) const {
    Scores scores = *this;
    if (has_bias) {
      scores.bias += member * params.bias_strides[1] * bias_element_size<T>();
    }
    if (has_block_mask) {
      scores.ignores_bias = ignores_bias || mixed == kSeenWhole;
    }
    return scores;
  }

  bool hides_block() const { return has_block_mask && mixed == kNotListed; }

  bool are_modified() const { return has_softcap || (has_bias && !ignores_bias) || has_alibi; }

  // Two neighbours: queries `query` and keys `key` of products `product`. `derivative` is d score / d (scale product).
  float2 apply(constant AttentionParams& params, float2 product, int2 query, int2 key, float slope_log2,
               thread float2& derivative) const {
    float2 x = product * params.scale_log2;
    derivative = float2(1);
    if (has_softcap) {
      const float2 t = tanh(product * (params.scale / params.softcap));
      x = t * (params.softcap * M_LOG2E_F);
      derivative = 1 - t * t;
    }
    // A tile may reach past the last query or key; what it would read there is masked, but must not be read.
    const int2 q = min(query, int2(query_length - 1));
    const int2 k = min(key, int2(key_length - 1));
    if (has_bias && !ignores_bias) {
      x = float2(with_bias(params, x.x, q.x, k.x), with_bias(params, x.y, q.y, k.y));
    }
    if (has_alibi) {
      x -= slope_log2 * float2(abs(q + (key_length - query_length) - k));
    }
    return x;
  }

  long bias_index(constant AttentionParams& params, int query, int key) const {
    return query * params.bias_strides[2] + (key - first_biased) * params.bias_strides[3];
  }

  // Whether the bias hides the key; a NaN must be seen.
  bool hides(constant AttentionParams& params, int query, int key) const {
    if (bias_is_of_last_keys && key < first_biased) {
      return false;
    }
    const long index = bias_index(params, query, key);
    return has_mask ? bias[index] == 0 : bias_value<T>(bias, index) <= kHidingBias;
  }

  float with_bias(constant AttentionParams& params, float x, int query, int key) const {
    if (has_block_mask) {
      return block_mask.sees(mixed, query, key) ? x : kMasked;
    }
    if (bias_is_of_last_keys && key < first_biased) {
      return x;
    }
    const long index = bias_index(params, query, key);
    if (has_mask) {
      return bias[index] != 0 ? x : kMasked;
    }
    const float b = bias_value<T>(bias, index);
    return b <= kHidingBias ? kMasked : x + b * M_LOG2E_F;
  }
};

// The ALiBi slope of a query head, for scores in base 2.
inline float slope_of(constant AttentionParams& params, Sequence sequence, const device float* slopes, int head) {
  return has_alibi ? slopes[sequence.index * params.alibi_batch_stride + head] * M_LOG2E_F : 0;
}

}  // namespace mfa
