// The stand-in device's guard and hooks: torch.backends.mps, torch.mps and autograd's device threads ask these.
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <string>
#include <utility>

#include "../driver/control.h"
#include "generator.h"
#include "memory.h"

namespace mfa::stand_in {
namespace {

c10::Stream default_stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr c10::DeviceType static_type = c10::kMPS;
  explicit Guard(c10::DeviceType = c10::kMPS) {}
  c10::DeviceType type() const override { return c10::kMPS; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return default_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return default_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return default_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return default_stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { synchronize(); }
  void synchronizeDevice(c10::DeviceIndex) const override { synchronize(); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  // Of events there is nothing to wait for: the one stream keeps the order.
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { synchronize(); }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(MPS, Guard)

// Events: everything has happened by the time anyone asks.
std::atomic<uint32_t> events{0};

}  // namespace
}  // namespace mfa::stand_in

// Torch creates the class registered under this name.
namespace at {

using namespace mfa::stand_in;

struct MPSHooks final : MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isOnMacOSorNewer(unsigned major, unsigned minor) const override {
    return std::pair(major, minor) <= std::pair(15u, 0u);
  }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  Generator getNewGenerator(DeviceIndex) const override { return new_generator(); }
  Allocator* getMPSDeviceAllocator() const override { return &allocator(); }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  void deviceSynchronize() const override { synchronize(); }
  void commitStream() const override { synchronize(); }
  void emptyCache() const override { empty_cache(); }
  size_t getCurrentAllocatedMemory() const override { return allocated_bytes(); }
  size_t getDriverAllocatedMemory() const override { return mfa_driver_allocated_bytes(); }
  size_t getRecommendedMaxMemory() const override { return size_t{12} << 30; }
  size_t getMaxBufferLength() const override { return size_t{8} << 30; }
  void setMemoryFraction(double) const override {}
  void profilerStartTrace(const std::string&, bool) const override {}
  void profilerStopTrace() const override {}
  uint32_t acquireEvent(bool) const override { return ++events; }
  void releaseEvent(uint32_t) const override {}
  void recordEvent(uint32_t) const override {}
  void waitForEvent(uint32_t) const override {}
  void synchronizeEvent(uint32_t) const override { synchronize(); }
  bool queryEvent(uint32_t) const override { return true; }
  double elapsedTimeOfEvents(uint32_t, uint32_t) const override { return 0; }
};

REGISTER_MPS_HOOKS(MPSHooks);

}  // namespace at

namespace {

struct RegisterAllocator {
  RegisterAllocator() { c10::SetAllocator(c10::kMPS, &mfa::stand_in::allocator()); }
} register_allocator;

}  // namespace

extern "C" __attribute__((visibility("default"))) size_t mfa_mps_allocation_count() {
  return mfa::stand_in::allocation_count();
}
