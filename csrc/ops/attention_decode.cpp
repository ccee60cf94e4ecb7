// Few queries over a dense or paged cache, of the query's dtype or quantized.
#include <torch/csrc/stable/ops.h>

#include "ops/attention.h"
#include "ops/operands.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Strides strides_of(const Tensor& scale) { return {scale.stride(0), scale.stride(1), scale.stride(2)}; }

Cache::Format format_of(const Tensor& key, const Tensor& query) {
  if (key.scalar_type() == query.scalar_type()) return Cache::Format::same_dtype;
  if (key.scalar_type() == ScalarType::Char) return Cache::Format::int8;
  refuse_unless(key.scalar_type() == ScalarType::Float8_e4m3fn,
                "key_cache must have the dtype of query, int8 or float8_e4m3fn");
  return Cache::Format::float8;
}

void check_cache(const char* name, const Tensor& cache, const Tensor& query, const Tensor& key) {
  refuse_unless(cache.dim() == 4, name, " has ", cache.dim(), " dimensions; it must have 4");
  refuse_unless(cache.device() == query.device(), name, " is on another device than query; they must be on the same");
  refuse_unless(cache.scalar_type() == key.scalar_type(), name, " must have the dtype of key_cache");
  for (int i = 0; i < 3; ++i)
    refuse_unless(cache.size(i) == key.size(i), name, " must have the sizes of key_cache but for the last one");
  refuse_unless(cache.size(3) >= 1 && cache.size(3) <= kLargestHeadDim, name, " has head dimension ", cache.size(3),
                "; it must be within 1 ... ", kLargestHeadDim);
  refuse_unless(cache.size(3) == 1 || cache.stride(3) == 1, name, " must have a contiguous last dimension");
}

void check_int32(const char* name, const Tensor& tensor, const Tensor& query, int dim) {
  refuse_unless(tensor.device() == query.device() && tensor.scalar_type() == ScalarType::Int && tensor.dim() == dim &&
                    tensor.size(0) == query.size(0),
                name, " must be int32, on the device of query, and have one row per batch entry");
}

void check_scale(const char* name, const std::optional<Tensor>& scale, const Tensor& key, bool is_quantized) {
  refuse_unless(scale.has_value() == is_quantized, name, " must be given for a quantized cache, and for no other");
  if (!scale) return;
  refuse_unless(scale->scalar_type() == ScalarType::Float && scale->device() == key.device() && scale->dim() == 3 &&
                    scale->size(0) == key.size(0) && scale->size(1) == key.size(1) && scale->size(2) == key.size(2),
                name, " must be float32 with the first three sizes of key_cache");
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_lengths,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& key_scale,
    const std::optional<Tensor>& value_scale, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, double scale, std::optional<std::int64_t> window_left,
    std::optional<std::int64_t> window_right, double softcap, std::int64_t num_splits) {
  refuse_unless(query.dim() == 4, "query has ", query.dim(), " dimensions; it must have 4");
  Cache cache;
  check_cache("key_cache", key_cache, query, key_cache);
  check_cache("value_cache", value_cache, query, key_cache);
  cache.format = format_of(key_cache, query);
  cache.splits = num_splits;
  refuse_unless(num_splits >= 0, "num_splits is ", num_splits, "; it must be 0 (automatic) or more");
  check_int32("cache_lengths", cache_lengths, query, 1);
  const bool is_quantized = cache.format != Cache::Format::same_dtype;
  check_scale("key_scale", key_scale, key_cache, is_quantized);
  check_scale("value_scale", value_scale, key_cache, is_quantized);
  std::int64_t capacity = key_cache.size(2);
  if (block_table) {
    check_int32("block_table", *block_table, query, 2);
    cache.page_size = key_cache.size(2);
    cache.pages = key_cache.size(0);
    cache.pages_per_sequence = block_table->size(1);
    refuse_unless(cache.page_size >= 8 && cache.page_size % 8 == 0, "key_cache has pages of ", cache.page_size,
                  " tokens; a page must have a multiple of 8");
    capacity = cache.pages == 0 ? 0 : cache.page_size * cache.pages_per_sequence;
  } else {
    refuse_unless(key_cache.size(0) == query.size(0), "key_cache has batch size ", key_cache.size(0),
                  "; it must be that of query, ", query.size(0));
  }
  const std::optional<Tensor> none;
  const Inputs inputs{query, key_cache,   value_cache,  none,    sinks, alibi_slopes,
                      scale, window_left, window_right, softcap, 0,     none};
  check_features(inputs);

  Operands operands(inputs);
  Problem& problem = operands.problem;
  problem.key_length = capacity;
  // A page starts at a multiple of 16 bytes too.
  const std::int64_t unit = is_quantized ? 16 : 16 / element_size(problem.dtype);
  for (const Strides& strides : {problem.key_strides, problem.value_strides})
    for (std::int64_t stride : strides) problem.aligned = problem.aligned && stride % unit == 0;
  operands.read_contiguous(kKeyLengths, cache_lengths);
  if (block_table) operands.read_contiguous(kBlockTable, *block_table);
  if (is_quantized) {
    operands.read(kKeyScale, *key_scale);
    operands.read(kValueScale, *value_scale);
    cache.key_scale_strides = strides_of(*key_scale);
    cache.value_scale_strides = strides_of(*value_scale);
  }
  const Tensor out = allocate_rows(query, value_cache.size(3), query.scalar_type());
  const Tensor lse = allocate(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  problem.out_strides = operands.write_rows(kOut, out);
  operands.write(kLse, lse);
  const Plan plan = plan_decode(problem, cache);
  std::optional<Tensor> partial_lse, partial_out;
  if (plan.params.splits > 1) {
    const std::int64_t parts = plan.params.splits, batch = query.size(0), heads = query.size(1), rows = query.size(2);
    partial_lse = allocate(query, {parts, batch, heads, rows}, ScalarType::Float);
    partial_out = allocate(query, {parts, batch, heads, rows, value_cache.size(3)}, ScalarType::Float);
    operands.write(kPartialLse, *partial_lse);
    operands.write(kPartialOut, *partial_out);
  }
  operands.run(plan);
  return {out, lse};
}

}  // namespace mfa
