// Before a loop over fragments, or anything else that must lie in registers: an array that is indexed by a loop left
// rolled lies in memory. `#pragma unroll` is a hint, which compilers drop where the body is large.
#pragma once

#define MFA_UNROLL _Pragma("clang loop unroll(full)")

// So many steps at a time.
#define MFA_UNROLL_BY(count) MFA_PRAGMA(clang loop unroll_count(count))
#define MFA_PRAGMA(text) _Pragma(#text)
