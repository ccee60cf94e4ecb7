// As much JSON as mfa_metal_info() writes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace mfa::metal {

class JsonObject {
 public:
  void add(const char* key, const std::string& value) { put(key, quoted(value)); }
  void add(const char* key, std::int64_t value) { put(key, std::to_string(value)); }
  void add(const char* key, const std::vector<std::string>& values) {
    std::string list;
    for (const std::string& value : values) list += (list.empty() ? "" : ", ") + quoted(value);
    put(key, "[" + list + "]");
  }

  std::string text() const { return "{" + members_ + "}"; }

 private:
  void put(const char* key, const std::string& value) {
    members_ += (members_.empty() ? "" : ", ") + quoted(key) + ": " + value;
  }

  static std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (const unsigned char c : text) {
      if (c < 0x20 || c == '"' || c == '\\') {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", c);
        result += escape;
      } else {
        result += static_cast<char>(c);
      }
    }
    return result + "\"";
  }

  std::string members_;
};

}  // namespace mfa::metal
