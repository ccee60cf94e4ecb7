// Kernels built with AddressSanitizer bring its runtime into the process; otherwise these do nothing.
#pragma once

#include <cstddef>

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

namespace mfa::sim {

inline void asan_poison(const void* address, size_t size) {
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(address, size);
}

inline void asan_unpoison(const void* address, size_t size) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(address, size);
}

}  // namespace mfa::sim
