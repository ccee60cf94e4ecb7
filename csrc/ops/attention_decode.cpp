// Few queries over a dense or paged cache, of the query's dtype or quantized.
#include <torch/csrc/stable/ops.h>

#include "ops/attention.h"
#include "ops/checks.h"
#include "ops/operands.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the op takes besides query [B,Hq,Lq,D] and the caches, key and value [B,Hkv,capacity,D|Dv] or
// [pages,Hkv,page,D|Dv], in the schema's order.
struct Terms {
  Tensor cache_lengths;                          // int32 [B]: live keys
  std::optional<Tensor> block_table;             // int32 [B,pages_per_sequence]
  std::optional<Tensor> key_scale, value_scale;  // of int8 and float8_e4m3fn: float32, the first three sizes of key
  Features features;
  std::int64_t num_splits;  // 0: chosen by the plan

  static Terms take(Stack& stack) {
    return {
        .cache_lengths = stack.take<Tensor>(),
        .block_table = stack.take<std::optional<Tensor>>(),
        .key_scale = stack.take<std::optional<Tensor>>(),
        .value_scale = stack.take<std::optional<Tensor>>(),
        .features = stack.take<Features>(),
        .num_splits = stack.take<std::int64_t>(),
    };
  }
};

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

// Checked.
Cache cache_of(const Qkv& qkv, const Terms& terms) {
  const auto& [query, key, value] = qkv;
  refuse_unless(query.dim() == 4, "query has ", query.dim(), " dimensions; it must have 4");
  Cache cache;
  check_cache("key_cache", key, query, key);
  check_cache("value_cache", value, query, key);
  cache.format = format_of(key, query);
  cache.splits = terms.num_splits;
  refuse_unless(cache.splits >= 0, "num_splits is ", cache.splits, "; it must be 0 (automatic) or more");
  check_int32("cache_lengths", terms.cache_lengths, query, 1);
  const bool is_quantized = cache.format != Cache::Format::same_dtype;
  check_scale("key_scale", terms.key_scale, key, is_quantized);
  check_scale("value_scale", terms.value_scale, key, is_quantized);
  if (is_quantized) {
    cache.key_scale_strides = strides_of(*terms.key_scale);
    cache.value_scale_strides = strides_of(*terms.value_scale);
  }
  if (terms.block_table) {
    check_int32("block_table", *terms.block_table, query, 2);
    cache.page_size = key.size(2);
    cache.pages = key.size(0);
    cache.pages_per_sequence = terms.block_table->size(1);
    refuse_unless(cache.page_size >= 8 && cache.page_size % 8 == 0, "key_cache has pages of ", cache.page_size,
                  " tokens; a page must have a multiple of 8");
  } else {
    refuse_unless(key.size(0) == query.size(0), "key_cache has batch size ", key.size(0),
                  "; it must be that of query, ", query.size(0));
  }
  return cache;
}

// Their problem, checked and bound.
Operands operands_of(const Qkv& qkv, const Terms& terms, const Cache& cache) {
  check_features(qkv, terms.features, qkv.query.size(0));
  Operands operands(qkv, terms.features);
  Problem& problem = operands.problem;
  if (terms.block_table) {
    problem.key_length = cache.pages == 0 ? 0 : cache.page_size * cache.pages_per_sequence;
    operands.read_contiguous(kBlockTable, *terms.block_table);
  }
  operands.read_contiguous(kKeyLengths, terms.cache_lengths);
  if (terms.key_scale) operands.read(kKeyScale, *terms.key_scale);
  if (terms.value_scale) operands.read(kValueScale, *terms.value_scale);
  // A page starts at a multiple of 16 bytes too.
  const std::int64_t unit = 16 / qkv.key.element_size();
  for (const Strides& strides : {problem.key_strides, problem.value_strides})
    for (std::int64_t stride : strides) problem.aligned = problem.aligned && stride % unit == 0;
  return operands;
}

// Returns out [B,Hq,Lq,Dv] and lse [B,Hq,Lq] float32.
std::tuple<Tensor, Tensor> decode(const Qkv& qkv, const Terms& terms) {
  const Cache cache = cache_of(qkv, terms);
  const Tensor& query = qkv.query;
  Operands operands = operands_of(qkv, terms, cache);
  operands.problem.cache = cache;
  const Tensor out = allocate_rows(query, qkv.value.size(3), query.scalar_type());
  const Tensor lse = allocate(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  operands.write_results(out, lse);
  operands.run(plan_forward(operands.problem));
  return {out, lse};
}

}  // namespace

void attention_decode(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&decode, stack, argument_count, result_count);
}

}  // namespace mfa
