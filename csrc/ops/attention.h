// The ops on real tensors: checks, Problem, outputs, launches.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace mfa {

// All tensors on MPS, or on the CPU inside mfa.simulate(). query [B,Hq,Lq,D], key [B,Hkv,Lk,D], value [B,Hkv,Lk,Dv];
// bias of rank 4, bool, float32 or the query's dtype, each size 1 or that of [B,Hq,Lq,Lk]; sinks float32 [Hq];
// alibi_slopes float32 [Hq] or [B,Hq]; rng_state int64 [2] (seed, offset), given iff dropout_p > 0. Both throw
// std::runtime_error with the sentence that users read.

// Returns out [B,Hq,Lq,Dv] and lse [B,Hq,Lq] float32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_forward(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key, const torch::stable::Tensor& value,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& alibi_slopes, double scale, std::optional<std::int64_t> window_left,
    std::optional<std::int64_t> window_right, double softcap, double dropout_p,
    const std::optional<torch::stable::Tensor>& rng_state);

// Also returns what rounding took from out, in its shape; of size 0 in float32 (metal/correction.h).
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> attention_forward_with_correction(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key, const torch::stable::Tensor& value,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& alibi_slopes, double scale, std::optional<std::int64_t> window_left,
    std::optional<std::int64_t> window_right, double softcap, double dropout_p,
    const std::optional<torch::stable::Tensor>& rng_state);

// Returns the gradients of query, key, value, bias, sinks and alibi_slopes, with the shape and dtype of each; the first
// three are B,L,H,D in memory if their tensor is. One that `output_mask` (in this order) doesn't ask for, or whose
// tensor is not there, has size 0.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
attention_backward(const torch::stable::Tensor& grad_out, const std::optional<torch::stable::Tensor>& grad_lse,
                   const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                   const torch::stable::Tensor& value, const torch::stable::Tensor& out,
                   const torch::stable::Tensor& lse, const std::optional<torch::stable::Tensor>& bias,
                   const std::optional<torch::stable::Tensor>& sinks,
                   const std::optional<torch::stable::Tensor>& alibi_slopes, double scale,
                   std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right, double softcap,
                   double dropout_p, const std::optional<torch::stable::Tensor>& rng_state,
                   const std::vector<bool>& output_mask, const std::optional<torch::stable::Tensor>& correction);

// Sequences packed one behind the other: query [Tq,Hq,D], key [Tk,Hkv,D], value [Tk,Hkv,Dv]; sequence n has rows
// starts[n] ... starts[n+1] - 1, int32 [N+1]; alibi_slopes [Hq] or [N,Hq]. The contents of the starts are not read
// here: the kernels clamp them. Lengths' maxima are not needed.
struct Varlen {
  const torch::stable::Tensor& query;
  const torch::stable::Tensor& key;
  const torch::stable::Tensor& value;
  const torch::stable::Tensor& query_starts;
  const torch::stable::Tensor& key_starts;
  const std::optional<torch::stable::Tensor>& sinks;
  const std::optional<torch::stable::Tensor>& alibi_slopes;
  double scale;
  std::optional<std::int64_t> window_left, window_right;
  double softcap, dropout_p;
  const std::optional<torch::stable::Tensor>& rng_state;
};

// Returns out [Tq,Hq,Dv] and lse [Hq,Tq] float32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_varlen_forward(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key, const torch::stable::Tensor& value,
    const torch::stable::Tensor& cu_seqlens_q, const torch::stable::Tensor& cu_seqlens_k, std::int64_t max_seqlen_q,
    std::int64_t max_seqlen_k, const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& alibi_slopes, double scale, std::optional<std::int64_t> window_left,
    std::optional<std::int64_t> window_right, double softcap, double dropout_p,
    const std::optional<torch::stable::Tensor>& rng_state);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
attention_varlen_forward_with_correction(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                                         const torch::stable::Tensor& value, const torch::stable::Tensor& cu_seqlens_q,
                                         const torch::stable::Tensor& cu_seqlens_k, std::int64_t max_seqlen_q,
                                         std::int64_t max_seqlen_k, const std::optional<torch::stable::Tensor>& sinks,
                                         const std::optional<torch::stable::Tensor>& alibi_slopes, double scale,
                                         std::optional<std::int64_t> window_left,
                                         std::optional<std::int64_t> window_right, double softcap, double dropout_p,
                                         const std::optional<torch::stable::Tensor>& rng_state);

// Returns the gradients of query, key, value, sinks and alibi_slopes; `output_mask` is in this order.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
attention_varlen_backward(const torch::stable::Tensor& grad_out, const std::optional<torch::stable::Tensor>& grad_lse,
                          const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                          const torch::stable::Tensor& value, const torch::stable::Tensor& out,
                          const torch::stable::Tensor& lse, const torch::stable::Tensor& cu_seqlens_q,
                          const torch::stable::Tensor& cu_seqlens_k, std::int64_t max_seqlen_q,
                          std::int64_t max_seqlen_k, const std::optional<torch::stable::Tensor>& sinks,
                          const std::optional<torch::stable::Tensor>& alibi_slopes, double scale,
                          std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right,
                          double softcap, double dropout_p, const std::optional<torch::stable::Tensor>& rng_state,
                          const std::vector<bool>& output_mask, const std::optional<torch::stable::Tensor>& correction);

// query [B,Hq,Lq,D] over caches [B,Hkv,capacity,D|Dv], or [pages,Hkv,page,D|Dv] with block_table int32
// [B,pages_per_sequence]; cache_lengths int32 [B]: live keys. int8 and float8_e4m3fn caches have scales, float32 [B or
// pages,Hkv,capacity or page]. num_splits 0: chosen by the plan. Returns out [B,Hq,Lq,Dv] and lse [B,Hq,Lq] float32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_decode(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key_cache,
    const torch::stable::Tensor& value_cache, const torch::stable::Tensor& cache_lengths,
    const std::optional<torch::stable::Tensor>& block_table, const std::optional<torch::stable::Tensor>& key_scale,
    const std::optional<torch::stable::Tensor>& value_scale, const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& alibi_slopes, double scale, std::optional<std::int64_t> window_left,
    std::optional<std::int64_t> window_right, double softcap, std::int64_t num_splits);

// float32 [Hq], from what backward_delta left.
torch::stable::Tensor gradient_of_sinks(const torch::stable::Tensor& sinks, const torch::stable::Tensor& statistics);

}  // namespace mfa

// Knobs of the process, for Python (ctypes), tests and benchmarks. Each returns the value that it replaces.

// Scratch that one backward pass may take, in bytes: 64 MiB, until set. A smaller limit costs more launches; below what
// one key head's group needs (4 bytes per score, per query head), dQ is computed without scratch. Negative: as 0.
extern "C" __attribute__((visibility("default"))) std::int64_t mfa_set_scratch_limit(std::int64_t bytes);

// The backward pass's mode, see BackwardMode in plan.h: 5 or 7 GEMMs; anything else, as until set: as tuning.def says.
extern "C" __attribute__((visibility("default"))) int mfa_set_backward_mode(int mode);
