// Torch's own Metal stream: its serial queue, and the encoder that its ops share with ours.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>

#include <functional>
#include <mutex>
#include <string>

#include "metal/device.h"

namespace mfa::metal {

// What the backend calls of torch. On a Mac find_torch_functions() fills it; a test may fill it itself.
struct TorchFunctions {
  void* (*current_stream)() = nullptr;        // at::mps::getCurrentMPSStream()
  void* (*command_encoder)(void*) = nullptr;  // at::mps::MPSStream::commandEncoder(), on the stream's queue only
  decltype(&aoti_torch_mps_create_shader_library) create_shader_library = nullptr;
  decltype(&aoti_torch_mps_get_kernel_function) get_kernel_function = nullptr;
  decltype(&aoti_torch_mps_run_command_block) run_command_block = nullptr;
};

// Looks them up in the torch that this process has loaded. Throws std::runtime_error that names its version and what it
// lacks.
TorchFunctions find_torch_functions();

std::string torch_version();  // "2.13.0"

class TorchQueue {
 public:
  explicit TorchQueue(const TorchFunctions& functions) : functions_(functions) {}

  // Runs `encode` on the queue of the calling thread's stream. It must call no torch op: they wait for this very queue.
  // What it throws is thrown here.
  void run(const std::function<void(MTL::ComputeCommandEncoder&)>& encode);

  NS::SharedPtr<MTL::Device> device();  // that the stream's work runs on

 private:
  AOTIMetalKernelFunctionHandle ticket();

  TorchFunctions functions_;
  std::mutex mutex_;
  AOTIMetalKernelFunctionHandle ticket_ = nullptr;
};

// The GPU that the kernels must be compiled for: torch's. Where the system's default can't run them it is that one,
// with the reason: torch is not asked, since it may have no stream then. Throws like TorchQueue::run().
Device device_of(TorchQueue& queue);

}  // namespace mfa::metal
