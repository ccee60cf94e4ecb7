#include "ops/gradients.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <numbers>
#include <vector>

namespace mfa {
namespace {

using torch::stable::Tensor;

template <typename... Tensors>
Tensor call(const char* op, const char* overload, const Tensors&... tensors) {
  std::array stack{torch::stable::detail::from(tensors)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
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

Tensor gradient_of_slopes(const Tensor& slopes, const Tensor& rows) {
  return slopes.dim() == 1 ? torch::stable::sum(rows, std::vector<std::int64_t>{0, 2})
                           : torch::stable::sum(rows, std::vector<std::int64_t>{2});
}

}  // namespace mfa
