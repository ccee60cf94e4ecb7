// A problem, checked and made canonical: what the plans of forward and backward start from.
#pragma once

#include "plan/plan.h"

namespace mfa {

// Smaller dimensions run in the bucket above, padded with zeros.
struct Bucket {
  int head_dim, value_dim;
};

struct Canonical {
  AttentionParams params;
  Bucket bucket;
  bool aligned;     // every row of query, key, value and out starts at a multiple of 16 bytes
  bool has_window;  // the window hides a pair
};

// Whether rows are aligned and D and Dv are the bucket's: else a kernel needs code for tails.
inline bool is_exact(const Problem& problem, const Canonical& canonical) {
  return canonical.aligned && problem.head_dim == canonical.bucket.head_dim &&
         problem.value_dim == canonical.bucket.value_dim;
}

// Throws std::invalid_argument.
Canonical canonical(const Problem& problem);

// Every row starts at a multiple of 16 bytes, if the first one does; and no two are so far apart that kernels would
// need 64 bits for an offset within a block.
bool rows_aligned(const Problem& problem, const Strides& strides, std::int64_t heads, std::int64_t length);

void require(bool condition, const char* message);  // else throws std::invalid_argument

}  // namespace mfa
