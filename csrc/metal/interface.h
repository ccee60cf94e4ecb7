// The backend of this process for Python, as a short C ABI (ctypes): everything is UTF-8 text.
#pragma once

#define MFA_EXPORT extern "C" __attribute__((visibility("default")))

// A JSON object: torch, name, architecture, generation, family, system, why_not (a list of reasons), and, if that is
// empty, metallib, archive, pipelines_compiled and notes (a list, for the log). Never null; free it with
// mfa_metal_free().
MFA_EXPORT char* mfa_metal_info();

// Compiles one kernel, or finds it in the archive. Returns null, or why it failed, to be freed with mfa_metal_free().
// Any number of threads may call it; different kernels are compiled at the same time.
MFA_EXPORT char* mfa_metal_precompile(const char* kernel, const char* const* constant_names,
                                      const unsigned char* constant_values, int constant_count);

// Forgets the compiled pipelines, in memory and on disk. Returns like mfa_metal_precompile().
MFA_EXPORT char* mfa_metal_clear_cache();

MFA_EXPORT void mfa_metal_free(char* text);
