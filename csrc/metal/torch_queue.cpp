#include "metal/torch_queue.h"

#include <dlfcn.h>

#include <exception>
#include <stdexcept>

namespace mfa::metal {
namespace {

// The image of libtorch_cpu, by the address of a function of the stable ABI: on macOS, RTLD_DEFAULT doesn't see
// libraries that Python opened locally.
void* torch_image() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&aoti_torch_get_dim), &info)) return nullptr;
  return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

template <typename Function>
void find(void* image, const char* symbol, const char* name, Function*& function) {
  void* address = image ? dlsym(image, symbol) : nullptr;
  if (!address) address = dlsym(RTLD_DEFAULT, symbol);
  if (!address)
    throw std::runtime_error("torch " + torch_version() + " has no " + name +
                             ", through which mfa reaches torch's Metal "
                             "stream; mfa was checked with torch 2.10 to 2.15, and a newer mfa may know this one");
  function = reinterpret_cast<Function*>(address);
}

struct Call {
  const std::function<void(MTL::ComputeCommandEncoder&)>* encode;
  void* stream;
  void* (*command_encoder)(void*);
  std::exception_ptr error;
};

void encode_on_queue(AOTIMetalKernelFunctionHandle, void* context) {
  Call& call = *static_cast<Call*>(context);
  try {
    auto* encoder = static_cast<MTL::ComputeCommandEncoder*>(call.command_encoder(call.stream));
    if (!encoder) throw std::runtime_error("torch's Metal stream has no encoder");
    (*call.encode)(*encoder);
  } catch (...) {
    call.error = std::current_exception();  // torch would turn it into a number
  }
}

}  // namespace

std::string torch_version() {
  const auto version = aoti_torch_abi_version();
  const auto part = [&](int shift) { return std::to_string(version >> shift & 0xff); };
  return part(56) + "." + part(48) + "." + part(40);
}

TorchFunctions find_torch_functions() {
  void* image = torch_image();
  TorchFunctions functions;
  find(image, "_ZN2at3mps19getCurrentMPSStreamEv", "at::mps::getCurrentMPSStream()", functions.current_stream);
  find(image, "_ZN2at3mps9MPSStream14commandEncoderEv", "at::mps::MPSStream::commandEncoder()",
       functions.command_encoder);
#define FIND(function) find(image, "aoti_torch_mps_" #function, "aoti_torch_mps_" #function "()", functions.function)
  FIND(create_shader_library);
  FIND(get_kernel_function);
  FIND(run_command_block);
#undef FIND
  if (image) dlclose(image);  // gives back the reference; torch stays loaded
  return functions;
}

// Torch runs a block only for one of its own kernels, and never looks at which: an empty one, kept for good, because
// torch's Metal objects must not be destroyed when the process ends.
AOTIMetalKernelFunctionHandle TorchQueue::ticket() {
  const std::lock_guard lock(mutex_);
  if (ticket_) return ticket_;
  AOTIMetalShaderLibraryHandle library = nullptr;
  AOTIMetalKernelFunctionHandle function = nullptr;
  if (functions_.create_shader_library("kernel void mfa_nop() {}", &library) != AOTI_TORCH_SUCCESS ||
      functions_.get_kernel_function(library, "mfa_nop", &function) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("torch " + torch_version() + " can't compile an empty Metal kernel");
  return ticket_ = function;
}

void TorchQueue::run(const std::function<void(MTL::ComputeCommandEncoder&)>& encode) {
  // The stream is the calling thread's, so it is asked for here; the queue may run the block on another thread.
  Call call{&encode, functions_.current_stream(), functions_.command_encoder, nullptr};
  const AOTITorchError failure = functions_.run_command_block(ticket(), &encode_on_queue, &call);
  if (call.error) std::rethrow_exception(call.error);
  if (failure != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("torch " + torch_version() + " can't run a block on its Metal stream");
}

NS::SharedPtr<MTL::Device> TorchQueue::device() {
  NS::SharedPtr<MTL::Device> device;
  run([&](MTL::ComputeCommandEncoder& encoder) { device = NS::RetainPtr(encoder.device()); });
  return device;
}

Device device_of(TorchQueue& queue) {
  const Device standard = default_device();
  if (!standard.why_not.empty()) return standard;
  Device device = describe(queue.device());
  if (device.handle && device.handle->registryID() != standard.handle->registryID())
    device.note = "torch uses " + device.name + ", which is not the system's default GPU, " + standard.name +
                  ": mfa's kernels run where torch's tensors are";
  return device;
}

}  // namespace mfa::metal
