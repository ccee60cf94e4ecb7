// dBias on the matrix unit: ../backward_dbias.h, 16 queries per SIMD-group.
#pragma once

#define MFA_MATRIX_UNIT
#include "../backward_dbias.h"

namespace mfa {

// An open block has neither bounds of rows nor a mask.
template <>
struct BiasBlocks<unit> {
  static constant constexpr int kRowTiles = 2;

  template <typename T, int kHeadDim, int kValueDim, int kBlockKeys>
  static void add_block(thread BackwardBias<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys>& bias,
                        constant AttentionParams& params, Sequence sequence, Rules<T> rules, HeadRows<T> queries,
                        HeadRows<T> keys, HeadRows<T> values, HeadRows<T> grad_outs, const device float2* statistics,
                        int first_row, int first_key) {
    const int end_row = first_row + bias.kRows;
    const bool is_open = end_row <= params.query_length &&
                         view_of_queries(params, sequence, first_row, end_row).sees_all(first_key, kBlockKeys);
    if (is_open) {
      bias.add_block(params, sequence, rules, queries,
                     unit_rows<true, kBlockKeys / kFragment>(of_lane(keys, bias.lane).from(first_key)),
                     unit_rows<true, kBlockKeys / kFragment>(of_lane(values, bias.lane).from(first_key)), grad_outs,
                     statistics, first_row, first_key, false);
    } else {
      bias.add_block(params, sequence, rules, queries,
                     unit_rows<false, kBlockKeys / kFragment>(of_lane(keys, bias.lane).from(first_key)),
                     unit_rows<false, kBlockKeys / kFragment>(of_lane(values, bias.lane).from(first_key)), grad_outs,
                     statistics, first_row, first_key, true);
    }
  }
};

}  // namespace mfa
