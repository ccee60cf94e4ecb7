#include "findings.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace mfa::driver {
namespace {

std::atomic<Mode> mode{Mode::record};
std::mutex lock;

// Leaked: findings may come from the destructors of other statics.
std::vector<Finding>& list() {
  static auto* findings = new std::vector<Finding>;
  return *findings;
}

std::string vformat(const char* format, va_list arguments) {
  char text[4096];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

std::string add(const char* rule, std::string text) {
  if (strcmp(rule, "execution") != 0) text += std::string(" [") + rule + "]";  // the engine's messages stay as they are
  if (mode == Mode::abort) {
    fprintf(stderr, "mfa driver: %s\n", text.c_str());
    std::abort();
  }
  const std::lock_guard guard(lock);
  list().push_back({rule, text});
  return text;
}

}  // namespace

void set_mode(Mode value) { mode = value; }

Mode current_mode() { return mode; }

bool raises() { return mode == Mode::raise; }

void report(const char* rule, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = add(rule, vformat(format, arguments));
  va_end(arguments);
  if (raises()) throw std::runtime_error(text);
}

std::string note(const char* rule, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = add(rule, vformat(format, arguments));
  va_end(arguments);
  return text;
}

std::vector<Finding> findings() {
  const std::lock_guard guard(lock);
  return list();
}

void clear_findings() {
  const std::lock_guard guard(lock);
  list().clear();
}

std::string format(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = vformat(format, arguments);
  va_end(arguments);
  return text;
}

}  // namespace mfa::driver
