// Torch's own attention for MPS is not in a CPU build, which even refuses to choose: the math implementation stands in.
#include <ATen/ATen.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <torch/library.h>

#include <limits>

namespace {

using at::Tensor;

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                 double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  if (!query.is_mps())
    return at::native::scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa);
  std::optional<Tensor> additive = mask;
  if (mask && mask->scalar_type() == at::kBool) {
    additive = at::zeros_like(*mask, query.options())
                   .masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, additive, dropout_p, is_causal,
                                                            std::nullopt, scale, enable_gqa));
}

// Instead of torch's own composite, which is also called by that name.
TORCH_LIBRARY_IMPL(aten, CompositeImplicitAutograd, m) { m.impl("scaled_dot_product_attention", TORCH_FN(attention)); }

}  // namespace
