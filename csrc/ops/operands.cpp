#include "ops/operands.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "ops/checks.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Launcher& launcher_for(const Tensor& query) {
  if (!query.is_cpu()) return metal_launcher();
  Launcher* launcher = simulated_launcher();
  if (!launcher)
    throw std::runtime_error("query is on the CPU; the Metal kernels take CPU tensors inside mfa.simulate() only");
  return *launcher;
}

// Kernels read any strides but a last one other than 1.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(3) > 1 && tensor.stride(3) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

// `address` is const_data_ptr() or mutable_data_ptr(): a virtual address, or on MPS the id<MTLBuffer> plus the offset.
Buffer buffer_of(const Tensor& tensor, const void* address) {
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const std::uint64_t element_size = tensor.element_size();
  const std::uint64_t offset = static_cast<std::uint64_t>(tensor.storage_offset()) * element_size;
  return {const_cast<char*>(static_cast<const char*>(address)) - offset, offset,
          static_cast<std::uint64_t>(last + 1) * element_size};
}

// On MPS, buffers start at page boundaries, and the storage "address" says nothing.
bool is_aligned(const Buffer& buffer, bool is_cpu) {
  const std::uint64_t base = is_cpu ? reinterpret_cast<std::uintptr_t>(buffer.storage) : 0;
  return (base + buffer.offset) % 16 == 0;
}

}  // namespace

Operands::Operands(const Qkv& qkv)
    : launcher_(launcher_for(qkv.query)), query_(qkv.query), is_cpu_(qkv.query.is_cpu()) {
  alive_.reserve(8);
  problem.family = launcher_.family();
  problem.dtype = dtype_of(qkv.query);
  problem.batch = qkv.query.size(0);
  problem.query_heads = qkv.query.size(1);
  problem.key_heads = qkv.key.size(1);
  problem.query_length = qkv.query.size(2);
  problem.key_length = qkv.key.size(2);
  problem.head_dim = qkv.query.size(3);
  problem.value_dim = qkv.value.size(3);
}

Operands::Operands(const Qkv& qkv, const Features& features, std::int64_t sequences) : Operands(qkv) {
  problem.sequences = sequences;
  problem.query_strides = read_rows(kQuery, qkv.query);
  problem.key_strides = read_rows(kKey, qkv.key);
  problem.value_strides = read_rows(kValue, qkv.value);
  const Buffer &key = arguments_[kKey], &value = arguments_[kValue];
  problem.value_is_key = qkv.key.scalar_type() == qkv.value.scalar_type() && key.storage == value.storage &&
                         key.offset == value.offset && problem.key_strides == problem.value_strides &&
                         problem.value_dim <= problem.head_dim;
  problem.scale = features.scale;
  problem.window_left = features.window_left;
  problem.window_right = features.window_right;
  problem.softcap = features.softcap;
  if (features.sinks) {
    problem.has_sinks = true;
    read_contiguous(kSinks, *features.sinks);
  }
  if (features.alibi_slopes) {
    problem.alibi = features.alibi_slopes->dim() == 1 ? Alibi::per_head : Alibi::per_batch;
    read_contiguous(kAlibiSlopes, *features.alibi_slopes);
  }
}

void Operands::bind(Argument argument, const Tensor& tensor, const void* address) {
  if (tensor.numel() == 0) {
    empty_.push_back(argument);
  } else {
    arguments_[argument] = buffer_of(tensor, address);
  }
}

Strides Operands::bind_rows(Argument argument, const Tensor& tensor, const void* address) {
  bind(argument, tensor, address);
  problem.aligned = problem.aligned && is_aligned(arguments_[argument], is_cpu_);
  return {problem.sequences > 0 ? 0 : tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Strides Operands::read_rows(Argument argument, const Tensor& tensor) {
  alive_.push_back(with_contiguous_rows(tensor));
  return bind_rows(argument, alive_.back(), alive_.back().const_data_ptr());
}

Strides Operands::write_rows(Argument argument, const Tensor& tensor) {
  return bind_rows(argument, tensor, tensor.mutable_data_ptr());
}

void Operands::read(Argument argument, const Tensor& tensor) { bind(argument, tensor, tensor.const_data_ptr()); }

void Operands::read_contiguous(Argument argument, const Tensor& tensor) {
  alive_.push_back(torch::stable::contiguous(tensor));
  bind(argument, alive_.back(), alive_.back().const_data_ptr());
}

void Operands::write(Argument argument, const Tensor& tensor) { bind(argument, tensor, tensor.mutable_data_ptr()); }

void Operands::read(const Dropout& dropout) {
  problem.dropout_p = dropout.p;
  if (dropout.rng_state) read_contiguous(kRngState, *dropout.rng_state);
}

void Operands::read_bias(const Tensor& bias) {
  problem.bias.kind = bias.scalar_type() == ScalarType::Bool       ? BiasKind::mask
                      : bias.scalar_type() == query_.scalar_type() ? BiasKind::same_dtype
                                                                   : BiasKind::float32;
  for (int i = 0; i < 4; ++i) {
    problem.bias.sizes[i] = bias.size(i);
    problem.bias.strides[i] = bias.stride(i);
  }
  read(kBias, bias);
}

void Operands::read_block_mask(const Tensor& block_mask) {
  problem.bias.kind = BiasKind::blocks;
  problem.bias.words = block_mask.size(0);
  read_contiguous(kBias, block_mask);
}

void Operands::read(const Results& results, Gradients& gradients) {
  const auto& [grad_out, grad_lse, out, lse, correction] = results;
  problem.has_correction = correction.has_value();
  bool alike = true;
  if (correction)
    for (int i = 0; i < 4; ++i) alike = alike && (out.size(i) <= 1 || out.stride(i) == correction->stride(i));
  problem.out_strides = read_rows(kOut, alike ? out : torch::stable::contiguous(out));
  if (correction) read_rows(kCorrection, alike ? *correction : torch::stable::contiguous(*correction));
  read_contiguous(kLse, lse);
  gradients.grad_out_strides = read_rows(kGradOut, grad_out);
  gradients.has_grad_lse = grad_lse.has_value();
  if (grad_lse) read_contiguous(kGradLse, *grad_lse);
}

void Operands::write_results(const Tensor& out, const Tensor& lse) {
  problem.out_strides = write_rows(kOut, out);
  write(kLse, lse);
}

void Operands::write_correction(const Tensor& correction, bool trains_terms) {
  problem.has_correction = true;
  problem.trains_terms = trains_terms;
  write_rows(kCorrection, correction);
}

void Operands::run(const Plan& plan) {
  if (plan.launches.empty()) return;
  const auto allocate = [&](Argument argument, std::uint64_t bytes) {
    if (bytes == 0) return;
    alive_.push_back(mfa::allocate(query_, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte));
    write(argument, alive_.back());
  };
  allocate(kScoreGradient, plan.scratch_bytes);
  allocate(kMaskClasses, plan.mask_class_bytes);
  allocate(kTileMap, plan.tile_map_bytes);
  allocate(kPartialOut, plan.partial_out_bytes);
  allocate(kPartialLse, plan.partial_lse_bytes);
  // A tensor without elements has no address, but a kernel's argument must be bound: to any buffer, of which it may
  // touch nothing. There is one, since a kernel that runs writes something.
  for (const Buffer& buffer : arguments_) {
    if (!buffer.extent) continue;
    for (Argument argument : empty_)
      if (!arguments_[argument].storage) arguments_[argument] = {buffer.storage, buffer.offset, 0};
    break;
  }
  launcher_.run(plan, arguments_);
}

Tensor allocate(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType dtype) {
  std::array<std::int64_t, 5> strides;
  strides[sizes.size() - 1] = 1;
  for (std::size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<std::int64_t>(sizes.begin()[i], 1);
  AtenTensorHandle tensor = nullptr;
  const auto code = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), code, device, like.get_device_index(), &tensor));
  return Tensor(tensor);
}

Tensor allocate_rows(const Tensor& tensor, std::int64_t last_size, ScalarType dtype) {
  const std::int64_t batch = tensor.size(0), heads = tensor.size(1), length = tensor.size(2);
  if (heads > 1 && length > 1 && tensor.stride(1) < tensor.stride(2))
    return torch::stable::transpose(allocate(tensor, {batch, length, heads, last_size}, dtype), 1, 2);
  return allocate(tensor, {batch, heads, length, last_size}, dtype);
}

}  // namespace mfa
