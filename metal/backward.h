// What the backward kernels share: P recomputed from the saved log-sum-exp, and dS = P * (dP - delta).
#pragma once

#include "arguments.h"
#include "mask.h"
#include "rules.h"
#include "tile.h"

#define MFA_GRADIENT_ARGUMENTS                                         \
  MFA_TENSOR_ARGUMENTS, const device T *grad_out [[buffer(kGradOut)]], \
      const device float2 *statistics [[buffer(kStatistics)]]

#define BACKWARD_DKDV_ARGUMENTS                                                                              \
  MFA_GRADIENT_ARGUMENTS, device T *grad_key [[buffer(kGradKey), function_constant(wants_grad_key)]],        \
      device T *grad_value [[buffer(kGradValue), function_constant(wants_grad_value)]], MFA_SCORE_ARGUMENTS, \
      MFA_LAYOUT_ARGUMENTS, MFA_PLACE_ARGUMENTS, constant int &first_unit [[buffer(kFirstUnit)]]

#define BACKWARD_DQ_ARGUMENTS                                                                                    \
  MFA_GRADIENT_ARGUMENTS, device T *grad_query [[buffer(kGradQuery)]],                                           \
      device float *grad_alibi [[buffer(kGradAlibi), function_constant(wants_grad_alibi)]], MFA_SCORE_ARGUMENTS, \
      MFA_LAYOUT_ARGUMENTS, MFA_PLACE_ARGUMENTS, uint3 grid [[threadgroups_per_grid]]

#define BACKWARD_DKDV(dtype, path, head_dim, value_dim, simdgroups, row_tiles, block_queries)      \
  template[[host_name("backward_dkdv_" #dtype "_d" #head_dim "_v" #value_dim MFA_IN_NAME_##path    \
                      "_s" #simdgroups "_r" #row_tiles "_q" #block_queries)]] [[kernel]]           \
  decltype(backward_dkdv_##path<dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries>) \
      backward_dkdv_##path<dtype, head_dim, value_dim, simdgroups, row_tiles, block_queries>;

#define BACKWARD_DQ(dtype, path, own, head_dim, value_dim, simdgroups, row_tiles, block_keys)          \
  template[[host_name("backward_dq_" #dtype "_d" #head_dim "_v" #value_dim "_" #own MFA_IN_NAME_##path \
                      "_s" #simdgroups "_r" #row_tiles "_k" #block_keys)]] [[kernel]]                  \
  decltype(backward_dq_##path<dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys>)     \
      backward_dq_##path<dtype, own, head_dim, value_dim, simdgroups, row_tiles, block_keys>;

namespace mfa {

// backward_delta leaves two floats of each query row: its log-sum-exp in base 2, and delta = rowsum(dO * O) - dLSE. A
// row that sees nothing has this for the first, so that its P is 0.
constant constexpr float kUnseenLse = 3e38f;

// P, or dS, of a block counts with more bits than the matrix unit's 11 where one P of it exceeds this: fewer than 16
// such terms of a row may make up what becomes of it, and their rounding would not average out.
constant constexpr float kLargeProbability = 1.0f / 16;

// Whether it does, of the largest P of a lane; the same for all lanes. What dropout keeps is larger by its factor.
template <typename T>
inline bool needs_refinement(float largest, Dropout dropout) {
  return kMayRefine<T> && simd_any((has_dropout ? largest * dropout.factor : largest) > kLargeProbability);
}

// P of two neighbours, from products q.k. `derivative` is d score / d (scale product).
template <typename T>
inline float2 probability(constant AttentionParams &params, Rules<T> rules, float2 product, int2 query, int2 key,
                          float2 lse, thread float2 &derivative) {
  float2 exponent;
  if (rules.scores.are_modified()) {
    exponent = rules.scores.apply(params, product, query, key, rules.slope_log2, derivative) - lse;
  } else {
    exponent = fma(product, float2(params.scale_log2), -lse);
  }
  // P is at most 1, but the log-sum-exp of huge scores is rounded by more than an exponent holds. NaN passes.
  return fast::exp2(float2(exponent.x > 0 ? 0 : exponent.x, exponent.y > 0 ? 0 : exponent.y));
}

#ifndef MFA_MATRIX_UNIT
// A SIMD-group's own rows, in device memory, for left operands. A row past the last reads as the last, without a
// branch: what becomes of it stays in its row, which is not stored, or is multiplied by zeros (backward_dq_from_ds).
template <typename T, int kRowTiles>
struct OwnRows {
  const device T *row[kRowTiles];  // of this lane
  int dim;

  OwnRows(HeadRows<T> rows, int first, Lane lane) : dim(rows.dim) {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      row[r] = rows.from(max(0, min(first + r * kFragment + lane.row, rows.length - 1))).base;
    }
  }

  vec<T, 4> quad(short tile, short, short d) const {
    return is_aligned && is_exact_head ? load_quad(row[tile] + d) : GuardedRows<T>{row[tile], 0, 1, dim}.quad(0, 0, d);
  }
  Octet<T> octet(short tile, short, short d) const {
    return is_aligned && is_exact_head ? load_octet(row[tile] + d)
                                       : GuardedRows<T>{row[tile], 0, 1, dim}.octet(0, 0, d);
  }
};
#endif

}  // namespace mfa
