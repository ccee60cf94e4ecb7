// One attention problem per batch entry and head.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "ops/attention.h"
#include "ops/checks.h"
#include "ops/gradients.h"
#include "ops/operands.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the ops take besides query [B,Hq,Lq,D], key [B,Hkv,Lk,D] and value [B,Hkv,Lk,Dv], in the schemas' order.
struct Terms {
  std::optional<Tensor> bias;  // bool, float32 or the query's dtype; each size 1 or that of [B,Hq,Lq,Lk]
  Features features;
  Dropout dropout;
  std::optional<Tensor> block_mask;  // int32 [words], see src/mfa/block_mask.py

  static Terms take(Stack& stack) {
    return {
        .bias = stack.take<std::optional<Tensor>>(),
        .features = stack.take<Features>(),
        .dropout = stack.take<Dropout>(),
        .block_mask = stack.take<std::optional<Tensor>>(),
    };
  }
};

// Their problem, checked and bound.
Operands operands_of(const Qkv& qkv, const Terms& terms) {
  check_alike(qkv);
  check_features(qkv, terms.features, qkv.query.size(0));
  check_dropout(terms.dropout, qkv.query);
  if (terms.bias) check_bias(*terms.bias, qkv);
  if (terms.block_mask) check_block_mask(*terms.block_mask, qkv, terms.bias.has_value());
  Operands operands(qkv, terms.features);
  operands.read(terms.dropout);
  if (terms.bias) {
    operands.read_bias(*terms.bias);
  }
  if (terms.block_mask) operands.read_block_mask(*terms.block_mask);
  return operands;
}

// `correction`: where to leave it, or null.
std::tuple<Tensor, Tensor> run_forward(const Qkv& qkv, const Terms& terms, std::optional<Tensor>* correction,
                                       bool trains_terms) {
  const Tensor& query = qkv.query;
  const std::int64_t value_dim = qkv.value.size(3);
  Operands operands = operands_of(qkv, terms);
  const Tensor out = allocate_rows(query, value_dim, query.scalar_type());
  const Tensor lse = allocate(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  operands.write_results(out, lse);
  if (correction && operands.problem.dtype == DType::f32) {
    *correction = allocate(query, {0}, ScalarType::Half);
  } else if (correction) {
    *correction = allocate_rows(query, value_dim, ScalarType::Half);
    operands.write_correction(**correction, trains_terms);
  }
  operands.run(plan_forward(operands.problem));
  return {out, lse};
}

// Returns out [B,Hq,Lq,Dv] and lse [B,Hq,Lq] float32.
std::tuple<Tensor, Tensor> forward(const Qkv& qkv, const Terms& terms) {
  return run_forward(qkv, terms, nullptr, false);
}

// Also returns what rounding took from out, in its shape; of size 0 in float32 (metal/correction.h).
std::tuple<Tensor, Tensor, Tensor> forward_with_correction(const Qkv& qkv, const Terms& terms, bool trains_terms) {
  std::optional<Tensor> correction;
  const auto [out, lse] = run_forward(qkv, terms, &correction, trains_terms);
  return {out, lse, *correction};
}

std::atomic<std::int64_t> scratch_limit = kDefaultScratchLimit;
std::atomic<int> backward_mode = 0;

BackwardMode mode_of(int number) {
  return number == 5 ? BackwardMode::five_gemm : number == 7 ? BackwardMode::seven_gemm : BackwardMode::automatic;
}

// Which gradients to compute: those that are asked for, of tensors that are there.
Gradients wanted(const Terms& terms, const std::vector<bool>& output_mask) {
  refuse_unless(output_mask.size() == 6, "output_mask must have 6 entries");
  Gradients gradients;
  gradients.query = output_mask[0];
  gradients.key = output_mask[1];
  gradients.value = output_mask[2];
  gradients.bias = output_mask[3] && terms.bias;
  gradients.sinks = output_mask[4] && terms.features.sinks;
  gradients.alibi = output_mask[5] && terms.features.alibi_slopes;
  refuse_unless(!gradients.bias || terms.bias->scalar_type() != ScalarType::Bool,
                "bias has dtype bool; output_mask must be False there, since a mask has no gradient");
  gradients.mode = mode_of(backward_mode);
  gradients.scratch_limit = scratch_limit;
  return gradients;
}

// Returns the gradients of query, key, value, bias, sinks and alibi_slopes, with the shape and dtype of each; the first
// three are B,L,H,D in memory if their tensor is. One that `output_mask` (in this order) doesn't ask for, or whose
// tensor is not there, has size 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Qkv& qkv, const Terms& terms,
                                                                    const Results& results,
                                                                    const std::vector<bool>& output_mask) {
  const Tensor &query = qkv.query, &key = qkv.key, &value = qkv.value;
  Operands operands = operands_of(qkv, terms);
  check_results(results, qkv);
  Gradients gradients = wanted(terms, output_mask);
  operands.read(results, gradients);

  const auto nothing = [&] { return allocate(query, {0}, query.scalar_type()); };  // where a gradient isn't wanted
  const auto floats = [&](std::initializer_list<std::int64_t> sizes) {
    return allocate(query, sizes, ScalarType::Float);
  };
  const auto rows = [&](bool wanted, Argument argument, const Tensor& tensor, Strides& strides) {
    if (!wanted) return nothing();
    const Tensor gradient = allocate_rows(tensor, tensor.size(3), tensor.scalar_type());
    strides = operands.write_rows(argument, gradient);
    return gradient;
  };
  const std::int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  // The kernel that sums up ALiBi's gradient writes that of query too, wanted or not.
  const bool writes_query = gradients.query || gradients.alibi;
  Tensor grad_query = rows(writes_query, kGradQuery, query, gradients.query_strides);
  const Tensor grad_key = rows(gradients.key, kGradKey, key, gradients.key_strides);
  const Tensor grad_value = rows(gradients.value, kGradValue, value, gradients.value_strides);
  Tensor grad_bias = nothing(), grad_sinks = nothing(), grad_slopes = nothing();
  if (gradients.bias) {
    grad_bias = floats({terms.bias->size(0), terms.bias->size(1), terms.bias->size(2), terms.bias->size(3)});
    operands.write(kGradBias, grad_bias);
  }
  if (gradients.alibi) {
    grad_slopes = floats({batch, heads, length});  // to be summed
    operands.write(kGradAlibi, grad_slopes);
  }
  const Tensor statistics = floats({batch, heads, length, 2});
  operands.write(kStatistics, statistics);

  operands.run(plan_backward(operands.problem, gradients));

  if (!gradients.query) grad_query = nothing();
  if (gradients.bias) grad_bias = torch::stable::to(grad_bias, terms.bias->scalar_type());
  if (gradients.sinks) grad_sinks = gradient_of_sinks(*terms.features.sinks, statistics);
  if (gradients.alibi) grad_slopes = gradient_of_slopes(*terms.features.alibi_slopes, grad_slopes);
  return {grad_query, grad_key, grad_value, grad_bias, grad_sinks, grad_slopes};
}

}  // namespace

void attention_forward(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&forward, stack, argument_count, result_count);
}

void attention_forward_with_correction(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&forward_with_correction, stack, argument_count, result_count);
}

void attention_backward(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&backward, stack, argument_count, result_count);
}

}  // namespace mfa

std::int64_t mfa_set_scratch_limit(std::int64_t bytes) {
  return mfa::scratch_limit.exchange(std::max<std::int64_t>(bytes, 0));
}

int mfa_set_backward_mode(int mode) { return mfa::backward_mode.exchange(mode); }
