// Packed sequences as a dense problem of batch 1: the tensors are views [1,H,T,D], and the kernels find each sequence's
// rows through its starts, which stay on the device.
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "ops/attention.h"
#include "ops/operands.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor packed_view(const char* name, const Tensor& tensor) {
  refuse_unless(tensor.dim() == 3, name, " has ", tensor.dim(), " dimensions; it must have 3");
  return torch::stable::transpose(torch::stable::unsqueeze(tensor, 0), 1, 2);
}

void check_starts(const char* name, const Tensor& starts, const Tensor& query, std::int64_t size) {
  refuse_unless(starts.device() == query.device(), name, " is on another device than query; they must be on the same");
  refuse_unless(starts.scalar_type() == ScalarType::Int, name, " has another dtype; it must have dtype int32");
  refuse_unless(starts.dim() == 1 && starts.size(0) >= 1 && starts.size(0) == size, name,
                " must have shape [N+1], the same for queries and keys");
}

// Views and features of a varlen call. The views live here: Inputs refers to them.
struct Packed {
  Tensor query, key, value;
  std::optional<Tensor> none;
  const std::optional<Tensor>& alibi_slopes;
  std::int64_t sequences;

  Packed(const Varlen& call)
      : query(packed_view("query", call.query)),
        key(packed_view("key", call.key)),
        value(packed_view("value", call.value)),
        alibi_slopes(call.alibi_slopes),
        sequences(call.query_starts.size(0) - 1) {}

  Inputs inputs(const Varlen& call) const {
    return {query,
            key,
            value,
            none,
            call.sinks,
            none,
            call.scale,
            call.window_left,
            call.window_right,
            call.softcap,
            call.dropout_p,
            call.rng_state};
  }
};

Strides unbatched(Strides strides) { return {0, strides[1], strides[2]}; }

void check(const Varlen& call, const Packed& packed) {
  check_inputs(packed.inputs(call));
  const std::int64_t size = call.query_starts.dim() == 1 ? call.query_starts.size(0) : 0;
  check_starts("cu_seqlens_q", call.query_starts, call.query, size);
  check_starts("cu_seqlens_k", call.key_starts, call.query, size);
  if (!call.alibi_slopes) return;
  const Tensor& slopes = *call.alibi_slopes;
  refuse_unless(slopes.device() == call.query.device(),
                "alibi_slopes is on another device than query; they must be on the same");
  refuse_unless(slopes.scalar_type() == ScalarType::Float, "alibi_slopes must have dtype float32");
  const std::int64_t heads = call.query.size(1);
  refuse_unless((slopes.dim() == 1 && slopes.size(0) == heads) ||
                    (slopes.dim() == 2 && slopes.size(0) == packed.sequences && slopes.size(1) == heads),
                "alibi_slopes must have shape [Hq] or [N,Hq]");
}

void bind(Operands& operands, const Varlen& call, const Packed& packed) {
  Problem& problem = operands.problem;
  problem.sequences = packed.sequences;
  problem.query_strides = unbatched(problem.query_strides);
  problem.key_strides = unbatched(problem.key_strides);
  problem.value_strides = unbatched(problem.value_strides);
  operands.read_contiguous(kQueryStarts, call.query_starts);
  operands.read_contiguous(kKeyStarts, call.key_starts);
  if (packed.alibi_slopes) {
    problem.alibi = packed.alibi_slopes->dim() == 1 ? Alibi::per_head : Alibi::per_batch;
    operands.read_contiguous(kAlibiSlopes, *packed.alibi_slopes);
  }
}

// `correction`: where to leave it, or null.
std::tuple<Tensor, Tensor> forward(const Varlen& call, std::optional<Tensor>* correction) {
  const Tensor &query = call.query, &value = call.value;
  const Packed packed(call);
  check(call, packed);
  Operands operands(packed.inputs(call));
  bind(operands, call, packed);
  // Rows of no sequence see nothing, and no kernel visits them.
  const auto rows = [&](ScalarType dtype) {
    return torch::stable::new_zeros(query, {query.size(0), query.size(1), value.size(2)}, dtype);
  };
  const Tensor out = rows(query.scalar_type());
  Tensor lse = allocate(query, {query.size(1), query.size(0)}, ScalarType::Float);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  operands.problem.out_strides = unbatched(operands.write_rows(kOut, packed_view("out", out)));
  operands.write(kLse, lse);
  if (correction && operands.problem.dtype == DType::f32) {
    *correction = allocate(query, {0}, ScalarType::Half);
  } else if (correction) {
    *correction = rows(ScalarType::Half);
    operands.write_correction(packed_view("correction", **correction));
  }
  if (packed.sequences > 0) operands.run(plan_forward(operands.problem));
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_varlen_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    std::int64_t, std::int64_t, const std::optional<Tensor>& sinks,
                                                    const std::optional<Tensor>& alibi_slopes, double scale,
                                                    std::optional<std::int64_t> window_left,
                                                    std::optional<std::int64_t> window_right, double softcap,
                                                    double dropout_p, const std::optional<Tensor>& rng_state) {
  return forward({query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, scale, window_left, window_right,
                  softcap, dropout_p, rng_state},
                 nullptr);
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_forward_with_correction(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    std::int64_t, std::int64_t, const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
    double scale, std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right, double softcap,
    double dropout_p, const std::optional<Tensor>& rng_state) {
  std::optional<Tensor> correction;
  const auto [out, lse] = forward({query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, scale,
                                   window_left, window_right, softcap, dropout_p, rng_state},
                                  &correction);
  return {out, lse, *correction};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    std::int64_t, std::int64_t, const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
    double scale, std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right, double softcap,
    double dropout_p, const std::optional<Tensor>& rng_state, const std::vector<bool>& output_mask,
    const std::optional<Tensor>& correction) {
  const Varlen call{query, key,         value,        cu_seqlens_q, cu_seqlens_k, sinks,    alibi_slopes,
                    scale, window_left, window_right, softcap,      dropout_p,    rng_state};
  const Packed packed(call);
  check(call, packed);
  refuse_unless(output_mask.size() == 5, "output_mask must have 5 entries");
  const Tensor out_view = packed_view("out", out), grad_view = packed_view("grad_out", grad_out);
  const Tensor lse_view = torch::stable::unsqueeze(lse, 0);
  std::optional<Tensor> grad_lse_view;
  if (grad_lse) grad_lse_view = torch::stable::unsqueeze(*grad_lse, 0);
  std::optional<Tensor> correction_view;
  if (correction) correction_view = packed_view("correction", *correction);
  check_results({grad_view, grad_lse_view, out_view, lse_view, correction_view}, packed.inputs(call));

  Gradients gradients;
  gradients.query = output_mask[0];
  gradients.key = output_mask[1];
  gradients.value = output_mask[2];
  gradients.sinks = output_mask[3] && sinks;
  gradients.alibi = output_mask[4] && alibi_slopes;
  gradients.has_grad_lse = grad_lse.has_value();
  Operands operands(packed.inputs(call));
  bind(operands, call, packed);
  operands.problem.out_strides = unbatched(operands.read_out(out_view, correction_view));
  gradients.grad_out_strides = unbatched(operands.read_rows(kGradOut, grad_view));
  operands.read_contiguous(kLse, lse);
  if (grad_lse) operands.read_contiguous(kGradLse, *grad_lse);

  const auto floats = [&](std::initializer_list<std::int64_t> sizes) {
    return allocate(query, sizes, ScalarType::Float);
  };
  const auto nothing = [&] { return allocate(query, {0}, query.scalar_type()); };
  const auto rows = [&](bool wanted, Argument argument, const char* name, const Tensor& tensor, Strides& strides) {
    if (!wanted) return nothing();
    const Tensor gradient = torch::stable::new_zeros(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)});
    strides = unbatched(operands.write_rows(argument, packed_view(name, gradient)));
    return gradient;
  };
  const Tensor grad_query =
      rows(gradients.query || gradients.alibi, kGradQuery, "query", query, gradients.query_strides);
  const Tensor grad_key = rows(gradients.key, kGradKey, "key", key, gradients.key_strides);
  const Tensor grad_value = rows(gradients.value, kGradValue, "value", value, gradients.value_strides);
  const std::int64_t heads = query.size(1), length = query.size(0);
  Tensor slope_rows = nothing(), grad_slopes = nothing();
  const bool per_sequence = gradients.alibi && alibi_slopes->dim() == 2;
  if (gradients.alibi) {
    slope_rows = torch::stable::new_zeros(query, {1, heads, length}, ScalarType::Float);
    operands.write(kGradAlibi, slope_rows);
  }
  if (per_sequence) {
    grad_slopes = torch::stable::new_zeros(query, {packed.sequences, heads}, ScalarType::Float);
    operands.write(kGradSlopes, grad_slopes);
  }
  // Of rows of no sequence, backward_delta makes statistics too.
  const Tensor statistics = floats({1, heads, length, 2});
  operands.write(kStatistics, statistics);
  if (packed.sequences > 0) operands.run(plan_backward(operands.problem, gradients));

  Tensor grad_sinks = nothing();
  if (gradients.sinks) {
    grad_sinks =
        packed.sequences > 0 ? gradient_of_sinks(*sinks, statistics) : torch::stable::new_zeros(*sinks, {heads});
  }
  if (gradients.alibi && !per_sequence) grad_slopes = torch::stable::sum(slope_rows, std::vector<std::int64_t>{0, 2});
  return {gradients.query ? grad_query : nothing(), grad_key, grad_value, grad_sinks, grad_slopes};
}

}  // namespace mfa
