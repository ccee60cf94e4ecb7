// What the ops of every family take. Fields are in the order of the schemas (csrc/library.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "ops/stack.h"

namespace mfa {

// Dense: query [B,Hq,Lq,D], key [B,Hkv,Lk,D], value [B,Hkv,Lk,Dv].
struct Qkv {
  torch::stable::Tensor query, key, value;

  static Qkv take(Stack& stack) {
    return {
        .query = stack.take<torch::stable::Tensor>(),
        .key = stack.take<torch::stable::Tensor>(),
        .value = stack.take<torch::stable::Tensor>(),
    };
  }
};

struct Features {
  std::optional<torch::stable::Tensor> sinks;         // float32 [Hq]
  std::optional<torch::stable::Tensor> alibi_slopes;  // float32 [Hq], [B,Hq], or [N,Hq] for N packed sequences
  double scale;
  std::optional<std::int64_t> window_left, window_right;
  double softcap;

  static Features take(Stack& stack) {
    return {
        .sinks = stack.take<std::optional<torch::stable::Tensor>>(),
        .alibi_slopes = stack.take<std::optional<torch::stable::Tensor>>(),
        .scale = stack.take<double>(),
        .window_left = stack.take<std::optional<std::int64_t>>(),
        .window_right = stack.take<std::optional<std::int64_t>>(),
        .softcap = stack.take<double>(),
    };
  }
};

struct Dropout {
  double p;
  std::optional<torch::stable::Tensor> rng_state;  // int64 [2] (seed, offset), given iff p > 0

  static Dropout take(Stack& stack) {
    return {
        .p = stack.take<double>(),
        .rng_state = stack.take<std::optional<torch::stable::Tensor>>(),
    };
  }
};

// What backward takes besides: what forward gave, and its gradients.
struct Results {
  torch::stable::Tensor grad_out;
  std::optional<torch::stable::Tensor> grad_lse;
  torch::stable::Tensor out, lse;
  std::optional<torch::stable::Tensor> correction;

  static Results take(Stack& stack) {
    return {
        .grad_out = stack.take<torch::stable::Tensor>(),
        .grad_lse = stack.take<std::optional<torch::stable::Tensor>>(),
        .out = stack.take<torch::stable::Tensor>(),
        .lse = stack.take<torch::stable::Tensor>(),
        .correction = stack.take<std::optional<torch::stable::Tensor>>(),
    };
  }
};

}  // namespace mfa
