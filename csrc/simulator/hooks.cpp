// What clang's -fsanitize=thread calls on every load and store of a kernel. This file is the simulator's inner loop:
// with -O3 and AVX2, the loops over an access's bytes become a few vector instructions.
#include <cstring>

#include "checks.h"
#include "findings.h"
#include "scheduler.h"
#include "shadow.h"

namespace mfa::sim {
namespace {

#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define NOINLINE __attribute__((noinline))
#ifdef __x86_64__
#define VECTORISED __attribute__((target("arch=x86-64-v3")))  // as the kernels are
#else
#define VECTORISED
#endif

// N is the size where the compiler knows it, else 0. Returns false on a race.
template <int N, int Kinds, bool Device>
ALWAYS_INLINE bool record(uint32_t* __restrict write, uint32_t* __restrict reader, uint32_t* __restrict other,
                          size_t size) {
  const size_t n = N != 0 ? N : size;
  const Now now = now_in(Device ? checks.device : checks.threadgroup);
  uint32_t found = 0;
  for (size_t i = 0; i < n; ++i) found |= unordered<Device>(write[i], now);
  if (Kinds & kWrite) {
    for (size_t i = 0; i < n; ++i) found |= unordered<Device>(reader[i], now);
    for (size_t i = 0; i < n; ++i) found |= unordered<Device>(other[i], now);
  }
  if (__builtin_expect(found != 0, 0)) return false;
  if (Kinds & kRead) {
    for (size_t i = 0; i < n; ++i) record_read<Device>(reader[i], other[i], now);
  }
  if (Kinds & kWrite) {
    for (size_t i = 0; i < n; ++i) write[i] = now.self;
  }
  return true;
}

// The parts below that are not inlined are tail calls: a hook that ends early, as most do, then saves no register.
template <int N, int Kinds>
NOINLINE VECTORISED void threadgroup_access(uint32_t offset, size_t size, const void* pc) {
  constexpr Access kind = Kinds & kWrite ? kWrite : kRead;
  if (N != 0) size = N;
  if (Kinds & kRead) ++counters.threadgroup_reads, counters.threadgroup_read_bytes += size;
  if (Kinds & kWrite) ++counters.threadgroup_writes, counters.threadgroup_write_bytes += size;
  if (__builtin_expect(!arena.holds(offset, size), 0)) {
    if (checks.bounds) fail_threadgroup_bounds(offset, size, kind, pc);
    return;
  }
  uint32_t* write = threadgroup_shadow.write + offset;
  if ((Kinds & kRead) && checks.uninitialised) {
    uint32_t found = 0;
    for (size_t i = 0; i < size; ++i) found |= write[i] < checks.group;
    if (__builtin_expect(found != 0, 0)) fail_uninitialised(offset, size, pc);
  }
  if (checks.races) {
    if (!record<N, Kinds, false>(write, threadgroup_shadow.reader + offset, threadgroup_shadow.other + offset, size)) {
      fail_threadgroup_race(offset, size, kind, pc);
    }
  } else if ((Kinds & kWrite) && checks.uninitialised) {
    for (size_t i = 0; i < size; ++i) write[i] = checks.now;
  }
}

template <int N, int Kinds>
NOINLINE VECTORISED void shadowed_access(uintptr_t address, size_t size, const void* pc) {
  const Region& region = *checks.last;
  uint32_t* write = region.cells + (address - region.begin);
  if (!record<N, Kinds, true>(write, write + region.size, write + 2 * region.size, N != 0 ? N : size)) {
    fail_device_race(address, N != 0 ? N : size, Kinds & kWrite ? kWrite : kRead, pc);
  }
}

template <int N, int Kinds>
ALWAYS_INLINE void region_access(const Region& region, uintptr_t address, size_t size, const void* pc) {
  if (region.counted) {
    if (Kinds & kRead) ++counters.device_reads, counters.device_read_bytes += size;
    if (Kinds & kWrite) ++counters.device_writes, counters.device_write_bytes += size;
  }
  if (region.cells != nullptr) return shadowed_access<N, Kinds>(address, size, pc);
  if ((Kinds & kWrite) && !region.writable && checks.bounds) fail_constant_write(address, size, pc);
}

// Not in the buffer touched last.
template <int N, int Kinds>
NOINLINE void elsewhere_access(uintptr_t address, size_t size, const void* pc) {
  if (scheduler.current() == nullptr) return;     // a library's constructors
  if (checks.library->contains(address)) return;  // function constants and tables
  const Region* region = regions.find(address);
  if (region != nullptr && region->holds(address, size)) {
    checks.last = region;
    return region_access<N, Kinds>(*region, address, size, pc);
  }
  // An operation works on what all lanes passed, which lies on their stacks.
  if (scheduler.in_operation() && scheduler.stacks().contains(address)) return;
  if (checks.bounds) fail_device_bounds(address, size, Kinds & kWrite ? kWrite : kRead, pc);
}

template <int N, int Kinds>
ALWAYS_INLINE void access(const void* pointer, size_t size, const void* pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  // Stacks are aligned to their size, so this is: does the address lie on my own?
  if ((address ^ stack_pointer()) < kStackSize) return;
  const uintptr_t offset = address - arena.begin();
  if (offset < arena.extent()) return threadgroup_access<N, Kinds>(static_cast<uint32_t>(offset), size, pc);
  const Region& region = *checks.last;
  if (!region.holds(address, size)) return elsewhere_access<N, Kinds>(address, size, pc);
  region_access<N, Kinds>(region, address, size, pc);
}

NOINLINE void range(const void* pointer, size_t size, Access kind, const void* pc) {
  if (size == 0) return;
  if (kind == kRead) {
    access<0, kRead>(pointer, size, pc);
  } else {
    access<0, kWrite>(pointer, size, pc);
  }
}

}  // namespace
}  // namespace mfa::sim

using namespace mfa::sim;

#define CALLER __builtin_return_address(0)
#define HOOK(name, size, kinds) \
  void __tsan_##name##size(void* p) { access<size, (kinds)>(p, size, CALLER); }
#define HOOKS(size)                                \
  HOOK(read, size, kRead)                          \
  HOOK(write, size, kWrite)                        \
  HOOK(read_write, size, kRead | kWrite)           \
  HOOK(unaligned_read, size, kRead)                \
  HOOK(unaligned_write, size, kWrite)              \
  HOOK(unaligned_read_write, size, kRead | kWrite) \
  HOOK(volatile_read, size, kRead)                 \
  HOOK(volatile_write, size, kWrite)               \
  HOOK(unaligned_volatile_read, size, kRead)       \
  HOOK(unaligned_volatile_write, size, kWrite)

extern "C" {
#pragma GCC visibility push(default)

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_init() { library_is_instrumented(); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_ignore_thread_begin() {}
void __tsan_ignore_thread_end() {}
void __tsan_vptr_update(void** p, void*) { range(p, sizeof *p, kWrite, CALLER); }
void __tsan_vptr_read(void** p) { range(p, sizeof *p, kRead, CALLER); }
void __tsan_read_range(void* p, unsigned long size) { range(p, size, kRead, CALLER); }
void __tsan_write_range(void* p, unsigned long size) { range(p, size, kWrite, CALLER); }

void* __tsan_memcpy(void* to, const void* from, size_t size) {
  range(from, size, kRead, CALLER);
  range(to, size, kWrite, CALLER);
  return memcpy(to, from, size);
}

void* __tsan_memmove(void* to, const void* from, size_t size) {
  range(from, size, kRead, CALLER);
  range(to, size, kWrite, CALLER);
  return memmove(to, from, size);
}

void* __tsan_memset(void* to, int value, size_t size) {
  range(to, size, kWrite, CALLER);
  return memset(to, value, size);
}

#pragma GCC visibility pop
}
