// What csrc/metal looks up in a macOS torch: the two C++ functions of the stream, and the shim's three.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <exception>

#include "../driver/control.h"

#pragma GCC visibility push(default)

namespace at::mps {

class MPSStream {
 public:
  void* commandEncoder();
};

void* MPSStream::commandEncoder() { return mfa_driver_stream_encoder(this); }

MPSStream* getCurrentMPSStream();
MPSStream* getCurrentMPSStream() { return static_cast<MPSStream*>(mfa_driver_stream()); }

}  // namespace at::mps

extern "C" {

struct AOTIMetalShaderLibraryOpaque {
} shader_library;
struct AOTIMetalKernelFunctionOpaque {
} kernel_function;

using Callback = void (*)(AOTIMetalKernelFunctionOpaque*, void*);

AOTITorchError aoti_torch_mps_create_shader_library(const char* source, AOTIMetalShaderLibraryOpaque** library) {
  *library = &shader_library;
  return std::strstr(source, "kernel void") ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

AOTITorchError aoti_torch_mps_get_kernel_function(AOTIMetalShaderLibraryOpaque* library, const char*,
                                                  AOTIMetalKernelFunctionOpaque** function) {
  *function = &kernel_function;
  return library == &shader_library ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// Torch's shim turns an exception of the callback into this code, and its text is lost.
AOTITorchError aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionOpaque* function, Callback callback,
                                                void* data) {
  struct Call {
    AOTIMetalKernelFunctionOpaque* function;
    Callback callback;
    void* data;
  } call{function, callback, data};
  const auto run = [](void* context) {
    const auto& c = *static_cast<const Call*>(context);
    c.callback(c.function, c.data);
  };
  char* error = nullptr;
  const int failed = mfa_driver_stream_run(mfa_driver_stream(), run, &call, &error);
  mfa_driver_free(error);
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}

}  // extern "C"

#pragma GCC visibility pop
