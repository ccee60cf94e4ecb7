// The ops on real tensors: checks, Problem, outputs, launches.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace mfa {

// query [B,Hq,Lq,D], key [B,Hkv,Lk,D], value [B,Hkv,Lk,Dv], all on MPS, or on the CPU inside mfa.simulate().
// Returns out [B,Hq,Lq,Dv] and lse [B,Hq,Lq] float32. Throws std::runtime_error with the sentence that users read.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_forward(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key, const torch::stable::Tensor& value,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& alibi_slopes, double scale, std::optional<std::int64_t> window_left,
    std::optional<std::int64_t> window_right, double softcap, double dropout_p,
    const std::optional<torch::stable::Tensor>& rng_state);

}  // namespace mfa
