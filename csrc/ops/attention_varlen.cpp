// Packed sequences as a dense problem of batch 1: the tensors are views [1,H,T,D], and the kernels find each sequence's
// rows through its starts, which stay on the device.
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "ops/attention.h"
#include "ops/checks.h"
#include "ops/gradients.h"
#include "ops/operands.h"
#include "ops/packed.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the ops take besides query [Tq,Hq,D], key [Tk,Hkv,D] and value [Tk,Hkv,Dv], in the schemas' order. Sequence n
// has rows cu_seqlens[n] ... cu_seqlens[n+1] - 1, int32 [N+1]. Their contents are not read here: the kernels clamp
// them.
struct Terms {
  Tensor cu_seqlens_q, cu_seqlens_k;
  std::int64_t max_seqlen_q, max_seqlen_k;
  Features features;
  Dropout dropout;
  std::optional<Tensor> seqused_k;  // int32 [N]: how many keys of each sequence count; none: all

  static Terms take(Stack& stack) {
    return {
        .cu_seqlens_q = stack.take<Tensor>(),
        .cu_seqlens_k = stack.take<Tensor>(),
        .max_seqlen_q = stack.take<std::int64_t>(),
        .max_seqlen_k = stack.take<std::int64_t>(),
        .features = stack.take<Features>(),
        .dropout = stack.take<Dropout>(),
        .seqused_k = stack.take<std::optional<Tensor>>(),
    };
  }

  std::int64_t sequences() const { return cu_seqlens_q.size(0) - 1; }
};

Qkv view_of(const Qkv& qkv) {
  return {packed_view("query", qkv.query), packed_view("key", qkv.key), packed_view("value", qkv.value)};
}

Results view_of(const Results& results) {
  Results view{
      .grad_out = packed_view("grad_out", results.grad_out),
      .out = packed_view("out", results.out),
      .lse = torch::stable::unsqueeze(results.lse, 0),
  };
  if (results.grad_lse) view.grad_lse = torch::stable::unsqueeze(*results.grad_lse, 0);
  if (results.correction) view.correction = packed_view("correction", *results.correction);
  return view;
}

// Their problem, checked and bound.
Operands operands_of(const Qkv& view, const Terms& terms) {
  check_alike(view);
  const std::int64_t size = terms.cu_seqlens_q.dim() == 1 ? terms.cu_seqlens_q.size(0) : 0;
  check_starts("cu_seqlens_q", terms.cu_seqlens_q, view.query, size);
  check_starts("cu_seqlens_k", terms.cu_seqlens_k, view.query, size);
  if (terms.seqused_k) {
    const Tensor& used = *terms.seqused_k;
    refuse_unless(used.device() == view.query.device() && used.scalar_type() == ScalarType::Int && used.dim() == 1 &&
                      used.size(0) == terms.sequences(),
                  "seqused_k must be int32 [N], on the device of query");
  }
  check_features(view, terms.features, terms.sequences(), "N");
  check_dropout(terms.dropout, view.query);
  Operands operands(view, terms.features, terms.sequences());
  operands.problem.longest_query = terms.max_seqlen_q;
  operands.problem.longest_key = terms.max_seqlen_k;
  operands.read(terms.dropout);
  operands.read_contiguous(kQueryStarts, terms.cu_seqlens_q);
  operands.read_contiguous(kKeyStarts, terms.cu_seqlens_k);
  if (terms.seqused_k) {
    operands.problem.has_key_lengths = true;
    operands.read_contiguous(kKeyLengths, *terms.seqused_k);
  }
  return operands;
}

// `correction`: where to leave it, or null.
std::tuple<Tensor, Tensor> run_forward(const Qkv& qkv, const Terms& terms, std::optional<Tensor>* correction,
                                       bool trains_terms) {
  const Tensor &query = qkv.query, &value = qkv.value;
  Operands operands = operands_of(view_of(qkv), terms);
  const Tensor out = packed_rows(query, value.size(2), query.scalar_type());
  const Tensor lse = packed_lse(query);
  operands.write_results(packed_view("out", out), lse);
  if (correction && operands.problem.dtype == DType::f32) {
    *correction = allocate(query, {0}, ScalarType::Half);
  } else if (correction) {
    *correction = packed_rows(query, value.size(2), ScalarType::Half);
    operands.write_correction(packed_view("correction", **correction), trains_terms);
  }
  if (terms.sequences() > 0) operands.run(plan_forward(operands.problem));
  return {out, lse};
}

// Returns out [Tq,Hq,Dv] and lse [Hq,Tq] float32.
std::tuple<Tensor, Tensor> forward(const Qkv& qkv, const Terms& terms) {
  return run_forward(qkv, terms, nullptr, false);
}

// Also returns what rounding took from out, in its shape; of size 0 in float32.
std::tuple<Tensor, Tensor, Tensor> forward_with_correction(const Qkv& qkv, const Terms& terms, bool trains_terms) {
  std::optional<Tensor> correction;
  const auto [out, lse] = run_forward(qkv, terms, &correction, trains_terms);
  return {out, lse, *correction};
}

// Returns the gradients of query, key, value, sinks and alibi_slopes; `output_mask` is in this order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Qkv& qkv, const Terms& terms, const Results& packed,
                                                            const std::vector<bool>& output_mask) {
  const Tensor &query = qkv.query, &key = qkv.key, &value = qkv.value;
  const Qkv view = view_of(qkv);
  Operands operands = operands_of(view, terms);
  refuse_unless(output_mask.size() == 5, "output_mask must have 5 entries");
  const Results results = view_of(packed);
  check_results(results, view);

  Gradients gradients;
  gradients.query = output_mask[0];
  gradients.key = output_mask[1];
  gradients.value = output_mask[2];
  gradients.sinks = output_mask[3] && terms.features.sinks;
  gradients.alibi = output_mask[4] && terms.features.alibi_slopes;
  operands.read(results, gradients);

  const auto floats = [&](std::initializer_list<std::int64_t> sizes) {
    return allocate(query, sizes, ScalarType::Float);
  };
  const auto nothing = [&] { return allocate(query, {0}, query.scalar_type()); };
  const auto rows = [&](bool wanted, Argument argument, const char* name, const Tensor& tensor, Strides& strides) {
    if (!wanted) return nothing();
    const Tensor gradient = torch::stable::new_zeros(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)});
    strides = operands.write_rows(argument, packed_view(name, gradient));
    return gradient;
  };
  const Tensor grad_query =
      rows(gradients.query || gradients.alibi, kGradQuery, "query", query, gradients.query_strides);
  const Tensor grad_key = rows(gradients.key, kGradKey, "key", key, gradients.key_strides);
  const Tensor grad_value = rows(gradients.value, kGradValue, "value", value, gradients.value_strides);
  const std::int64_t heads = query.size(1), length = query.size(0);
  Tensor slope_rows = nothing(), grad_slopes = nothing();
  const bool per_sequence = gradients.alibi && terms.features.alibi_slopes->dim() == 2;
  if (gradients.alibi) {
    slope_rows = torch::stable::new_zeros(query, {1, heads, length}, ScalarType::Float);
    operands.write(kGradAlibi, slope_rows);
  }
  if (per_sequence) {
    grad_slopes = torch::stable::new_zeros(query, {terms.sequences(), heads}, ScalarType::Float);
    operands.write(kGradSlopes, grad_slopes);
  }
  // Of rows of no sequence, backward_delta makes statistics too.
  const Tensor statistics = floats({1, heads, length, 2});
  operands.write(kStatistics, statistics);
  if (terms.sequences() > 0) operands.run(plan_backward(operands.problem, gradients));

  Tensor grad_sinks = nothing();
  if (gradients.sinks) {
    grad_sinks = terms.sequences() > 0 ? gradient_of_sinks(*terms.features.sinks, statistics)
                                       : torch::stable::new_zeros(*terms.features.sinks, {heads});
  }
  if (gradients.alibi && !per_sequence) grad_slopes = gradient_of_slopes(*terms.features.alibi_slopes, slope_rows);
  return {gradients.query ? grad_query : nothing(), grad_key, grad_value, grad_sinks, grad_slopes};
}

}  // namespace

void attention_varlen_forward(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&forward, stack, argument_count, result_count);
}

void attention_varlen_forward_with_correction(StableIValue* stack, std::uint64_t argument_count,
                                              std::uint64_t result_count) {
  unbox(&forward_with_correction, stack, argument_count, result_count);
}

void attention_varlen_backward(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&backward, stack, argument_count, result_count);
}

}  // namespace mfa
