#include "metal_launcher.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <stdexcept>

#include "driver/control.h"
#include "metal/launch.h"

namespace mfa {
namespace {

constexpr std::size_t kErrorSize = 8192;

// The driver's settings, findings and launches are the process's.
std::mutex process_mutex;

// Torch's part, played by the driver's own stream.
int nothing;
metal::TorchFunctions stream_functions() {
  metal::TorchFunctions functions;
  functions.current_stream = &mfa_driver_stream;
  functions.command_encoder = &mfa_driver_stream_encoder;
  functions.create_shader_library = [](const char*, AOTIMetalShaderLibraryHandle* library) {
    *library = reinterpret_cast<AOTIMetalShaderLibraryHandle>(&nothing);
    return AOTI_TORCH_SUCCESS;
  };
  functions.get_kernel_function = [](AOTIMetalShaderLibraryHandle, const char*,
                                     AOTIMetalKernelFunctionHandle* function) {
    *function = reinterpret_cast<AOTIMetalKernelFunctionHandle>(&nothing);
    return AOTI_TORCH_SUCCESS;
  };
  functions.run_command_block = [](AOTIMetalKernelFunctionHandle function, auto callback, void* data) {
    struct Call {
      AOTIMetalKernelFunctionHandle function;
      decltype(callback) run;
      void* data;
    } call{function, callback, data};
    const auto work = [](void* context) {
      const Call& c = *static_cast<const Call*>(context);
      c.run(c.function, c.data);
    };
    return mfa_driver_stream_run(mfa_driver_stream(), work, &call, nullptr) == 0 ? AOTI_TORCH_SUCCESS
                                                                                 : AOTI_TORCH_FAILURE;
  };
  return functions;
}

// Makes the driver's device the one that is simulated; the previous one comes back.
class Configured {
 public:
  Configured(const std::string& kernel_library, Family family, std::uint32_t checks, std::uint64_t seed) {
    const bool metal4 = family == Family::apple10;
    mfa_driver_set_mode(1);
    mfa_driver_set_execution(0);
    mfa_driver_set_device(1, static_cast<int>(family), metal4 ? 26 : 15, metal4 ? 2 : 0);
    mfa_driver_set_kernel_library(kernel_library.c_str());
    mfa_driver_set_checks(checks, seed);
    mfa_driver_clear_findings();
    mfa_driver_clear_launches();
  }
  ~Configured() { mfa_driver_restore_settings(saved_); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  void* saved_ = mfa_driver_save_settings();
};

// CPU memory as MTLBuffers, for one run.
class Wrapped {
 public:
  explicit Wrapped(const Arguments& arguments) : arguments_(arguments) {
    for (Buffer& argument : arguments_) {
      if (!argument.storage) continue;
      // An argument of no bytes is bound all the same, and Metal wants the offset within the buffer.
      const std::uint64_t size = argument.offset + std::max<std::uint64_t>(argument.extent, 1);
      argument.storage = mfa_driver_new_buffer(size, argument.storage);
    }
  }
  ~Wrapped() {
    for (const Buffer& argument : arguments_)
      if (argument.storage) mfa_driver_release(argument.storage);
  }
  Wrapped(const Wrapped&) = delete;
  Wrapped& operator=(const Wrapped&) = delete;

  const Arguments& arguments() const { return arguments_; }

 private:
  Arguments arguments_;
};

std::string findings() {
  char* text = mfa_driver_findings();
  std::string result = text;
  mfa_driver_free(text);
  while (result.ends_with('\n')) result.pop_back();
  return result;
}

bool is_instrumented(const std::string& kernel_library) {
  char error[kErrorSize] = {};
  const mfa_sim_library* library = mfa_sim_open(kernel_library.c_str(), error, sizeof error);
  if (!library) throw std::invalid_argument(error);
  return mfa_sim_is_instrumented(library) != 0;
}

// Where this library lies, and the metallibs with it.
std::filesystem::path own_directory() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&own_directory), &info)) return {};
  return std::filesystem::path(info.dli_fname).parent_path();
}

}  // namespace

struct SimulatorLauncher::Backend {
  metal::TorchQueue queue{stream_functions()};
  MetalLauncher launcher{queue, own_directory(), {}};  // no archive
};

SimulatorLauncher::SimulatorLauncher(const std::string& kernel_library, Family family, std::uint32_t checks,
                                     std::uint64_t seed)
    : kernel_library_(kernel_library), family_(family), checks_(checks), seed_(seed) {
  if (!is_instrumented(kernel_library) && checks)
    throw std::invalid_argument("checks need a kernel library built in count mode, which " + kernel_library +
                                " is not");
  const std::lock_guard process(process_mutex);
  const Configured configured(kernel_library_, family_, checks_, seed_);
  backend_ = std::make_unique<Backend>();
}

Family SimulatorLauncher::family() const { return backend_->launcher.family(); }

std::vector<std::string> SimulatorLauncher::notes() const { return backend_->launcher.notes().messages(); }

SimulatorLauncher::~SimulatorLauncher() {
  const std::lock_guard process(process_mutex);
  backend_.reset();
}

void SimulatorLauncher::run(const Plan& plan, const Arguments& arguments) {
  const std::lock_guard process(process_mutex);
  const Configured configured(kernel_library_, family_, checks_, seed_);
  std::string wrong;
  try {
    const Wrapped wrapped(arguments);
    backend_->launcher.run(plan, wrapped.arguments());
  } catch (const std::runtime_error& error) {
    wrong = error.what();
  }
  // Also what the driver found where nothing may be thrown.
  mfa_driver_stream_synchronize(mfa_driver_stream(), nullptr);
  if (wrong.empty()) wrong = findings();
  record(plan);
  if (wrong.empty()) return;
  const std::lock_guard lock(mutex_);
  finding_ = wrong;
  throw std::runtime_error(wrong);
}

void SimulatorLauncher::record(const Plan& plan) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t count = std::min<std::uint64_t>(mfa_driver_launch_count(), plan.launches.size());
  for (std::uint64_t i = 0; i < count; ++i) {
    mfa_driver_launch ran;
    mfa_driver_launch_at(i, &ran);
    SimulatedLaunch launch{plan.launches[i], ran.counters};
    launch.threadgroup_memory = static_cast<std::uint32_t>(ran.threadgroup_memory);
    launches_.push_back(std::move(launch));
  }
}

std::vector<SimulatedLaunch> SimulatorLauncher::launches() const {
  const std::lock_guard lock(mutex_);
  return launches_;
}

std::optional<std::string> SimulatorLauncher::finding() const {
  const std::lock_guard lock(mutex_);
  return finding_;
}

void SimulatorLauncher::clear() {
  const std::lock_guard lock(mutex_);
  launches_.clear();
  finding_.reset();
}

}  // namespace mfa

// csrc/metal asks torch's library who it is. A simulation of CPU tensors goes without torch's Metal stream, and whoever
// only imports this library goes without torch. (metal_launcher.map keeps the two names from everybody else.)
extern "C" {
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*) { return AOTI_TORCH_FAILURE; }
uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }
}
