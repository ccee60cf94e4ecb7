// What the ops refuse, and the sentences they do that with: the argument, what it was, what it must be. Below these
// checks nothing about a tensor's device, dtype or shape is in doubt.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "ops/arguments.h"
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

// All throw std::runtime_error.

// Rank, device, dtype and batch size of each are those of the query. Not so of a cache.
void check_alike(const Qkv& qkv);
// `slopes_batch`: rows that alibi_slopes may have, and their letter in the error.
void check_features(const Qkv& qkv, const Features& features, std::int64_t slopes_batch, const char* letter = "B");
void check_dropout(const Dropout& dropout, const torch::stable::Tensor& query);
void check_bias(const torch::stable::Tensor& bias, const Qkv& qkv);
void check_block_mask(const torch::stable::Tensor& block_mask, const Qkv& qkv, bool has_bias);
void check_results(const Results& results, const Qkv& qkv);

DType dtype_of(const torch::stable::Tensor& query);  // throws as well

}  // namespace mfa
