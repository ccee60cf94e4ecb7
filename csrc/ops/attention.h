// The ops as the dispatcher calls them; a file per family says what each takes and returns. All tensors on MPS, or on
// the CPU inside mfa.simulate(). All throw std::runtime_error with the sentence that users read.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

namespace mfa {

// `stack` holds the arguments in the order of the schema (csrc/library.cpp), and gets the results in their place.
using BoxedKernel = void(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count);

BoxedKernel attention_forward, attention_forward_with_correction, attention_backward;
BoxedKernel attention_varlen_forward, attention_varlen_forward_with_correction, attention_varlen_backward;
BoxedKernel attention_append, attention_decode, attention_varlen_paged;

}  // namespace mfa

// Knobs of the process, for Python (ctypes), tests and benchmarks. Each returns the value that it replaces.

// Scratch that one backward pass may take, in bytes: 64 MiB, until set. A smaller limit costs more launches; below what
// one key head's group needs (4 bytes per score, per query head), dQ is computed without scratch. Negative: as 0.
extern "C" __attribute__((visibility("default"))) std::int64_t mfa_set_scratch_limit(std::int64_t bytes);

// The backward pass's mode, see BackwardMode in plan.h: 5 or 7 GEMMs; anything else, as until set: as tuning.def says.
extern "C" __attribute__((visibility("default"))) int mfa_set_backward_mode(int mode);
