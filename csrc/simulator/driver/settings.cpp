#include "settings.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

namespace mfa::driver {
namespace {

std::mutex lock;

Settings initial() {
  Settings s;
  if (const char* path = getenv("MFA_DRIVER_KERNELS")) s.kernel_library = path;
  Dl_info info;
  if (s.kernel_library.empty() && dladdr(reinterpret_cast<void*>(&settings), &info) != 0) {
    const std::string self = info.dli_fname;
    s.kernel_library = self.substr(0, self.rfind('/') + 1) + "libmfa_kernels_count.so";
  }
  return s;
}

Settings& current() {
  static auto* instance = new Settings(initial());
  return *instance;
}

}  // namespace

Settings settings() {
  const std::lock_guard guard(lock);
  return current();
}

Execution execution() {
  const std::lock_guard guard(lock);
  return current().execution;
}

void change_settings(const Settings& value) {
  const std::lock_guard guard(lock);
  current() = value;
}

}  // namespace mfa::driver
