// What the driver has to say about its client.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mfa::driver {

enum class Mode { record, raise, abort };  // raise: std::runtime_error from the call that was wrong

struct Finding {
  std::string rule;  // a short name, for tests: "unbound-buffer"
  std::string text;  // "kernel 'forward_f16_d64': nothing is bound to buffer 2, parameter 'value' [unbound-buffer]"
};

void set_mode(Mode mode);
Mode current_mode();

// Adds a finding and, in that mode, throws it. Returns otherwise: the caller then leaves the wrong call undone.
[[gnu::format(printf, 2, 3)]] void report(const char* rule, const char* format, ...);

// Never throws: for what may be called by a destructor (release, pool pop). Returns the finding's text.
[[gnu::format(printf, 2, 3)]] std::string note(const char* rule, const char* format, ...);
bool raises();  // whether report() would throw

std::vector<Finding> findings();
void clear_findings();

std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace mfa::driver
