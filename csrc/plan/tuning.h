// tuning.def as functions: which instance and which algorithm a problem gets.
#pragma once

#include <optional>

#include "plan/catalogue.h"
#include "plan/problem.h"

namespace mfa {

// The first row for this kind of kernel that serves the family and the bucket; null if there is none. is_exact: see
// problem.h. A kind that has only paths with code for tails, or doesn't care for Dv,
// ignores that argument.
const Instance* choose(Kind kind, const Problem& problem, Bucket bucket, bool is_exact = false);

// The one instance of a kind, or of a kind and dtype, that tuning.def has no choice of.
const Instance& the_instance(Kind kind, std::optional<DType> dtype = std::nullopt);

// Whether mfa_prefer_instance() has named it.
bool is_preferred(const Instance& instance);

// The decode kernel for so many rows: the smallest tile that holds them, or else the largest.
const Instance& choose_decode(const Problem& problem, Bucket bucket, std::int64_t rows);

// The mode that a family runs best in a bucket.
BackwardMode default_mode(Family family, Bucket bucket);

// Whether to run mask_blocks first.
bool classifies_mask(const Problem& problem);

}  // namespace mfa

// For the benchmark, which compares what instances.def has: from now on this instance runs wherever it can, whatever
// tuning.def says; null forgets all of them. Returns 0 for a name that isn't there. Not thread-safe against running
// ops.
extern "C" __attribute__((visibility("default"))) int mfa_prefer_instance(const char* name);
