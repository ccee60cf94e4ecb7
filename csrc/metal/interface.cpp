#include "metal/interface.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "metal/json.h"
#include "metal/launch.h"

namespace mfa {
namespace {

std::filesystem::path library_directory() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&mfa_metal_info), &info)) return {};
  return std::filesystem::path(info.dli_fname).parent_path();
}

// One each for the process, made by the first MPS op and never destroyed: Metal and torch may be gone before our
// statics. If it throws, the next call tries again.
metal::TorchQueue& process_queue() {
  static metal::TorchQueue& queue = *new metal::TorchQueue(metal::find_torch_functions());
  return queue;
}

MetalLauncher& process_launcher() {
  static MetalLauncher& launcher =
      *new MetalLauncher(process_queue(), library_directory(), metal::default_cache_directory());
  return launcher;
}

FunctionConstant constant_named(const char* wanted) {
  for (unsigned index = 0;; ++index) {
    const auto constant = static_cast<FunctionConstant>(index);
    if (std::strcmp(name(constant), wanted) == 0) return constant;  // name() throws behind the last one
  }
}

template <typename Function>
char* reason(Function&& function) {
  try {
    function();
    return nullptr;
  } catch (...) {
    return strdup(metal::text_of_current_exception().c_str());
  }
}

metal::JsonObject info() {
  metal::JsonObject json;
  json.add("torch", metal::torch_version());
  std::vector<std::string> why_not;
  metal::Device device = metal::default_device();
  if (device.handle) {  // without a GPU it's no wonder that torch can't use one
    try {
      device = metal::device_of(process_queue());
    } catch (...) {
      why_not.push_back(metal::text_of_current_exception());
    }
  }
  if (!device.why_not.empty()) why_not.insert(why_not.begin(), device.why_not);
  json.add("name", device.name);
  json.add("architecture", device.architecture);
  json.add("generation", device.generation);
  json.add("family", device.why_not.empty() ? "apple" + std::to_string(static_cast<int>(device.family)) : "");
  json.add("system", device.system);
  json.add("why_not", why_not);
  if (!why_not.empty()) return json;

  const MetalLauncher& launcher = process_launcher();
  json.add("planned_family", "apple" + std::to_string(static_cast<int>(launcher.family())));
  json.add("why_no_unit", launcher.library().why_no_unit());
  json.add("metallib", launcher.library().description());
  json.add("archive", launcher.archive().file().string());
  json.add("pipelines_compiled", static_cast<std::int64_t>(launcher.pipelines().compiled()));
  json.add("notes", launcher.notes().messages());
  return json;
}

}  // namespace

Launcher& metal_launcher() {
  try {
    return process_launcher();
  } catch (...) {
    throw std::runtime_error("attention on MPS tensors needs Metal, but " + metal::text_of_current_exception());
  }
}

}  // namespace mfa

char* mfa_metal_info() {
  mfa::metal::JsonObject json;
  if (char* failure = mfa::reason([&] { json = mfa::info(); })) {
    json.add("why_not", std::vector<std::string>{failure});
    std::free(failure);
  }
  return strdup(json.text().c_str());
}

char* mfa_metal_precompile(const char* kernel, const char* const* constant_names, const unsigned char* constant_values,
                           int constant_count) {
  using namespace mfa;
  return reason([&] {
    Launch launch{kernel, {}, {1, 1, 1}, {1, 1, 1}, 0};
    for (int i = 0; i < constant_count; ++i)
      launch.constants.push_back({constant_named(constant_names[i]), constant_values[i] != 0});
    process_launcher().precompile(launch);
  });
}

char* mfa_metal_clear_cache() {
  return mfa::reason([] { mfa::process_launcher().clear_cache(); });
}

void mfa_metal_free(char* text) { std::free(text); }
