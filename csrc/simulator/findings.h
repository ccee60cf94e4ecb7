// Messages of the memory checks. Each fails the dispatch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mfa::sim {

enum Access { kRead = 1, kWrite = 2 };

[[noreturn]] void fail_threadgroup_race(uint32_t offset, size_t size, Access access, const void* pc);
[[noreturn]] void fail_device_race(uintptr_t address, size_t size, Access access, const void* pc);
[[noreturn]] void fail_uninitialised(uint32_t offset, size_t size, const void* pc);
[[noreturn]] void fail_threadgroup_bounds(uint32_t offset, size_t size, Access access, const void* pc);
[[noreturn]] void fail_device_bounds(uintptr_t address, size_t size, Access access, const void* pc);
[[noreturn]] void fail_constant_write(uintptr_t address, size_t size, const void* pc);

}  // namespace mfa::sim
