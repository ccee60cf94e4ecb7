// What the device pretends to be, and how it runs.
#pragma once

#include <cstdint>
#include <string>

namespace mfa::driver {

enum class Execution {
  eager,    // a dispatch runs within dispatchThreadgroups
  lazy,     // it runs when someone waits for its command buffer, in the queue's order
  nothing,  // it is validated and forgotten: for measuring the host
};

struct Settings {
  bool present = false;  // false: MTLCreateSystemDefaultDevice() returns null, as on a machine without a GPU
  bool has_default = true;
  int devices = 1;     // or 2
  int family = 7;      // Apple GPU family, of all devices
  char variant = 'g';  // last letter of the architecture's name; p: of phones
  int os_major = 15, os_minor = 0;
  std::string kernel_library;  // what newLibrary with source or an unnamed metallib stands for
  Execution execution = Execution::eager;
  std::uint32_t checks = 0;  // MFA_SIM_CHECK_*
  std::uint64_t seed = 0;
  bool all_constants = true;  // a function needs every constant of its library
};

Settings settings();
Execution execution();  // of the settings, without a copy of the rest
void change_settings(const Settings& value);

}  // namespace mfa::driver
