// metal/instances.def as rows: what kernels exist, and what a launch must know of each.
#pragma once

#include "../metal/geometry.h"
#include "plan.h"

namespace mfa {

struct Instance {
  const char* name;  // host name in every kernel library
  DType dtype;
  Path path;
  Memory memory;
  int head_dim, value_dim;  // buckets
  int simdgroups, row_tiles, block_keys;

  constexpr int threads() const { return 32 * simdgroups; }
  constexpr int block_queries() const { return 8 * row_tiles * simdgroups; }
  constexpr int threadgroup_memory() const {
    return forward_threadgroup_bytes(path, memory, head_dim, value_dim, block_queries(), block_keys,
                                     element_size(dtype));
  }
};

inline constexpr Instance kForwardInstances[] = {
#define FORWARD(dtype, path, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys)                     \
  {"forward_" #dtype "_d" #head_dim "_v" #value_dim "_" #path "_s" #simdgroups "_r" #row_tiles "_k" #block_keys, \
   DType::dtype,                                                                                                 \
   Path::path,                                                                                                   \
   Memory::memory,                                                                                               \
   head_dim,                                                                                                     \
   value_dim,                                                                                                    \
   simdgroups,                                                                                                   \
   row_tiles,                                                                                                    \
   block_keys},
#include "../metal/instances.def"
};

}  // namespace mfa
