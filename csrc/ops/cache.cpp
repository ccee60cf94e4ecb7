#include "ops/cache.h"

#include "ops/checks.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Strides strides_of(const Tensor& scale) { return {scale.stride(0), scale.stride(1), scale.stride(2)}; }

void check_tensor(const char* name, const Tensor& cache, const Tensor& query, const Tensor& key) {
  refuse_unless(cache.dim() == 4, name, " has ", cache.dim(), " dimensions; it must have 4");
  refuse_unless(cache.device() == query.device(), name, " is on another device than query; they must be on the same");
  for (int i = 0; i < 3; ++i)
    refuse_unless(cache.size(i) == key.size(i), name, " must have the sizes of key_cache but for the last one");
  refuse_unless(cache.size(3) >= 1 && cache.size(3) <= kLatentHeadDim, name, " has head dimension ", cache.size(3),
                "; it must be within 1 ... ", kLatentHeadDim);
  refuse_unless(cache.size(3) == 1 || cache.stride(3) == 1, name, " must have a contiguous last dimension");
}

void check_scale(const char* name, const std::optional<Tensor>& scale, const Tensor& key, Cache::Format format) {
  const bool is_quantized = format != Cache::Format::same_dtype;
  refuse_unless(scale.has_value() == is_quantized, name, " must be given for a quantized cache, and for no other");
  if (!scale) return;
  refuse_unless(scale->scalar_type() == ScalarType::Float && scale->device() == key.device() && scale->dim() == 3 &&
                    scale->size(0) == key.size(0) && scale->size(1) == key.size(1) && scale->size(2) == key.size(2),
                name, " must be float32 with the first three sizes of key_cache");
}

Cache::Format format_of(const char* name, const Tensor& cache, const Tensor& query) {
  if (cache.scalar_type() == query.scalar_type()) return Cache::Format::same_dtype;
  if (cache.scalar_type() == ScalarType::Char) return Cache::Format::int8;
  if (cache.scalar_type() == ScalarType::Float8_e5m2) return Cache::Format::e5m2;
  refuse_unless(cache.scalar_type() == ScalarType::Float8_e4m3fn, name,
                " must have the dtype of query, int8, float8_e4m3fn or float8_e5m2");
  return Cache::Format::e4m3;
}

}  // namespace

void check_int32(const char* name, const Tensor& tensor, const Tensor& query, std::int64_t entries, int dim) {
  refuse_unless(tensor.device() == query.device() && tensor.scalar_type() == ScalarType::Int && tensor.dim() == dim &&
                    tensor.size(0) == entries,
                name, " must be int32, on the device of query, and have one row per batch entry");
}

Cache checked_cache(const Qkv& qkv, const CacheTerms& terms, std::int64_t entries) {
  const auto& [query, key, value] = qkv;
  refuse_unless(query.dim() == 4, "query has ", query.dim(), " dimensions; it must have 4");
  Cache cache;
  check_tensor("key_cache", key, query, key);
  check_tensor("value_cache", value, query, key);
  cache.key_format = format_of("key_cache", key, query);
  cache.value_format = format_of("value_cache", value, query);
  check_scale("key_scale", terms.key_scale, key, cache.key_format);
  check_scale("value_scale", terms.value_scale, key, cache.value_format);
  if (terms.key_scale) cache.key_scale_strides = strides_of(*terms.key_scale);
  if (terms.value_scale) cache.value_scale_strides = strides_of(*terms.value_scale);
  if (terms.block_table) {
    check_int32("block_table", *terms.block_table, query, entries, 2);
    cache.page_size = key.size(2);
    cache.pages = key.size(0);
    cache.pages_per_sequence = terms.block_table->size(1);
    const bool is_one_page = cache.pages_per_sequence == 1;
    refuse_unless(is_one_page || (cache.page_size >= 8 && cache.page_size % 8 == 0), "key_cache has pages of ",
                  cache.page_size, " tokens; a page must have a multiple of 8");
  } else {
    refuse_unless(key.size(0) == query.size(0), "key_cache has batch size ", key.size(0),
                  "; it must be that of query, ", query.size(0));
  }
  return cache;
}

std::int64_t capacity_of(const Tensor& key, const Cache& cache) {
  if (cache.page_size == 0) return key.size(2);
  return cache.pages == 0 ? 0 : cache.page_size * cache.pages_per_sequence;
}

bool rows_aligned(const Tensor& cache) {
  for (int i = 0; i < 3; ++i)
    if (cache.stride(i) * cache.element_size() % 16 != 0) return false;
  return true;
}

}  // namespace mfa
