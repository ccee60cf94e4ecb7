// out = sum of exp(lse_s - lse) out_s over the parts that decode left, lse = log sum of exp(lse_s), in a fixed order.
// One thread per (row, eight values of Dv); rows are [batch or sequences, query_heads, split_queries].
#pragma once

#include "layout.h"
#include "loader.h"

namespace mfa {

template <typename T, int kThreads>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void combine(
    const device float* partial_out [[buffer(kPartialOut)]], const device float* partial_lse [[buffer(kPartialLse)]],
    device T* out [[buffer(kOut)]], device float* lse [[buffer(kLse), function_constant(writes_lse)]],
    const device int* query_starts [[buffer(kQueryStarts), function_constant(is_varlen)]],
    constant AttentionParams& params [[buffer(kParams)]], uint position [[thread_position_in_grid]]) {
  const long rows = long(is_varlen ? params.sequences : params.batch) * params.query_heads * params.split_queries;
  const int octets = (params.value_dim + 7) / 8;
  const long row = position / octets;
  const int d = position % octets * 8;
  if (row >= rows) {
    return;
  }
  const int query = row % params.split_queries;
  const int head = row / params.split_queries % params.query_heads;
  const Sequence sequence =
      Layout{nullptr, query_starts, nullptr, nullptr}.sequence(params, row / params.split_queries / params.query_heads);
  // Decode has written the rows of a sequence that isn't cut into parts.
  if (query >= sequence.query_length || sequence.query_length > params.split_queries) {
    return;
  }
  float largest = -INFINITY;
  for (int s = 0; s < params.splits; ++s) {
    largest = max(largest, partial_lse[s * rows + row]);
  }
  float sum = 0;
  Octet<float> x = {float4(0), float4(0)};
  for (int s = 0; s < params.splits; ++s) {
    const float part = partial_lse[s * rows + row];
    // A part that saw nothing has -inf, and of a block mask nothing else; a NaN must reach the result.
    if (has_block_mask && part == -INFINITY) {
      continue;
    }
    const float weight = part == -INFINITY ? 0 : fast::exp2((part - largest) * M_LOG2E_F);
    const Octet<float> y =
        GuardedRows<float>{partial_out + (s * rows + row) * params.value_dim, 0, 1, params.value_dim}.octet(0, 0, d);
    sum += weight;
    x.low += weight * y.low;
    x.high += weight * y.high;
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;
  x.low *= inverse;
  x.high *= inverse;
  store_octet_guarded(out + (sequence.index * params.out_strides[0] + head * params.out_strides[1] +
                             (sequence.first_query + query) * params.out_strides[2]),
                      x, d, params.value_dim);
  if (writes_lse && d == 0) {
    lse[first_row_index(params, sequence, head) + query] = sum == 0 ? -INFINITY : largest + log(sum);
  }
}

#define COMBINE(dtype, threads)                                      \
  template [[host_name("combine_" #dtype "_t" #threads)]] [[kernel]] \
  decltype(combine<dtype, threads>) combine<dtype, threads>;

}  // namespace mfa
