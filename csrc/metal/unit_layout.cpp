#include "metal/unit_layout.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

namespace mfa::metal {

std::string test_unit_layout(MTL::Device& device, MTL::Library& library) {
  const Pool pool;
  constexpr NS::UInteger kLanes = 32;
  NS::Error* error = nullptr;
  // The kernel uses none of its library's function constants; all have a value.
  constexpr std::array<bool, 64> kConstants{};
  const auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  values->setConstantValues(kConstants.data(), MTL::DataTypeBool, NS::Range::Make(0, kConstants.size()));
  const auto function = NS::TransferPtr(library.newFunction(ns_string("unit_layout"), values.get(), &error));
  if (!function) return "its library has no self-test: " + text_of(error);
  const auto pipeline = NS::TransferPtr(device.newComputePipelineState(function.get(), &error));
  if (!pipeline) return "Metal can't compile its self-test: " + text_of(error);
  const auto buffer = NS::TransferPtr(device.newBuffer(kLanes * sizeof(std::uint32_t), MTL::ResourceStorageModeShared));
  const auto queue = NS::TransferPtr(device.newCommandQueue());
  if (!buffer || !queue) return "Metal has no memory for its self-test";
  const std::span is_wrong(static_cast<std::uint32_t*>(buffer->contents()), kLanes);
  std::ranges::fill(is_wrong, 1);

  MTL::CommandBuffer* commands = queue->commandBuffer();
  MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
  encoder->setComputePipelineState(pipeline.get());
  encoder->setBuffer(buffer.get(), 0, 0);
  encoder->dispatchThreadgroups(MTL::Size(1, 1, 1), MTL::Size(kLanes, 1, 1));
  encoder->endEncoding();
  commands->commit();
  commands->waitUntilCompleted();
  if (commands->status() != MTL::CommandBufferStatusCompleted)
    return "its self-test failed: " + text_of(commands->error());
  if (std::ranges::any_of(is_wrong, [](std::uint32_t wrong) { return wrong != 0; }))
    return "its data layout is not the one that the kernels are made for";
  return "";
}

}  // namespace mfa::metal
