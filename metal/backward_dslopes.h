// grad_slopes[n][h] = sum of what backward_dq left of the rows of packed sequence n, in a fixed order. One SIMD-group
// per (head, sequence).
#pragma once

#include "layout.h"
#include "types.h"

namespace mfa {

template <typename T, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dslopes(
    const device T* grad_alibi [[buffer(kGradAlibi)]], const device int* query_starts [[buffer(kQueryStarts)]],
    device T* grad_slopes [[buffer(kGradSlopes)]], constant AttentionParams& params [[buffer(kParams)]],
    uint3 position [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  const int head = position.x;
  const int sequence = position.y;
  const int2 rows = Layout{nullptr, query_starts, nullptr, nullptr}.packed(query_starts, sequence, params.query_length);
  const device T* head_rows = grad_alibi + long(head) * params.query_length;
  T sum = 0;
  for (int row = lane; row < rows.y; row += 32) {
    sum += head_rows[rows.x + row];
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    grad_slopes[long(sequence) * params.query_heads + head] = sum;
  }
}

#define BACKWARD_DSLOPES(dtype, simdgroups)                                      \
  template [[host_name("backward_dslopes_" #dtype "_s" #simdgroups)]] [[kernel]] \
  decltype(backward_dslopes<dtype, simdgroups>) backward_dslopes<dtype, simdgroups>;

}  // namespace mfa
