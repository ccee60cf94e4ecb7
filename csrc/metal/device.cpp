#include "metal/device.h"

#include <cctype>
#include <tuple>
#include <utility>

namespace mfa::metal {
namespace {

struct FamilyRow {
  MTL::GPUFamily metal;
  Family family;
};

// Newest first: a GPU supports its own family and all the older ones.
constexpr FamilyRow kFamilies[] = {
    {MTL::GPUFamilyApple10, Family::apple10},
    {MTL::GPUFamilyApple9, Family::apple9},
    {MTL::GPUFamilyApple8, Family::apple8},
    {MTL::GPUFamilyApple7, Family::apple7},
};

int generation_of(const std::string& architecture) {
  const std::size_t start = architecture.rfind("_g");
  int generation = 0;
  if (start == std::string::npos) return generation;
  for (std::size_t i = start + 2; i < architecture.size() && std::isdigit(static_cast<unsigned char>(architecture[i]));
       ++i)
    generation = 10 * generation + (architecture[i] - '0');
  return generation;
}

const FamilyRow* family_of(MTL::Device& device) {
  for (const FamilyRow& row : kFamilies)
    if (device.supportsFamily(row.metal)) return &row;
  return nullptr;
}

}  // namespace

bool Device::is_system_at_least(int major, int minor) const {
  return std::tuple(system_version.majorVersion, system_version.minorVersion) >= std::tuple(major, minor);
}

Device default_device() {
  const Pool pool;
  auto handle = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
  // Metal has no default for a process without Core Graphics, and lists its GPUs all the same.
  const auto all = NS::TransferPtr(handle ? nullptr : MTL::CopyAllDevices());
  if (all && all->count() > 0) handle = NS::RetainPtr(all->object<MTL::Device>(0));
  return describe(std::move(handle));
}

Device describe(NS::SharedPtr<MTL::Device> handle) {
  const Pool pool;
  Device device;
  NS::ProcessInfo* process = NS::ProcessInfo::processInfo();
  device.system = text_of(process->operatingSystemVersionString());
  device.system_version = process->operatingSystemVersion();

  device.handle = std::move(handle);
  if (!device.handle) {
    device.why_not = "this machine has no GPU that Metal can use";
    return device;
  }
  device.name = text_of(device.handle->name());
  if (!device.is_system_at_least(14, 0)) {
    device.why_not = "mfa needs macOS 14 or later, and this is " + device.system;
    return device;
  }
  device.architecture = text_of(device.handle->architecture()->name());
  device.generation = generation_of(device.architecture);
  if (const FamilyRow* row = family_of(*device.handle.get()))
    device.family = row->family;
  else
    device.why_not = "mfa needs an Apple GPU of family 7 (M1) or later, and this is " + device.name;
  return device;
}

}  // namespace mfa::metal
