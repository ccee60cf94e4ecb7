// To be preloaded: counts what libmfa takes from the heap. What torch and the driver take for its calls isn't counted.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string_view>

#define EXPORT __attribute__((visibility("default")))

namespace {

std::atomic<bool> counting = false;
std::atomic<std::uint64_t> allocations = 0;

bool is_libmfa(const void* address) {
  Dl_info info{};
  return dladdr(address, &info) && std::string_view(info.dli_fname).ends_with("/libmfa.so");
}

}  // namespace

EXPORT void* operator new(std::size_t size) {
  if (counting && is_libmfa(__builtin_return_address(0))) ++allocations;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}

extern "C" {
EXPORT void mfa_heap_start() {
  allocations = 0;
  counting = true;
}
EXPORT std::uint64_t mfa_heap_stop() {
  counting = false;
  return allocations;
}
}
