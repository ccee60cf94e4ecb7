// The few Foundation classes that Metal host code touches.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "object.h"

namespace mfa::driver {

struct Range {
  std::uint64_t location, length;
};

class String : public Object {
 public:
  explicit String(std::string value = {}) : Object("NSString"), text(std::move(value)) {}
  std::string text;
};

// A literal in the client's data.
class ConstantString final : public String {
 public:
  ConstantString(const void* address, std::string value);
  void* handle() override { return const_cast<void*>(address_); }

 private:
  const void* address_;
};
bool is_constant_string_class(const void* isa);

class Error final : public Object {
 public:
  Error(std::string domain_name, std::int64_t error_code, std::string error_text);
  std::string domain, text;
  std::int64_t code;
};

class Url final : public Object {
 public:
  explicit Url(std::string path_name = {}) : Object("NSURL"), path(std::move(path_name)) {}
  std::string path;
};

class Array final : public Object {
 public:
  Array() : Object("NSArray") {}
  std::vector<Ref<Object>> items;
};

// The text of an NSString argument; null pointer for null.
std::string text_of(const void* string, const char* what);

// For `NS::Error** error`: autoreleased, as Cocoa does.
void set_error(void** error, const char* domain, std::int64_t code, const std::string& text);

}  // namespace mfa::driver
