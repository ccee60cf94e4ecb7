// A metal-cpp client, as short as a test needs it.
#pragma once

#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/simulator/driver/control.h"

#define CHECK(condition) \
  if (!(condition)) throw std::logic_error("client.cpp: not true: " #condition)

struct Scenario {
  Scenario(const char* name, std::function<void()> run) { all()[name] = std::move(run); }
  static std::map<std::string, std::function<void()>>& all() {
    static std::map<std::string, std::function<void()>> scenarios;
    return scenarios;
  }
};

// SCENARIO(name) { ... }: what client_run("name") runs.
#define SCENARIO(name)                                           \
  static void scenario_##name();                                 \
  static const Scenario register_##name(#name, scenario_##name); \
  static void scenario_##name()

template <typename T>
using Owned = NS::SharedPtr<T>;

struct Pool {
  Owned<NS::AutoreleasePool> pool = NS::TransferPtr(NS::AutoreleasePool::alloc()->init());
};

inline NS::String* text(const std::string& string) {
  return NS::String::string(string.c_str(), NS::UTF8StringEncoding);
}

struct Params {
  unsigned count;
  float scale;
};

constexpr int kCount = 64;

// Device, library and one pipeline of `scale`; input i is i.
struct Rig {
  Pool pool;
  Owned<MTL::Device> device = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
  Owned<MTL::Library> library = source_library();
  Owned<MTL::CommandQueue> queue = NS::TransferPtr(device->newCommandQueue());
  Owned<MTL::Buffer> input = buffer(), output = buffer();
  std::string error;  // of the last NSError

  Owned<MTL::Library> source_library() {
    NS::Error* failure = nullptr;
    return NS::TransferPtr(device->newLibrary(text("kernel void k() {}"), nullptr, &failure));
  }

  Owned<MTL::Buffer> buffer(std::size_t bytes = kCount * sizeof(float)) {
    auto b = NS::TransferPtr(device->newBuffer(bytes, MTL::ResourceStorageModeShared));
    for (std::size_t i = 0; i < bytes / sizeof(float); ++i)
      static_cast<float*>(b->contents())[i] = static_cast<float>(i);
    return b;
  }

  Owned<MTL::FunctionConstantValues> constants(bool doubled = false, bool has_extra = false, unsigned power = 1) {
    auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
    values->setConstantValue(&doubled, MTL::DataTypeBool, NS::UInteger(0));
    values->setConstantValue(&has_extra, MTL::DataTypeBool, NS::UInteger(1));
    values->setConstantValue(&power, MTL::DataTypeUInt, text("power"));
    return values;
  }

  Owned<MTL::Function> function(const char* name, const MTL::FunctionConstantValues* values) {
    NS::Error* failure = nullptr;
    auto f = NS::TransferPtr(library->newFunction(text(name), values, &failure));
    if (failure) error = failure->localizedDescription()->utf8String();
    return f;
  }

  Owned<MTL::ComputePipelineState> pipeline(const char* name = "scale", bool doubled = false, bool has_extra = false,
                                            unsigned power = 1) {
    auto f = function(name, constants(doubled, has_extra, power).get());
    auto descriptor = NS::TransferPtr(MTL::ComputePipelineDescriptor::alloc()->init());
    descriptor->setComputeFunction(f.get());
    NS::Error* failure = nullptr;
    auto state =
        NS::TransferPtr(device->newComputePipelineState(descriptor.get(), MTL::PipelineOptionNone, nullptr, &failure));
    if (failure) error = failure->localizedDescription()->utf8String();
    return state;
  }

  // All that `scale` needs.
  void bind(MTL::ComputeCommandEncoder* encoder, const MTL::ComputePipelineState* state, float factor = 3) {
    const Params params{kCount, factor};
    encoder->setComputePipelineState(state);
    encoder->setBuffer(input.get(), 0, 0);
    encoder->setBuffer(output.get(), 0, 1);
    encoder->setBytes(&params, sizeof params, 2);
  }

  // One command buffer: `encode` between its begin and end.
  void run(const std::function<void(MTL::ComputeCommandEncoder*)>& encode) {
    MTL::CommandBuffer* commands = queue->commandBuffer();
    MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
    struct End {
      MTL::ComputeCommandEncoder* encoder;
      ~End() { encoder->endEncoding(); }
    };
    {
      const End end{encoder};
      encode(encoder);
    }
    commands->commit();
    commands->waitUntilCompleted();
  }

  float result(int i) { return static_cast<const float*>(output->contents())[i]; }
};

inline const MTL::Size kGroups(1, 1, 1), kThreads(kCount, 1, 1);
