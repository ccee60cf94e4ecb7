// statistics[row] = (lse in base 2, rowsum(dO * O) - dLSE): what the other backward kernels need of a query row. Eight
// lanes share a row; a threadgroup takes simdgroups * 4 rows of one head.
#pragma once

#include "backward.h"

namespace mfa {

template <typename T, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_delta(
    const device T* out [[buffer(kOut)]], const device T* grad_out [[buffer(kGradOut)]],
    const device float* lse [[buffer(kLse)]],
    const device float* grad_lse [[buffer(kGradLse), function_constant(has_grad_lse)]],
    const device half* correction [[buffer(kCorrection), function_constant(has_correction)]],
    device float2* statistics [[buffer(kStatistics)]], constant AttentionParams& params [[buffer(kParams)]],
    uint3 position [[threadgroup_position_in_grid]], ushort thread_index [[thread_index_in_threadgroup]]) {
  constexpr int kLanesPerRow = 8;
  const int head = position.x;
  const int batch = position.z;
  const int row = position.y * (kSimdgroups * 32 / kLanesPerRow) + thread_index / kLanesPerRow;
  const short part = thread_index % kLanesPerRow;
  const int valid = params.query_length - row;
  const long offset = batch * params.out_strides[0] + head * params.out_strides[1] + row * params.out_strides[2];
  const GuardedRows<T> outs = {out + offset, 0, valid, params.value_dim};
  const GuardedRows<T> grads = {grad_out + batch * params.grad_out_strides[0] + head * params.grad_out_strides[1] +
                                    row * params.grad_out_strides[2],
                                0, valid, params.value_dim};
  float sum = 0;
  for (int d = part * 8; d < params.value_dim; d += kLanesPerRow * 8) {
    const Octet<T> x = outs.octet(0, 0, d);
    const Octet<T> y = grads.octet(0, 0, d);
    float4 low = float4(x.low), high = float4(x.high);
    if (has_correction) {
      const Octet<half> rounding = GuardedRows<half>{correction + offset, 0, valid, params.value_dim}.octet(0, 0, d);
      low += float4(rounding.low);
      high += float4(rounding.high);
    }
    sum += dot(low, float4(y.low)) + dot(high, float4(y.high));
  }
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  sum += simd_shuffle_xor(sum, 4);
  if (part == 0 && valid > 0) {
    const long index = (long(batch) * params.query_heads + head) * params.query_length + row;
    const float natural = lse[index];
    statistics[index] =
        float2(natural == -INFINITY ? kUnseenLse : natural * M_LOG2E_F, has_grad_lse ? sum - grad_lse[index] : sum);
  }
}

#define BACKWARD_DELTA(dtype, simdgroups)                                      \
  template [[host_name("backward_delta_" #dtype "_s" #simdgroups)]] [[kernel]] \
  decltype(backward_delta<dtype, simdgroups>) backward_delta<dtype, simdgroups>;

}  // namespace mfa
