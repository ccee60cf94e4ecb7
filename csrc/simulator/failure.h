// What went wrong in a dispatch, and where. Text is collected in a fixed buffer: a failing fiber never unwinds, so
// nothing it holds may need a destructor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine.h"

namespace mfa::sim {

class Failure {
 public:
  void clear();
  bool happened() const { return length_ > 0; }
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...);

  // Where the kernel's source is to blame: either a line, or an instruction to be resolved by format_message().
  void at(const char* file, int line);
  void at(const void* pc) { pc_ = pc; }
  void by(const mfa_sim_position& position);

  // `kernel 'NAME': text at file:line (lane .., SIMD-group .., threadgroup ..)`. Call on the host's stack.
  void message(const char* kernel, char* buffer, size_t size) const;

 private:
  char text_[8192];
  size_t length_ = 0;
  const void* pc_;
  const char* file_;
  int line_;
  bool has_position_;
  mfa_sim_position position_;
};

extern Failure failure;

// `file` without directories.
const char* base_name(const char* file);

}  // namespace mfa::sim
