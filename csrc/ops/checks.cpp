#include "ops/checks.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}

std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU: return "cpu";
    case torch::headeronly::DeviceType::MPS: return "mps:" + std::to_string(device.index());
    default: return "a device that is neither mps nor cpu";
  }
}

using Shape = std::vector<std::int64_t>;

Shape shape_of(const Tensor& tensor) {
  Shape shape;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

std::string text(const Shape& shape) {
  std::string list;
  for (std::int64_t size : shape) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

void check_device(const char* name, const Tensor& tensor, const Tensor& query) {
  if (tensor.device() != query.device())
    refuse(name, " is on ", device_name(tensor), "; it must be on the device of query, ", device_name(query));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype)
    refuse(name, " has dtype ", dtype_name(tensor.scalar_type()), "; it must be ", dtype_name(dtype));
}

void check_shape(const char* name, const Tensor& tensor, const Shape& shape) {
  if (const Shape found = shape_of(tensor); found != shape)
    refuse(name, " has shape ", text(found), "; it must have shape ", text(shape));
}

void check_like_query(const char* name, const Tensor& tensor, const Tensor& query) {
  refuse_unless(tensor.dim() == 4, name, " has ", tensor.dim(), " dimensions; it must have 4");
  check_device(name, tensor, query);
  if (tensor.scalar_type() != query.scalar_type())
    refuse(name, " has dtype ", dtype_name(tensor.scalar_type()), "; it must have that of query, ",
           dtype_name(query.scalar_type()));
  refuse_unless(tensor.size(0) == query.size(0), name, " has batch size ", tensor.size(0),
                "; it must be that of query, ", query.size(0));
}

void check_head_dims(const Tensor& query, const Tensor& value) {
  const std::int64_t dim = query.size(3), value_dim = value.size(3);
  if (has_head_dims(dim, value_dim)) return;
  const bool is_of_query = dim < 1 || dim > kLargestHeadDim;
  const std::int64_t found = is_of_query ? dim : value_dim;
  refuse(is_of_query ? "query" : "value", " has head dimension ", found, "; it must be within 1 ... ", kLargestHeadDim,
         found > 0 ? ": use torch.nn.functional.scaled_dot_product_attention" : "");
}

void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value) {
  const std::int64_t query_heads = query.size(1), key_heads = key.size(1);
  refuse_unless(value.size(1) == key_heads, "value has ", value.size(1), " heads; it must have those of key, ",
                key_heads);
  refuse_unless(value.size(2) == key.size(2), "value has length ", value.size(2), "; it must have that of key, ",
                key.size(2));
  refuse_unless(key.size(3) == query.size(3), "key has head dimension ", key.size(3), "; it must have that of query, ",
                query.size(3));
  refuse_unless(query_heads == 0 || (key_heads > 0 && query_heads % key_heads == 0), "query has ", query_heads,
                " heads; it must have a multiple of those of key, ", key_heads);
  check_head_dims(query, value);
  const std::int64_t most_per_batch = query.size(0) == 0 ? kMostHeads : kMostHeads / query.size(0);
  refuse_unless(query.size(0) <= kMostHeads && query_heads <= most_per_batch && key_heads <= most_per_batch,
                "query has batch size ", query.size(0), " and ", query_heads,
                " heads; their product must be below 2^31");
  refuse_unless(query.size(2) <= kLongestProblem && key.size(2) <= kLongestProblem - query.size(2), "query has length ",
                query.size(2), " and key ", key.size(2), "; together they must be at most ", kLongestProblem);
}

void check_sinks(const Tensor& sinks, const Tensor& query) {
  check_device("sinks", sinks, query);
  check_dtype("sinks", sinks, ScalarType::Float);
  if (const Shape heads = {query.size(1)}, shape = shape_of(sinks); shape != heads)
    refuse("sinks has shape ", text(shape), "; it must have shape [Hq] = ", text(heads));
}

void check_slopes(const Tensor& slopes, const Tensor& query, std::int64_t batch, const char* letter) {
  check_device("alibi_slopes", slopes, query);
  check_dtype("alibi_slopes", slopes, ScalarType::Float);
  const Shape heads = {query.size(1)}, all = {batch, query.size(1)};
  if (const Shape shape = shape_of(slopes); shape != heads && shape != all)
    refuse("alibi_slopes has shape ", text(shape), "; it must have shape [Hq] = ", text(heads), " or [", letter,
           ",Hq] = ", text(all));
}

void check_values(double scale, double softcap) {
  refuse_unless(!std::isnan(scale), "scale is nan; it must be a number");
  refuse_unless(softcap >= 0 && std::isfinite(softcap), "softcap is ", softcap,
                "; it must be 0 (off) or more, and finite");
}

}  // namespace

DType dtype_of(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float: return DType::f32;
    default:
      throw std::runtime_error("query has dtype " + dtype_name(query.scalar_type()) +
                               "; it must be float16, bfloat16 or float32");
  }
}

void check_alike(const Qkv& qkv) {
  check_like_query("query", qkv.query, qkv.query);
  check_like_query("key", qkv.key, qkv.query);
  check_like_query("value", qkv.value, qkv.query);
}

void check_features(const Qkv& qkv, const Features& features, std::int64_t slopes_batch, const char* letter) {
  const Tensor& query = qkv.query;
  dtype_of(query);
  check_shapes(query, qkv.key, qkv.value);
  if (features.sinks) check_sinks(*features.sinks, query);
  if (features.alibi_slopes) check_slopes(*features.alibi_slopes, query, slopes_batch, letter);
  check_values(features.scale, features.softcap);
}

void check_dropout(const Dropout& dropout, const Tensor& query) {
  const auto& [p, rng_state] = dropout;
  refuse_unless(0 <= p && p < 1, "dropout_p is ", p, "; it must be within [0, 1)");
  refuse_unless(rng_state.has_value() == (p > 0), "rng_state is ", rng_state ? "given" : "None", "; it must be ",
                p > 0 ? "a tensor" : "None", ", since dropout_p is ", p);
  if (!rng_state) return;
  check_device("rng_state", *rng_state, query);
  check_dtype("rng_state", *rng_state, ScalarType::Long);
  check_shape("rng_state", *rng_state, {2});
}

void check_bias(const Tensor& bias, const Qkv& qkv) {
  const Tensor &query = qkv.query, &key = qkv.key;
  check_device("bias", bias, query);
  const ScalarType dtype = bias.scalar_type();
  if (dtype != ScalarType::Bool && dtype != ScalarType::Float && dtype != query.scalar_type())
    refuse("bias has dtype ", dtype_name(dtype), "; it must be bool",
           query.scalar_type() == ScalarType::Float ? "" : ", " + dtype_name(query.scalar_type()), " or float32");
  refuse_unless(bias.dim() == 4, "bias has ", bias.dim(), " dimensions; it must have 4");
  const Shape full = {query.size(0), query.size(1), query.size(2), key.size(2)};
  for (int i = 0; i < 4; ++i)
    if (bias.size(i) != 1 && bias.size(i) != full[i])
      refuse("bias has shape ", text(shape_of(bias)), "; it must broadcast to [B,Hq,Lq,Lk] = ", text(full));
}

void check_block_mask(const Tensor& block_mask, const Qkv& qkv, bool has_bias) {
  refuse_unless(!has_bias, "bias and block_mask are both given; at most one may be");
  check_device("block_mask", block_mask, qkv.query);
  check_dtype("block_mask", block_mask, ScalarType::Int);
  refuse_unless(block_mask.dim() == 1 && block_mask.size(0) > 0, "block_mask has shape ", text(shape_of(block_mask)),
                "; it must be what pack_block_mask makes");
}

void check_results(const Results& results, const Qkv& qkv) {
  const Tensor& query = qkv.query;
  const Shape rows = {query.size(0), query.size(1), query.size(2)};
  const auto check = [&](const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype) {
    check_device(name, tensor, query);
    check_dtype(name, tensor, dtype);
    check_shape(name, tensor, shape);
  };
  const Shape out = {rows[0], rows[1], rows[2], qkv.value.size(3)};
  check("grad_out", results.grad_out, out, query.scalar_type());
  check("out", results.out, out, query.scalar_type());
  check("lse", results.lse, rows, ScalarType::Float);
  if (results.grad_lse) check("grad_lse", *results.grad_lse, rows, ScalarType::Float);
  if (!results.correction) return;
  refuse_unless(query.scalar_type() != ScalarType::Float, "correction must be None with dtype float32");
  check("correction", *results.correction, out, ScalarType::Half);
}

}  // namespace mfa
