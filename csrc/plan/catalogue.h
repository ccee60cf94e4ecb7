// metal/instances.def and metal/unit/instances.def as rows: what kernels exist, and what a launch must know of each.
#pragma once

#include "../metal/geometry.h"
#include "plan/plan.h"

namespace mfa {

enum class Kind {
  forward,
  backward_delta,
  backward_dkdv,
  backward_dq,
  backward_dq_from_ds,
  backward_dbias,
  backward_dslopes,
  mask_blocks,
  append,
  decode,
  combine,
  tile_map_of_queries,
  tile_map_of_keys,
  tile_map_of_packed
};

struct Instance {
  const char* name;  // host name in every kernel library
  Kind kind;
  DType dtype;
  int head_dim, value_dim;  // buckets; 0 where the kernel takes any
  int simdgroups;
  int rows;   // that a threadgroup owns: queries; keys for backward_dkdv; rows of the bias for backward_dbias,
              // mask_blocks
  int block;  // rows of the other side per step; columns of the bias that a threadgroup owns for the latter two
  int threadgroup_memory;  // bytes
  Path path = staged;
  Memory memory = split;  // forward
  Own own = held;         // backward_dq

  constexpr int threads() const { return 32 * simdgroups; }
};

inline constexpr Instance kInstances[] = {
#define FORWARD(dtype, path, memory, head_dim, value_dim, simdgroups, row_tiles, block_keys)                     \
  {"forward_" #dtype "_d" #head_dim "_v" #value_dim "_" #path "_s" #simdgroups "_r" #row_tiles "_k" #block_keys, \
   Kind::forward,                                                                                                \
   DType::dtype,                                                                                                 \
   head_dim,                                                                                                     \
   value_dim,                                                                                                    \
   simdgroups,                                                                                                   \
   rows_of(Path::path, head_dim, simdgroups, row_tiles),                                                         \
   block_keys,                                                                                                   \
   forward_threadgroup_bytes(Path::path, Memory::memory, head_dim, value_dim,                                    \
                             rows_of(Path::path, head_dim, simdgroups, row_tiles), block_keys,                   \
                             element_size(DType::dtype)),                                                        \
   Path::path,                                                                                                   \
   Memory::memory},
#define BACKWARD_DELTA(dtype, simdgroups)     \
  {"backward_delta_" #dtype "_s" #simdgroups, \
   Kind::backward_delta,                      \
   DType::dtype,                              \
   0,                                         \
   0,                                         \
   simdgroups,                                \
   4 * simdgroups,                            \
   0,                                         \
   0},
#define BACKWARD_DKDV(dtype, path, head_dim, value_dim, simdgroups, row_tiles, block_queries)                 \
  {"backward_dkdv_" #dtype "_d" #head_dim "_v" #value_dim MFA_IN_NAME_##path "_s" #simdgroups "_r" #row_tiles \
                                                                             "_q" #block_queries,             \
   Kind::backward_dkdv,                                                                                       \
   DType::dtype,                                                                                              \
   head_dim,                                                                                                  \
   value_dim,                                                                                                 \
   simdgroups,                                                                                                \
   backward_dkdv_rows(Path::path, head_dim, value_dim, simdgroups, row_tiles),                                \
   block_queries,                                                                                             \
   backward_dkdv_threadgroup_bytes(Path::path, head_dim, value_dim, simdgroups, row_tiles, block_queries,     \
                                   element_size(DType::dtype)),                                               \
   Path::path},
#define BACKWARD_DQ(dtype, path, own, head_dim, value_dim, simdgroups, row_tiles, block_keys)                        \
  {"backward_dq_" #dtype "_d" #head_dim "_v" #value_dim "_" #own MFA_IN_NAME_##path "_s" #simdgroups "_r" #row_tiles \
                                                                                    "_k" #block_keys,                \
   Kind::backward_dq,                                                                                                \
   DType::dtype,                                                                                                     \
   head_dim,                                                                                                         \
   value_dim,                                                                                                        \
   simdgroups,                                                                                                       \
   backward_dq_rows(Path::path, head_dim, simdgroups, row_tiles),                                                    \
   block_keys,                                                                                                       \
   backward_dq_threadgroup_bytes(Path::path, head_dim, value_dim, simdgroups, row_tiles, block_keys,                 \
                                 element_size(DType::dtype)),                                                        \
   Path::path,                                                                                                       \
   split,                                                                                                            \
   Own::own},
#define BACKWARD_DQ_FROM_DS(dtype, head_dim, simdgroups, query_tiles, block_keys)                    \
  {"backward_dq_from_ds_" #dtype "_d" #head_dim "_s" #simdgroups "_q" #query_tiles "_k" #block_keys, \
   Kind::backward_dq_from_ds,                                                                        \
   DType::dtype,                                                                                     \
   head_dim,                                                                                         \
   0,                                                                                                \
   simdgroups,                                                                                       \
   8 * query_tiles * simdgroups,                                                                     \
   block_keys,                                                                                       \
   backward_dq_from_ds_threadgroup_bytes(head_dim, block_keys, element_size(DType::dtype))},
#define BACKWARD_DBIAS(dtype, path, head_dim, value_dim, simdgroups, block_keys)                                 \
  {"backward_dbias_" #dtype "_d" #head_dim "_v" #value_dim MFA_IN_NAME_##path "_s" #simdgroups "_k" #block_keys, \
   Kind::backward_dbias,                                                                                         \
   DType::dtype,                                                                                                 \
   head_dim,                                                                                                     \
   value_dim,                                                                                                    \
   simdgroups,                                                                                                   \
   backward_dbias_rows(Path::path, simdgroups),                                                                  \
   block_keys,                                                                                                   \
   simdgroups * block_keys * int(sizeof(float)),                                                                 \
   Path::path},
#define BACKWARD_DSLOPES(dtype, simdgroups) \
  {"backward_dslopes_" #dtype "_s" #simdgroups, Kind::backward_dslopes, DType::dtype, 0, 0, simdgroups, 0, 0, 0},
#define MASK_BLOCKS(dtype, simdgroups)     \
  {"mask_blocks_" #dtype "_s" #simdgroups, \
   Kind::mask_blocks,                      \
   DType::dtype,                           \
   0,                                      \
   0,                                      \
   simdgroups,                             \
   kMaskBlockRows,                         \
   kMaskBlockRows,                         \
   0},
#define DECODE(dtype, path, head_dim, value_dim, simdgroups, row_tiles, block_keys)                                \
  {"decode_" #dtype "_d" #head_dim "_v" #value_dim "_" #path "_s" #simdgroups "_r" #row_tiles "_k" #block_keys,    \
   Kind::decode,                                                                                                   \
   DType::dtype,                                                                                                   \
   head_dim,                                                                                                       \
   value_dim,                                                                                                      \
   simdgroups,                                                                                                     \
   rows_of(Path::path, head_dim, simdgroups, row_tiles),                                                           \
   block_keys,                                                                                                     \
   decode_threadgroup_bytes(Path::path, head_dim, value_dim, rows_of(Path::path, head_dim, simdgroups, row_tiles), \
                            block_keys, element_size(DType::dtype)),                                               \
   Path::path},
#define APPEND(dtype, simdgroups) \
  {"append_" #dtype "_s" #simdgroups, Kind::append, DType::dtype, 0, 0, simdgroups, simdgroups, 0, 0},
#define COMBINE(dtype, threads) \
  {"combine_" #dtype "_t" #threads, Kind::combine, DType::dtype, 0, 0, threads / 32, 0, 0, 0},
#define TILE_MAP(of, simdgroups) \
  {"tile_map_of_" #of "_s" #simdgroups, Kind::tile_map_of_##of, DType::f16, 0, 0, simdgroups, 0, 0, 4 * simdgroups},
#define MFA_INSTANCES_WITH_UNIT
#include "../metal/instances.def"
};

}  // namespace mfa
