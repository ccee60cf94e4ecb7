#include "failure.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "library.h"

namespace mfa::sim {

Failure failure;

const char* base_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash != nullptr ? slash + 1 : file;
}

void Failure::clear() {
  length_ = 0;
  pc_ = nullptr;
  file_ = nullptr;
  line_ = 0;
  has_position_ = false;
}

void Failure::add(const char* format, ...) {
  va_list list;
  va_start(list, format);
  const int n = vsnprintf(text_ + length_, sizeof text_ - length_, format, list);
  va_end(list);
  if (n > 0) length_ = std::min(sizeof text_ - 1, length_ + n);
}

void Failure::at(const char* file, int line) {
  file_ = file;
  line_ = line;
}

void Failure::by(const mfa_sim_position& position) {
  has_position_ = true;
  position_ = position;
}

void Failure::message(const char* kernel, char* buffer, size_t size) const {
  if (buffer == nullptr || size == 0) return;
  std::string place, lane;
  char text[160];
  if (file_ != nullptr) {
    snprintf(text, sizeof text, " at %s:%d", base_name(file_), line_);
    place = text;
  } else if (pc_ != nullptr) {
    place = " at " + source_location(pc_);
  }
  if (has_position_) {
    const mfa_sim_uint3& group = position_.threadgroup_position_in_grid;
    snprintf(text, sizeof text, " (lane %u, SIMD-group %u, threadgroup (%u, %u, %u))",
             position_.thread_index_in_simdgroup, position_.simdgroup_index_in_threadgroup, group.x, group.y, group.z);
    lane = text;
  }
  snprintf(buffer, size, "kernel '%s': %.*s%s%s", kernel, static_cast<int>(length_), text_, place.c_str(),
           lane.c_str());
}

}  // namespace mfa::sim
