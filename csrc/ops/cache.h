// What the ops of caches have in common: a cache's checks, and how it is bound.
#pragma once

#include "ops/operands.h"

namespace mfa {

// Which tokens of key [B,Hkv,capacity,D] and value [B,Hkv,capacity,Dv] are meant; of pages, [pages,Hkv,page,D|Dv].
struct CacheTerms {
  const std::optional<torch::stable::Tensor>& block_table;             // int32 [B,pages_per_sequence]
  const std::optional<torch::stable::Tensor>&key_scale, &value_scale;  // of 8 bits: float32, the first sizes of key
};

// Its problem's, of so many batch entries or packed sequences. Throws std::runtime_error for what kernels can't read,
// or write.
Cache checked_cache(const Qkv& qkv, const CacheTerms& terms, std::int64_t entries);

// int32, with one row per batch entry or sequence; else throws std::runtime_error.
void check_int32(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& query,
                 std::int64_t entries, int dim);

// Tokens that a batch entry may have.
std::int64_t capacity_of(const torch::stable::Tensor& key, const Cache& cache);

// Whether every row of a cache starts at a multiple of 16 bytes, if the first one does; pages too.
bool rows_aligned(const torch::stable::Tensor& cache);

}  // namespace mfa
