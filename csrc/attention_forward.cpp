#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "operands.h"

namespace mfa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks,
                                             const std::optional<Tensor>& alibi_slopes, double scale,
                                             std::optional<std::int64_t> window_left,
                                             std::optional<std::int64_t> window_right, double softcap, double dropout_p,
                                             const std::optional<Tensor>& rng_state) {
  const Inputs inputs{query, key,         value,        bias,    sinks,     alibi_slopes,
                      scale, window_left, window_right, softcap, dropout_p, rng_state};
  check_inputs(inputs);
  Operands operands(inputs);
  const Tensor out = allocate_rows(query, value.size(3));
  const Tensor lse = allocate(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  operands.problem.out_strides = operands.write_rows(kOut, out);
  operands.write(kLse, lse);
  operands.run(plan_forward(operands.problem));
  return {out, lse};
}

}  // namespace mfa
