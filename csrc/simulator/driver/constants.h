// MTLFunctionConstantValues, and what a function takes of them.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "library.h"

namespace mfa::driver {

class ConstantValues final : public Object {
 public:
  ConstantValues() : Object("MTLFunctionConstantValues") {}
  struct Value {
    std::uint64_t type = 0;  // MTLDataType
    Bytes bytes;
  };
  std::map<std::uint64_t, Value> by_index;
  std::map<std::string, Value> by_name;
};

// Sets the function's constants; an error's text when a value is missing or of another type, as Metal reports them.
std::optional<std::string> specialise(Function& function, const ConstantValues& values);
std::optional<std::string> unspecialised(const Function& function);  // why it can't be used as it is

void define_constants();

}  // namespace mfa::driver
