// Few queries over a dense or paged cache, of the query's dtype or quantized.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

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
  Tensor cache_lengths;                          // int32 [B]: slots up to the last live key
  std::optional<Tensor> block_table;             // int32 [B,pages_per_sequence]
  std::optional<Tensor> key_scale, value_scale;  // of 8-bit numbers: float32, the first three sizes of key
  std::optional<Tensor> attn_mask;               // bool [B|1,Hq|1,Lq,K], over the last K live keys
  std::optional<Tensor> cache_leftpad;           // int32 [B]: slot of the first live key
  Features features;
  std::int64_t num_splits;  // 0: chosen by the plan

  static Terms take(Stack& stack) {
    return {
        .cache_lengths = stack.take<Tensor>(),
        .block_table = stack.take<std::optional<Tensor>>(),
        .key_scale = stack.take<std::optional<Tensor>>(),
        .value_scale = stack.take<std::optional<Tensor>>(),
        .attn_mask = stack.take<std::optional<Tensor>>(),
        .cache_leftpad = stack.take<std::optional<Tensor>>(),
        .features = stack.take<Features>(),
        .num_splits = stack.take<std::int64_t>(),
    };
  }
};

Strides strides_of(const Tensor& scale) { return {scale.stride(0), scale.stride(1), scale.stride(2)}; }

Cache::Format format_of(const char* name, const Tensor& cache, const Tensor& query) {
  if (cache.scalar_type() == query.scalar_type()) return Cache::Format::same_dtype;
  if (cache.scalar_type() == ScalarType::Char) return Cache::Format::int8;
  if (cache.scalar_type() == ScalarType::Float8_e5m2) return Cache::Format::e5m2;
  refuse_unless(cache.scalar_type() == ScalarType::Float8_e4m3fn, name,
                " must have the dtype of query, int8, float8_e4m3fn or float8_e5m2");
  return Cache::Format::e4m3;
}

void check_cache(const char* name, const Tensor& cache, const Tensor& query, const Tensor& key) {
  refuse_unless(cache.dim() == 4, name, " has ", cache.dim(), " dimensions; it must have 4");
  refuse_unless(cache.device() == query.device(), name, " is on another device than query; they must be on the same");
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

void check_mask(const Tensor& mask, const Tensor& query) {
  refuse_unless(mask.device() == query.device() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 &&
                    (mask.size(0) == 1 || mask.size(0) == query.size(0)) &&
                    (mask.size(1) == 1 || mask.size(1) == query.size(1)) && mask.size(2) == query.size(2),
                "attn_mask must be bool [B|1,Hq|1,Lq,K], on the device of query");
}

void check_scale(const char* name, const std::optional<Tensor>& scale, const Tensor& key, Cache::Format format) {
  const bool is_quantized = format != Cache::Format::same_dtype;
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
  cache.key_format = format_of("key_cache", key, query);
  cache.value_format = format_of("value_cache", value, query);
  cache.splits = terms.num_splits;
  refuse_unless(cache.splits >= 0, "num_splits is ", cache.splits, "; it must be 0 (automatic) or more");
  check_int32("cache_lengths", terms.cache_lengths, query, 1);
  check_scale("key_scale", terms.key_scale, key, cache.key_format);
  check_scale("value_scale", terms.value_scale, key, cache.value_format);
  if (terms.key_scale) cache.key_scale_strides = strides_of(*terms.key_scale);
  if (terms.value_scale) cache.value_scale_strides = strides_of(*terms.value_scale);
  if (terms.attn_mask) check_mask(*terms.attn_mask, query);
  cache.has_leftpad = terms.cache_leftpad.has_value();
  if (cache.has_leftpad) check_int32("cache_leftpad", *terms.cache_leftpad, query, 1);
  if (terms.block_table) {
    check_int32("block_table", *terms.block_table, query, 2);
    cache.page_size = key.size(2);
    cache.pages = key.size(0);
    cache.pages_per_sequence = terms.block_table->size(1);
    const bool is_one_page = cache.pages_per_sequence == 1;
    refuse_unless(is_one_page || (cache.page_size >= 8 && cache.page_size % 8 == 0), "key_cache has pages of ",
                  cache.page_size, " tokens; a page must have a multiple of 8");
    refuse_unless(is_one_page || !cache.has_leftpad, "cache_leftpad must be None where entries have several pages");
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
  if (terms.cache_leftpad) operands.read_contiguous(kKeyStarts, *terms.cache_leftpad);
  if (terms.attn_mask) {
    operands.read_bias(*terms.attn_mask);
    problem.bias.is_of_last_keys = true;
  }
  // A page starts at a multiple of 16 bytes too.
  const auto starts_aligned = [](const Tensor& cache, const Strides& strides) {
    const std::int64_t unit = 16 / cache.element_size();
    return std::ranges::all_of(strides, [&](std::int64_t stride) { return stride % unit == 0; });
  };
  problem.aligned = problem.aligned && starts_aligned(qkv.key, problem.key_strides) &&
                    starts_aligned(qkv.value, problem.value_strides);
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
