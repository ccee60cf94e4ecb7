// The rules of one (batch, query head): from products to scores, which blocks of a mask are hidden, what dropout keeps.
#pragma once

#include "dropout.h"
#include "score.h"

namespace mfa {

template <typename T>
struct Rules {
  Scores<T> scores;
  MaskBlocks blocks;
  float slope_log2;  // ALiBi
  Dropout dropout;

  Rules(constant AttentionParams& params, Sequence sequence, const device uchar* bias, const device uchar* mask_classes,
        const device float* alibi_slopes, const device uint* rng_state, int head)
      : scores(params, sequence, bias, head),
        blocks(params, mask_classes, sequence.index, head),
        slope_log2(slope_of(params, sequence, alibi_slopes, head)),
        dropout(params, sequence, rng_state, head) {}

  // In a block of that class.
  Rules in_block(MaskClass mask_class) const {
    Rules rules = *this;
    rules.scores.ignores_bias = mask_class == kOpen;
    return rules;
  }

  template <typename Walk>
  Rules in_block(MaskClass mask_class, Walk walk) const {
    Rules rules = in_block(mask_class);
    rules.scores.mixed = walk.mixed();
    return rules;
  }
};

}  // namespace mfa
