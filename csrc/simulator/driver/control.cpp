#include "control.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include "findings.h"
#include "runtime.h"
#include "settings.h"
#include "stream.h"

using namespace mfa::driver;

namespace {

template <typename Change>
void change(Change&& change) {
  Settings s = settings();
  change(s);
  change_settings(s);
}

struct Saved {
  Settings settings;
  Mode mode;
};

template <typename Work>
int caught(char** error, Work&& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    if (error != nullptr) *error = strdup(e.what());
  } catch (...) {
    if (error != nullptr) *error = strdup("an exception that is no std::exception");
  }
  return 1;
}

}  // namespace

void mfa_driver_free(char* text) { free(text); }

void mfa_driver_set_mode(int mode) { set_mode(static_cast<Mode>(mode)); }
void mfa_driver_set_execution(int execution) {
  change([=](Settings& s) { s.execution = static_cast<Execution>(execution); });
}
void mfa_driver_set_device(int present, int family, int os_major, int os_minor) {
  change([=](Settings& s) {
    s.present = present != 0;
    s.has_default = present == 1;
    s.family = family;
    s.os_major = os_major;
    s.os_minor = os_minor;
  });
}
void mfa_driver_set_variant(char letter) {
  change([=](Settings& s) { s.variant = letter; });
}
void mfa_driver_set_device_count(int count) {
  change([=](Settings& s) { s.devices = count; });
}
void mfa_driver_set_kernel_library(const char* path) {
  change([=](Settings& s) { s.kernel_library = path; });
}
void mfa_driver_set_checks(uint32_t checks, uint64_t seed) {
  change([=](Settings& s) {
    s.checks = checks;
    s.seed = seed;
  });
}
void mfa_driver_require_all_constants(int required) {
  change([=](Settings& s) { s.all_constants = required != 0; });
}

void* mfa_driver_save_settings() { return new Saved{settings(), current_mode()}; }
void mfa_driver_restore_settings(void* saved) {
  const std::unique_ptr<Saved> s(static_cast<Saved*>(saved));
  change_settings(s->settings);
  set_mode(s->mode);
}

char* mfa_driver_findings() {
  std::string text;
  for (const Finding& finding : findings()) text += finding.text + "\n";
  return strdup(text.c_str());
}
void mfa_driver_clear_findings() { clear_findings(); }

char* mfa_driver_live_objects() { return strdup(live_objects().c_str()); }
uint64_t mfa_driver_live_count() { return live_count(); }
uint64_t mfa_driver_message_count() { return message_count(); }
void mfa_driver_raise_at(const char* selector) { raise_at(selector); }
uint64_t mfa_driver_allocated_bytes() { return allocated_bytes(); }
char* mfa_driver_methods() { return strdup(list_methods().c_str()); }
char* mfa_driver_compilations() {
  std::string text;
  for (const auto& [key, count] : compilations()) text += std::to_string(count) + " " + key + "\n";
  return strdup(text.c_str());
}
void mfa_driver_forget_compilations() { forget_compilations(); }
char* mfa_driver_compiled_sources() {
  std::string text;
  for (const std::string& source : compiled_sources()) text += source + "\n";
  return strdup(text.c_str());
}

uint64_t mfa_driver_launch_count() { return launches().size(); }
int mfa_driver_launch_at(uint64_t i, mfa_driver_launch* out) {
  const auto all = launches();
  if (i >= all.size()) return 0;
  const LaunchRecord& record = all[i];
  *out = {};
  snprintf(out->kernel, sizeof out->kernel, "%s", record.kernel.c_str());
  for (int k = 0; k < 3; ++k) {
    out->threadgroups[k] = static_cast<uint32_t>((&record.groups.width)[k]);
    out->threads_per_threadgroup[k] = static_cast<uint32_t>((&record.threads.width)[k]);
  }
  out->threadgroup_memory = record.threadgroup_memory;
  out->counters = record.counters;
  return 1;
}
void mfa_driver_clear_launches() { clear_launches(); }

void* mfa_driver_new_buffer(uint64_t size, void* memory) {
  if (size == 0) return nullptr;
  call.caller = __builtin_return_address(0);
  return give(make<Buffer>(torch_device(), size, 0, memory, HeldBlock()));
}
void* mfa_driver_contents(void* buffer) {
  const auto* b = dynamic_cast<const Buffer*>(find(buffer));
  return b == nullptr || b->dead ? nullptr : b->contents;
}
void mfa_driver_release(void* object) {
  if (Object* o = find(object)) client_release(*o);
}

void* mfa_driver_stream() { return &default_stream(); }
int mfa_driver_stream_is_lazy() { return execution() == Execution::lazy; }
void* mfa_driver_stream_encoder(void* stream) { return static_cast<Stream*>(stream)->encoder(); }
int mfa_driver_stream_run(void* stream, void (*work)(void*), void* context, char** error) {
  return caught(error, [&] { static_cast<Stream*>(stream)->run(context, work); });
}
int mfa_driver_stream_synchronize(void* stream, char** error) {
  return caught(error, [&] { static_cast<Stream*>(stream)->synchronize(); });
}
int mfa_driver_stream_settle(void* stream, char** error) {
  return caught(error, [&] { static_cast<Stream*>(stream)->settle(); });
}
