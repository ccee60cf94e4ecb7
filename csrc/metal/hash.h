// FNV-1a, for names of files in the cache: stable from run to run, as std::hash is not.
#pragma once

#include <cstdint>
#include <string_view>

namespace mfa::metal {

inline constexpr std::uint64_t kHashStart = 14695981039346656037u;

constexpr std::uint64_t hash_of(std::string_view bytes, std::uint64_t start = kHashStart) {
  for (const char byte : bytes) start = (start ^ static_cast<unsigned char>(byte)) * 1099511628211u;
  return start;
}

}  // namespace mfa::metal
