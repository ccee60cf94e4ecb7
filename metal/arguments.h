// Arguments that kernels of several families take, a macro per group. Each is bound only where its function constant is
// on; T is the element type.
#pragma once

#include "features.h"

#define MFA_TENSOR_ARGUMENTS                                                      \
  const device T *query [[buffer(kQuery)]], const device T *key [[buffer(kKey)]], \
      const device T *value [[buffer(kValue)]]

// What scores are made of, besides products: see rules.h.
#define MFA_SCORE_ARGUMENTS                                                                          \
  const device uchar *bias [[buffer(kBias), function_constant(has_bias)]],                           \
      const device uchar *mask_classes [[buffer(kMaskClasses), function_constant(has_mask_blocks)]], \
      const device float *alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],       \
      const device uint *rng_state [[buffer(kRngState), function_constant(has_dropout)]]

// Where rows lie: see layout.h.
#define MFA_LAYOUT_ARGUMENTS                                                                  \
  const device int2 *tile_map [[buffer(kTileMap), function_constant(is_varlen)]],             \
      const device int *query_starts [[buffer(kQueryStarts), function_constant(is_varlen)]],  \
      const device int *key_starts [[buffer(kKeyStarts), function_constant(has_key_starts)]], \
      const device int *key_lengths [[buffer(kKeyLengths), function_constant(has_key_lengths)]]

// The problem, and this thread's place in it.
#define MFA_PLACE_ARGUMENTS                                                                              \
  constant AttentionParams &params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]], \
      ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane_index [[thread_index_in_simdgroup]]
