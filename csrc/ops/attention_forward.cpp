#include <torch/csrc/stable/ops.h>

#include "ops/attention.h"
#include "ops/operands.h"

namespace mfa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// `correction`: where to leave it, or null.
std::tuple<Tensor, Tensor> forward(const Inputs& inputs, std::optional<Tensor>* correction) {
  const Tensor& query = inputs.query;
  check_inputs(inputs);
  Operands operands(inputs);
  const Tensor out = allocate_rows(query, inputs.value.size(3), query.scalar_type());
  const Tensor lse = allocate(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  operands.problem.out_strides = operands.write_rows(kOut, out);
  operands.write(kLse, lse);
  if (correction && operands.problem.dtype == DType::f32) {
    *correction = allocate(query, {0}, ScalarType::Half);
  } else if (correction) {
    *correction = allocate_rows(query, inputs.value.size(3), ScalarType::Half);
    operands.write_correction(**correction);
  }
  operands.run(plan_forward(operands.problem));
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks,
                                             const std::optional<Tensor>& alibi_slopes, double scale,
                                             std::optional<std::int64_t> window_left,
                                             std::optional<std::int64_t> window_right, double softcap, double dropout_p,
                                             const std::optional<Tensor>& rng_state) {
  return forward(
      {query, key, value, bias, sinks, alibi_slopes, scale, window_left, window_right, softcap, dropout_p, rng_state},
      nullptr);
}

std::tuple<Tensor, Tensor, Tensor> attention_forward_with_correction(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes, double scale,
    std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right, double softcap, double dropout_p,
    const std::optional<Tensor>& rng_state) {
  std::optional<Tensor> correction;
  const auto [out, lse] = forward(
      {query, key, value, bias, sinks, alibi_slopes, scale, window_left, window_right, softcap, dropout_p, rng_state},
      &correction);
  return {out, lse, *correction};
}

}  // namespace mfa
