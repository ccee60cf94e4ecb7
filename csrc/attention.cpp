#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "launcher.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Plain runtime errors: STD_TORCH_CHECK would put file and line before the sentence.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
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

void check_like_query(const char* name, const Tensor& tensor, const Tensor& query) {
  require(tensor.dim() == 4, name, " has ", tensor.dim(), " dimensions; it must have 4");
  require(tensor.device() == query.device(), name, " is on ", device_name(tensor),
          "; it must be on the device of query, ", device_name(query));
  require(tensor.scalar_type() == query.scalar_type(), name, " has dtype ", dtype_name(tensor.scalar_type()),
          "; it must have that of query, ", dtype_name(query.scalar_type()));
  require(tensor.size(0) == query.size(0), name, " has batch size ", tensor.size(0), "; it must be that of query, ",
          query.size(0));
}

void check_head_dim(const char* name, const Tensor& tensor) {
  const std::int64_t dim = tensor.size(3);
  require(1 <= dim && dim <= kLargestHeadDim, name, " has head dimension ", dim, "; it must be within 1 ... ",
          kLargestHeadDim, dim > kLargestHeadDim ? ": use torch.nn.functional.scaled_dot_product_attention" : "");
}

void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value) {
  const std::int64_t query_heads = query.size(1), key_heads = key.size(1);
  require(value.size(1) == key_heads, "value has ", value.size(1), " heads; it must have those of key, ", key_heads);
  require(value.size(2) == key.size(2), "value has length ", value.size(2), "; it must have that of key, ",
          key.size(2));
  require(key.size(3) == query.size(3), "key has head dimension ", key.size(3), "; it must have that of query, ",
          query.size(3));
  require(query_heads == 0 || (key_heads > 0 && query_heads % key_heads == 0), "query has ", query_heads,
          " heads; it must have a multiple of those of key, ", key_heads);
  check_head_dim("query", query);
  check_head_dim("value", value);
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(query.size(0) <= kMost && query_heads <= kMost && key_heads <= kMost, "query has batch size ", query.size(0),
          " and ", query_heads, " heads; both must be below 2^31");
  require(query.size(2) <= kLongestProblem && key.size(2) <= kLongestProblem - query.size(2), "query has length ",
          query.size(2), " and key ", key.size(2), "; together they must be at most ", kLongestProblem);
}

void check_values(double scale, double softcap, double dropout_p) {
  require(!std::isnan(scale), "scale is nan; it must be a number");
  require(softcap >= 0 && std::isfinite(softcap), "softcap is ", softcap, "; it must be 0 (off) or more, and finite");
  require(0 <= dropout_p && dropout_p < 1, "dropout_p is ", dropout_p, "; it must be within [0, 1)");
}

void check_supported(bool supported, const char* name) {
  require(supported, name, " is not supported by the Metal kernels yet; leave it out, or use a CPU tensor");
}

Launcher& launcher_for(const Tensor& query) {
  if (!query.is_cpu()) return metal_launcher();
  Launcher* launcher = simulated_launcher();
  require(launcher != nullptr, "query is on the CPU; the Metal kernels take CPU tensors inside mfa.simulate() only");
  return *launcher;
}

// Kernels read any strides but a last one other than 1.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(3) > 1 && tensor.stride(3) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

// A model whose query is B,L,H,D in memory goes on with out as [B,L,H*D]: in that layout this costs no copy.
Tensor allocate_out(const Tensor& query, std::int64_t value_dim) {
  const std::int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  if (heads > 1 && length > 1 && query.stride(1) < query.stride(2))
    return torch::stable::transpose(torch::stable::new_empty(query, {batch, length, heads, value_dim}), 1, 2);
  return torch::stable::new_empty(query, {batch, heads, length, value_dim});
}

Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// `address` is const_data_ptr() or mutable_data_ptr(): a virtual address, or on MPS the id<MTLBuffer> plus the offset.
Buffer buffer_of(const Tensor& tensor, const void* address) {
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const std::uint64_t element_size = tensor.element_size();
  const std::uint64_t offset = static_cast<std::uint64_t>(tensor.storage_offset()) * element_size;
  return {const_cast<char*>(static_cast<const char*>(address)) - offset, offset,
          static_cast<std::uint64_t>(last + 1) * element_size};
}

// A tensor without elements has no address, but a kernel's argument must be bound: any buffer, of which it may touch
// nothing.
Buffer input_buffer(const Tensor& tensor, const Buffer& stand_in) {
  if (tensor.numel() == 0) return {stand_in.storage, stand_in.offset, 0};
  return buffer_of(tensor, tensor.const_data_ptr());
}

// On MPS, buffers start at page boundaries, and the storage "address" says nothing.
bool is_aligned(const Buffer& buffer, bool is_cpu) {
  const std::uint64_t base = is_cpu ? reinterpret_cast<std::uintptr_t>(buffer.storage) : 0;
  return buffer.extent == 0 || (base + buffer.offset) % 16 == 0;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks,
                                             const std::optional<Tensor>& alibi_slopes, double scale,
                                             std::optional<std::int64_t> window_left,
                                             std::optional<std::int64_t> window_right, double softcap, double dropout_p,
                                             const std::optional<Tensor>& rng_state) {
  const DType dtype = dtype_of(query);
  check_like_query("query", query, query);
  check_like_query("key", key, query);
  check_like_query("value", value, query);
  check_shapes(query, key, value);
  check_values(scale, softcap, dropout_p);
  check_supported(!bias, "bias");
  check_supported(!sinks, "sinks");
  check_supported(!alibi_slopes, "alibi_slopes");
  check_supported(softcap == 0, "softcap");
  require(dropout_p == 0 && !rng_state, "dropout_p is ", dropout_p,
          "; dropout is not supported yet: use torch.nn.functional.scaled_dot_product_attention");
  Launcher& launcher = launcher_for(query);

  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const Tensor out = allocate_out(query, value.size(3));
  const Tensor lse = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  Arguments arguments;
  arguments[kQuery] = buffer_of(q, q.const_data_ptr());
  arguments[kKey] = input_buffer(k, arguments[kQuery]);
  arguments[kValue] = input_buffer(v, arguments[kQuery]);
  arguments[kOut] = buffer_of(out, out.mutable_data_ptr());
  arguments[kLse] = buffer_of(lse, lse.mutable_data_ptr());
  bool aligned = true;
  for (Argument argument : {kQuery, kKey, kValue, kOut}) aligned &= is_aligned(arguments[argument], query.is_cpu());

  launcher.run(plan_forward({
                   .family = launcher.family(),
                   .dtype = dtype,
                   .batch = q.size(0),
                   .query_heads = q.size(1),
                   .key_heads = k.size(1),
                   .query_length = q.size(2),
                   .key_length = k.size(2),
                   .head_dim = q.size(3),
                   .value_dim = v.size(3),
                   .query_strides = strides_of(q),
                   .key_strides = strides_of(k),
                   .value_strides = strides_of(v),
                   .out_strides = strides_of(out),
                   .aligned = aligned,
                   .scale = scale,
                   .window_left = window_left,
                   .window_right = window_right,
               }),
               arguments);
  return {out, lse};
}

}  // namespace mfa
