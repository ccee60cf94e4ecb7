// What the ops refuse, and the sentences they do that with: the argument, what it was, what it must be. Below these
// checks nothing about a tensor's device, dtype or shape is in doubt.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "plan/plan.h"

namespace mfa {

// Throws the sentence that the parts make. Plain runtime errors: STD_TORCH_CHECK would put file and line before it.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// The parts are made in any case: where that takes time, `if` and refuse().
template <typename... Parts>
void refuse_unless(bool condition, const Parts&... parts) {
  if (!condition) refuse(parts...);
}

// The arguments that forward and backward share.
struct Inputs {
  const torch::stable::Tensor& query;
  const torch::stable::Tensor& key;
  const torch::stable::Tensor& value;
  const std::optional<torch::stable::Tensor>& bias;
  const std::optional<torch::stable::Tensor>& sinks;
  const std::optional<torch::stable::Tensor>& alibi_slopes;
  double scale;
  std::optional<std::int64_t> window_left, window_right;
  double softcap, dropout_p;
  const std::optional<torch::stable::Tensor>& rng_state;
};

// What forward gave, and its gradients.
struct Results {
  const torch::stable::Tensor& grad_out;
  const std::optional<torch::stable::Tensor>& grad_lse;
  const torch::stable::Tensor& out;
  const torch::stable::Tensor& lse;
  const std::optional<torch::stable::Tensor>& correction;
};

// All throw std::runtime_error.
void check_inputs(const Inputs& inputs);
// The part that is true of a cache as well: nothing about the dtype, device and batch size of key and value.
void check_features(const Inputs& inputs);
void check_results(const Results& results, const Inputs& inputs);

DType dtype_of(const torch::stable::Tensor& query);  // throws as well

}  // namespace mfa
