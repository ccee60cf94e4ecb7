// Plans of the decode kernels.
#pragma once

#include "plan/catalogue.h"
#include "plan/problem.h"

namespace mfa {

// Whether they run a problem, rather than that tile of a forward kernel.
bool packs_rows(const Problem& problem, const Canonical& start, const Instance& forward);

Plan plan_decode(const Problem& problem, const Canonical& start);

}  // namespace mfa
