// What the parts of mfa._native share: enumerators by name.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "plan/plan.h"

namespace mfa {

template <typename Value>
struct Named {
  const char* name;
  Value value;
};

constexpr Named<Family> kFamilies[] = {
    {"apple7", Family::apple7}, {"apple8", Family::apple8}, {"apple9", Family::apple9}, {"apple10", Family::apple10}};
template <typename Table>
auto value_of(const Table& table, const std::string& name, const char* what) {
  for (const auto& row : table)
    if (name == row.name) return row.value;
  std::string message = std::string(what) + " is '" + name + "'; it must be one of";
  for (const auto& row : table) message += std::string(" ") + row.name;
  throw nanobind::value_error(message.c_str());
}

template <typename Table, typename Value>
const char* name_of(const Table& table, Value value) {
  return std::ranges::find_if(table, [&](const auto& row) { return row.value == value; })->name;
}

void bind_plan(nanobind::module_& m);
void bind_catalogue(nanobind::module_& m);

}  // namespace mfa
