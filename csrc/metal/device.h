// The GPU, and what decides which kernels it runs.
#pragma once

#include <string>

#include "metal/metal.h"
#include "plan/plan.h"

namespace mfa::metal {

struct Device {
  NS::SharedPtr<MTL::Device> handle;  // null without a GPU
  std::string name;                   // "Apple M2 Pro"
  std::string architecture;           // "applegpu_g14s"
  int generation = 0;                 // 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5; 0 is unknown
  Family family = Family::apple7;
  std::string system;  // "Version 14.5 (Build 23F79)"
  NS::OperatingSystemVersion system_version{};
  std::string why_not;  // empty if the kernels run here
  std::string note;     // what is unusual, if anything

  bool is_system_at_least(int major, int minor) const;
};

// Describes a GPU; null stands for a machine without one.
Device describe(NS::SharedPtr<MTL::Device> handle);

// The GPU that Metal recommends. That of torch's tensors may be another: see device_of() in torch_queue.h.
Device default_device();

}  // namespace mfa::metal
