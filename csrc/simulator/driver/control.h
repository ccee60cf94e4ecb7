// The driver from outside, as a C ABI: for tests (ctypes), for mfa.simulate(), and for the stand-in `mps` device.
#pragma once

#include <stdint.h>

#include "../engine.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// Texts are malloc'ed; free them with this.
void mfa_driver_free(char* text);

// mode: 0 record, 1 throw std::runtime_error from the wrong call, 2 abort.
void mfa_driver_set_mode(int mode);
// execution: 0 eager, 1 lazy (when someone waits), 2 nothing (validate only).
void mfa_driver_set_execution(int execution);
// Not present until this says so; with `present` 2 the GPU is listed, but Metal has no default, as it is in a process
// without Core Graphics.
void mfa_driver_set_device(int present, int family, int os_major, int os_minor);
void mfa_driver_set_variant(char letter);  // the last one of the architecture's name
// Of two devices the first is the system's default, and torch's stream is on the second. Before the stream's first use.
void mfa_driver_set_device_count(int count);
void mfa_driver_set_kernel_library(const char* path);
void mfa_driver_set_checks(uint32_t checks, uint64_t seed);  // MFA_SIM_CHECK_*; for instrumented libraries
// 0: functions may be specialised with some constants of their library missing; for libraries of unrelated kernels.
void mfa_driver_require_all_constants(int required);

// All of the above, to be put back later; the second call frees them.
void* mfa_driver_save_settings(void);
void mfa_driver_restore_settings(void* saved);

char* mfa_driver_findings(void);  // one a line, "text [rule]"
void mfa_driver_clear_findings(void);

char* mfa_driver_live_objects(void);  // one a line, with the place of creation
uint64_t mfa_driver_live_count(void);
uint64_t mfa_driver_message_count(void);         // objc_msgSend, so far
void mfa_driver_raise_at(const char* selector);  // the next such message raises an NSException
uint64_t mfa_driver_allocated_bytes(void);
char* mfa_driver_methods(void);       // "-[MTLBuffer length] u64:", one a line
char* mfa_driver_compilations(void);  // "count key", one a line
void mfa_driver_forget_compilations(void);
char* mfa_driver_compiled_sources(void);  // the first line of what each newLibraryWithSource was given, one a line

struct mfa_driver_launch {
  char kernel[256];
  uint32_t threadgroups[3], threads_per_threadgroup[3];
  uint64_t threadgroup_memory;
  mfa_sim_counters counters;
};
uint64_t mfa_driver_launch_count(void);
int mfa_driver_launch_at(uint64_t i, mfa_driver_launch* launch);  // 0: no such launch
void mfa_driver_clear_launches(void);

// An MTLBuffer, owned by the caller. `memory` null: fresh, else a view of it, which page alignment does not matter for.
// Null when size is 0.
void* mfa_driver_new_buffer(uint64_t size, void* memory);
void* mfa_driver_contents(void* buffer);  // null for what is no live buffer
void mfa_driver_release(void* object);

// torch's Metal stream: an encoder shared by all ops, ended by synchronize. 0, or 1 with a message for the caller to
// free.
void* mfa_driver_stream(void);
int mfa_driver_stream_is_lazy(void);
void* mfa_driver_stream_encoder(void* stream);  // within mfa_driver_stream_run only
int mfa_driver_stream_run(void* stream, void (*work)(void*), void* context, char** error);
int mfa_driver_stream_synchronize(void* stream, char** error);
int mfa_driver_stream_settle(void* stream, char** error);  // what was encoded has run, but the encoder may stay open

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
