// MTLLibrary, MTLFunction and function constants, over the engine's kernel libraries.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../engine.h"
#include "device.h"

namespace mfa::driver {

class Library final : public Object {
 public:
  Library(Device* of, const mfa_sim_library* library, std::string where)
      : Object("MTLLibrary"), device(of), engine(library), path(std::move(where)) {}
  Device* const device;
  const mfa_sim_library* engine;
  std::string path, label;
};

using Bytes = std::vector<std::uint8_t>;

class Function final : public Object {
 public:
  Function(Library* of, const mfa_sim_kernel* row) : Object("MTLFunction"), library(of), kernel(row) {}
  // Tells compiled code apart: library, kernel, constants.
  std::string key() const;

  Ref<Library> library;
  const mfa_sim_kernel* kernel;
  std::map<int, Bytes> constants;  // by index
  std::string label;
};

std::vector<std::string> compiled_sources();  // the first line of each, in order

}  // namespace mfa::driver
