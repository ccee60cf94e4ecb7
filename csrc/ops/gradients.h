// Gradients that are sums over what the kernels left, by torch's own ops. All float32.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace mfa {

// [Hq], from the statistics [B,Hq,Lq,2] of backward_delta.
torch::stable::Tensor gradient_of_sinks(const torch::stable::Tensor& sinks, const torch::stable::Tensor& statistics);

// In the shape of `slopes`, [Hq] or [B,Hq], from each row's part, [B,Hq,Lq].
torch::stable::Tensor gradient_of_slopes(const torch::stable::Tensor& slopes, const torch::stable::Tensor& rows);

}  // namespace mfa
