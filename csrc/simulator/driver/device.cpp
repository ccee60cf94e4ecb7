// MTLDevice: who it is, what it can, and what it makes. Makers of other classes' objects live with those classes.
#include "device.h"

#include <algorithm>

#include "buffer.h"
#include "findings.h"
#include "foundation.h"
#include "queue.h"
#include "runtime.h"
#include "settings.h"

namespace mfa::driver {
namespace {

constexpr std::uint64_t kThreads = 1024, kThreadgroupMemory = 32768, kMemory = 16ull << 30;
constexpr const char* kChips[] = {"M1", "M2", "M3", "M5"};  // by family, from 7 on; M4 is of family 9 too
constexpr int kGenerations[] = {13, 14, 15, 17};

int family_row() { return std::clamp(settings().family, 7, 10) - 7; }

std::string device_name(const Device& device) {
  return std::string("Apple ") + kChips[family_row()] + " (software driver" + (device.index > 0 ? ", second)" : ")");
}

class Architecture final : public Object {
 public:
  Architecture() : Object("MTLArchitecture") { immortal = true; }
};
void* architecture(Device*) {
  static auto* instance = make<Architecture>();
  return instance->handle();
}
void* architecture_name(Architecture*) {
  return give_autoreleased(make<String>(format("applegpu_g%d%c", kGenerations[family_row()], settings().variant)));
}

void* name(Device* self) { return give_autoreleased(make<String>(device_name(*self))); }
std::uint64_t registry_id(Device* self) { return static_cast<std::uint64_t>(self->index) + 1; }
bool supports_family(Device*, std::int64_t family) {
  const Settings s = settings();
  if (family > 1000 && family <= 1000 + s.family) return true;   // Apple1 ...
  if (family > 3000 && family <= 3003) return true;              // Common1 ...
  if (family == 2002) return true;                               // Mac2
  if (family == 5001) return s.family >= 7;                      // Metal3
  if (family == 5002) return s.family >= 7 && s.os_major >= 26;  // Metal4
  return false;
}
std::uint64_t max_threadgroup_memory(Device*) { return kThreadgroupMemory; }
Size max_threads(Device*) { return {kThreads, kThreads, kThreads}; }
std::uint64_t max_buffer_length(Device*) { return kMemory / 2; }
std::uint64_t working_set(Device*) { return kMemory / 4 * 3; }
std::uint64_t current_allocated(Device*) { return allocated_bytes(); }
bool yes(Device*) { return true; }
bool no(Device*) { return false; }

void* new_buffer_over(Device* self, std::uint64_t length, std::uint64_t options, void* memory, HeldBlock deallocator) {
  if (length == 0) {
    report("empty-buffer", "a buffer of 0 bytes is asked for; Metal returns nil");
    return nullptr;
  }
  return give(make<Buffer>(self, length, options, memory, std::move(deallocator)));
}
void* new_buffer(Device* self, std::uint64_t length, std::uint64_t options) {
  return new_buffer_over(self, length, options, nullptr, HeldBlock());
}
void* new_buffer_with_bytes(Device* self, const void* bytes, std::uint64_t length, std::uint64_t options) {
  void* handle = new_buffer_over(self, length, options, nullptr, HeldBlock());
  if (handle != nullptr) {
    const auto* from = static_cast<const char*>(bytes);
    std::copy(from, from + length, static_cast<Buffer*>(find(handle))->contents);
  }
  return handle;
}
void* new_buffer_no_copy(Device* self, void* bytes, std::uint64_t length, std::uint64_t options,
                         const void* deallocator) {
  constexpr std::uintptr_t kApplePage = 16384;
  if (reinterpret_cast<std::uintptr_t>(bytes) % kApplePage != 0 || length % kApplePage != 0) {
    report("page-aligned", "newBufferWithBytesNoCopy: pointer and length must be multiples of the page, 16384 bytes");
    return nullptr;
  }
  return new_buffer_over(self, length, options, bytes, HeldBlock(deallocator));
}

void* new_queue(Device* self) { return give(make<CommandQueue>(self)); }
void* new_queue_with_count(Device* self, std::uint64_t) { return new_queue(self); }

class CaptureManager final : public Object {
 public:
  CaptureManager() : Object("MTLCaptureManager") { immortal = true; }
};
void* capture_manager(Class*) {
  static auto* instance = make<CaptureManager>();
  return instance->handle();
}
bool is_capturing(CaptureManager*) { return false; }
bool supports_destination(CaptureManager*, std::int64_t) { return false; }

Device* device_at(int index) {
  static Device* const devices[] = {make<Device>(0), make<Device>(1)};
  return devices[index];
}

}  // namespace

Device* default_device() { return device_at(0); }

Device* torch_device() { return device_at(settings().devices - 1); }

void define_device() {
  define("MTLDevice")
      .method<&name>("name")
      .method<&architecture>("architecture")
      .method<&registry_id>("registryID")
      .method<&supports_family>("supportsFamily:")
      .method<&max_threadgroup_memory>("maxThreadgroupMemoryLength")
      .method<&max_threads>("maxThreadsPerThreadgroup")
      .method<&max_buffer_length>("maxBufferLength")
      .method<&working_set>("recommendedMaxWorkingSetSize")
      .method<&current_allocated>("currentAllocatedSize")
      .method<&yes>("hasUnifiedMemory")
      .method<&no>("isRemovable")
      .method<&no>("isHeadless")
      .method<&no>("isLowPower")
      .method<&new_buffer>("newBufferWithLength:options:")
      .method<&new_buffer_with_bytes>("newBufferWithBytes:length:options:")
      .method<&new_buffer_no_copy>("newBufferWithBytesNoCopy:length:options:deallocator:")
      .method<&new_queue>("newCommandQueue")
      .method<&new_queue_with_count>("newCommandQueueWithMaxCommandBufferCount:");
  define("MTLArchitecture").method<&architecture_name>("name");
  define("MTLCaptureManager")
      .class_method<&capture_manager>("sharedCaptureManager")
      .method<&is_capturing>("isCapturing")
      .method<&supports_destination>("supportsDestination:");
}

}  // namespace mfa::driver

using namespace mfa::driver;

extern "C" {
#pragma GCC visibility push(default)

void* MTLCreateSystemDefaultDevice() {
  call.caller = __builtin_return_address(0);
  const Settings s = settings();
  return s.present && s.has_default ? give(default_device()) : nullptr;
}

void* MTLCopyAllDevices() {
  call.caller = __builtin_return_address(0);
  auto* array = make<Array>();
  const Settings s = settings();
  for (int i = 0; s.present && i < s.devices; ++i) array->items.emplace_back(device_at(i));
  return give(array);
}

void* MTLCopyAllDevicesWithObserver(void** observer, const void*) {
  if (observer != nullptr) *observer = nullptr;
  return MTLCopyAllDevices();
}

void MTLRemoveDeviceObserver(const void*) {}

#pragma GCC visibility pop
}
