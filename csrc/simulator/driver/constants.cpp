#include "constants.h"

#include <algorithm>
#include <iterator>

#include "findings.h"
#include "foundation.h"
#include "runtime.h"
#include "settings.h"

namespace mfa::driver {
namespace {

struct TypeRow {
  std::uint64_t data_type;  // of the scalar; vectors of 2, 3, 4 follow
  std::uint64_t size;
  const char* names[3];  // MSL's spellings
};

constexpr TypeRow kTypes[] = {
    {3, 4, {"float"}},
    {16, 2, {"half"}},
    {29, 4, {"int", "int32_t"}},
    {33, 4, {"uint", "uint32_t", "unsigned int"}},
    {37, 2, {"short", "int16_t"}},
    {41, 2, {"ushort", "uint16_t", "unsigned short"}},
    {45, 1, {"char", "int8_t"}},
    {49, 1, {"uchar", "uint8_t", "unsigned char"}},
    {53, 1, {"bool"}},
    {81, 8, {"long", "int64_t"}},
    {85, 8, {"ulong", "uint64_t", "unsigned long"}},
    {121, 2, {"bfloat"}},
};

const TypeRow* row_of(std::uint64_t data_type, std::uint64_t& components) {
  for (const TypeRow& row : kTypes) {
    if (data_type < row.data_type || data_type >= row.data_type + 4) continue;
    components = data_type - row.data_type + 1;
    return &row;
  }
  return nullptr;
}

std::uint64_t size_of(std::uint64_t data_type) {
  std::uint64_t components = 0;
  const TypeRow* row = row_of(data_type, components);
  return row == nullptr ? 0 : row->size * (components == 3 ? 4 : components);
}

std::string name_of(std::uint64_t data_type) {
  std::uint64_t components = 0;
  const TypeRow* row = row_of(data_type, components);
  if (row == nullptr) return "MTLDataType " + std::to_string(data_type);
  return row->names[0] + (components == 1 ? std::string() : std::to_string(components));
}

bool is_type(std::uint64_t data_type, const std::string& spelling) {
  std::uint64_t components = 0;
  const TypeRow* row = row_of(data_type, components);
  if (row == nullptr) return false;
  const std::string suffix = components == 1 ? "" : std::to_string(components);
  return std::any_of(std::begin(row->names), std::end(row->names),
                     [&](const char* name) { return name != nullptr && name + suffix == spelling; });
}

ConstantValues::Value value_of(const void* bytes, std::uint64_t type) {
  const std::uint64_t size = size_of(type);
  if (size == 0 || bytes == nullptr) {
    report("constant", "setConstantValue: %s",
           bytes == nullptr ? "the value is a null pointer" : ("unknown type " + name_of(type)).c_str());
    return {type, {}};
  }
  const auto* from = static_cast<const std::uint8_t*>(bytes);
  return {type, Bytes(from, from + size)};
}

void set_by_index(ConstantValues* self, const void* value, std::uint64_t type, std::uint64_t index) {
  self->by_index[index] = value_of(value, type);
}
void set_by_name(ConstantValues* self, const void* value, std::uint64_t type, const void* name) {
  self->by_name[text_of(name, "setConstantValue:type:withName:")] = value_of(value, type);
}
void set_range(ConstantValues* self, const void* values, std::uint64_t type, Range range) {
  for (std::uint64_t i = 0; i < range.length; ++i) {
    self->by_index[range.location + i] = value_of(static_cast<const char*>(values) + i * size_of(type), type);
  }
}
void reset(ConstantValues* self) {
  self->by_index.clear();
  self->by_name.clear();
}

}  // namespace

std::optional<std::string> specialise(Function& function, const ConstantValues& values) {
  const mfa_sim_library* library = function.library->engine;
  for (int i = 0; i < mfa_sim_function_constant_count(library); ++i) {
    const mfa_sim_function_constant& constant = *mfa_sim_function_constant_at(library, i);
    const ConstantValues::Value* value = nullptr;
    const auto by_index = values.by_index.find(static_cast<std::uint64_t>(constant.index));
    if (by_index != values.by_index.end()) value = &by_index->second;
    const auto by_name = values.by_name.find(constant.name);
    if (by_name != values.by_name.end()) value = &by_name->second;
    if (value == nullptr) {
      if (!settings().all_constants) continue;
      return format("function '%s': the function constant '%s' (index %d, %s) has no value", function.kernel->name,
                    constant.name, constant.index, constant.type);
    }
    if (!is_type(value->type, constant.type)) {
      return format("function '%s': the function constant '%s' (index %d) is a %s, but its value is given as a %s",
                    function.kernel->name, constant.name, constant.index, constant.type, name_of(value->type).c_str());
    }
    function.constants[constant.index] = value->bytes;
  }
  return std::nullopt;
}

std::optional<std::string> unspecialised(const Function& function) {
  if (!function.constants.empty() || !settings().all_constants) return std::nullopt;
  if (mfa_sim_function_constant_count(function.library->engine) == 0) return std::nullopt;
  return format("function '%s' has function constants and was made without values for them", function.kernel->name);
}

void define_constants() {
  define("MTLFunctionConstantValues", &make_object<ConstantValues>)
      .method<&set_by_index>("setConstantValue:type:atIndex:")
      .method<&set_by_name>("setConstantValue:type:withName:")
      .method<&set_range>("setConstantValues:type:withRange:")
      .method<&reset>("reset");
}

}  // namespace mfa::driver
