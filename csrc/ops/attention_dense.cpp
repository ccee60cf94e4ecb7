#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numbers>
#include <stdexcept>

#include "ops/attention.h"
#include "ops/operands.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<std::int64_t> scratch_limit = kDefaultScratchLimit;
std::atomic<int> backward_mode = 0;

BackwardMode mode_of(int number) {
  return number == 5 ? BackwardMode::five_gemm : number == 7 ? BackwardMode::seven_gemm : BackwardMode::automatic;
}

template <typename... Tensors>
Tensor call(const char* op, const char* overload, const Tensors&... tensors) {
  std::array stack{torch::stable::detail::from(tensors)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// From each row's part, [B,Hq,Lq].
Tensor gradient_of_slopes(const Tensor& slopes, const Tensor& rows) {
  return slopes.dim() == 1 ? torch::stable::sum(rows, std::vector<std::int64_t>{0, 2})
                           : torch::stable::sum(rows, std::vector<std::int64_t>{2});
}

// Which gradients to compute: those that are asked for, of tensors that are there.
Gradients wanted(const Inputs& inputs, const std::vector<bool>& output_mask) {
  if (output_mask.size() != 6) throw std::runtime_error("output_mask must have 6 entries");
  Gradients gradients;
  gradients.query = output_mask[0];
  gradients.key = output_mask[1];
  gradients.value = output_mask[2];
  gradients.bias = output_mask[3] && inputs.bias;
  gradients.sinks = output_mask[4] && inputs.sinks;
  gradients.alibi = output_mask[5] && inputs.alibi_slopes;
  if (gradients.bias && inputs.bias->scalar_type() == ScalarType::Bool)
    throw std::runtime_error("bias has dtype bool; output_mask must be False there, since a mask has no gradient");
  gradients.mode = mode_of(backward_mode);
  gradients.scratch_limit = scratch_limit;
  return gradients;
}

}  // namespace

// -sum of exp(sink - lse) * delta over batch and rows. The statistics' log-sum-exp is in base 2, and huge where a row
// sees nothing: its exp2 is infinite then, and the quotient 0.
Tensor gradient_of_sinks(const Tensor& sinks, const Tensor& statistics) {
  const Tensor lse = torch::stable::select(statistics, 3, 0);
  const Tensor delta = torch::stable::select(statistics, 3, 1);
  const Tensor per_head = torch::stable::unsqueeze(sinks, 1);  // [Hq,1], against [B,Hq,Lq]
  const Tensor inverse = call("aten::exp2", "", torch::stable::subtract(lse, per_head, std::numbers::log2e));
  const Tensor sum = torch::stable::sum(call("aten::div", "Tensor", delta, inverse), std::vector<std::int64_t>{0, 2});
  return call("aten::neg", "", sum);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes, double scale,
    std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right, double softcap, double dropout_p,
    const std::optional<Tensor>& rng_state, const std::vector<bool>& output_mask,
    const std::optional<Tensor>& correction) {
  const Inputs inputs{query, key,         value,        bias,    sinks,     alibi_slopes,
                      scale, window_left, window_right, softcap, dropout_p, rng_state};
  check_inputs(inputs);
  check_results({grad_out, grad_lse, out, lse, correction}, inputs);
  Gradients gradients = wanted(inputs, output_mask);

  Operands operands(inputs);
  operands.problem.out_strides = operands.read_out(out, correction);
  operands.read_contiguous(kLse, lse);
  gradients.grad_out_strides = operands.read_rows(kGradOut, grad_out);
  if (grad_lse) {
    gradients.has_grad_lse = true;
    operands.read_contiguous(kGradLse, *grad_lse);
  }

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
    grad_bias = floats({bias->size(0), bias->size(1), bias->size(2), bias->size(3)});
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
  if (gradients.bias) grad_bias = torch::stable::to(grad_bias, bias->scalar_type());
  if (gradients.sinks) grad_sinks = gradient_of_sinks(*sinks, statistics);
  if (gradients.alibi) grad_slopes = gradient_of_slopes(*alibi_slopes, grad_slopes);
  return {grad_query, grad_key, grad_value, grad_bias, grad_sinks, grad_slopes};
}

}  // namespace mfa

std::int64_t mfa_set_scratch_limit(std::int64_t bytes) {
  return mfa::scratch_limit.exchange(std::max<std::int64_t>(bytes, 0));
}

int mfa_set_backward_mode(int mode) { return mfa::backward_mode.exchange(mode); }
