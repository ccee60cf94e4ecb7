// Few queries over a dense or paged cache, of the query's dtype or quantized.
#include <torch/csrc/stable/ops.h>

#include "ops/attention.h"
#include "ops/cache.h"
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

void check_mask(const Tensor& mask, const Tensor& query) {
  refuse_unless(mask.device() == query.device() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 &&
                    (mask.size(0) == 1 || mask.size(0) == query.size(0)) &&
                    (mask.size(1) == 1 || mask.size(1) == query.size(1)) && mask.size(2) == query.size(2),
                "attn_mask must be bool [B|1,Hq|1,Lq,K], on the device of query");
}

// Checked.
Cache cache_of(const Qkv& qkv, const Terms& terms) {
  Cache cache = checked_cache(qkv, {terms.block_table, terms.key_scale, terms.value_scale});
  check_int32("cache_lengths", terms.cache_lengths, qkv.query, 1);
  cache.splits = terms.num_splits;
  refuse_unless(cache.splits >= 0, "num_splits is ", cache.splits, "; it must be 0 (automatic) or more");
  if (terms.attn_mask) check_mask(*terms.attn_mask, qkv.query);
  cache.has_leftpad = terms.cache_leftpad.has_value();
  if (!cache.has_leftpad) return cache;
  check_int32("cache_leftpad", *terms.cache_leftpad, qkv.query, 1);
  refuse_unless(cache.pages_per_sequence <= 1, "cache_leftpad must be None where entries have several pages");
  return cache;
}

// Their problem, checked and bound.
Operands operands_of(const Qkv& qkv, const Terms& terms, const Cache& cache) {
  check_features(qkv, terms.features, qkv.query.size(0));
  Operands operands(qkv, terms.features);
  Problem& problem = operands.problem;
  problem.key_length = capacity_of(qkv.key, cache);
  if (terms.block_table) operands.read_contiguous(kBlockTable, *terms.block_table);
  operands.read_contiguous(kKeyLengths, terms.cache_lengths);
  if (terms.key_scale) operands.read(kKeyScale, *terms.key_scale);
  if (terms.value_scale) operands.read(kValueScale, *terms.value_scale);
  if (terms.cache_leftpad) operands.read_contiguous(kKeyStarts, *terms.cache_leftpad);
  if (terms.attn_mask) {
    operands.read_bias(*terms.attn_mask);
    problem.bias.is_of_last_keys = true;
  }
  problem.aligned = problem.aligned && rows_aligned(qkv.key) && rows_aligned(qkv.value);
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
