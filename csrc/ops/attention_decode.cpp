// Few queries over a dense or paged cache, of the query's dtype or quantized; or packed sequences of queries over
// pages.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "ops/attention.h"
#include "ops/cache.h"
#include "ops/checks.h"
#include "ops/operands.h"
#include "ops/packed.h"

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

// What the op of packed queries [Tq,Hq,D] takes, as Terms.
struct PackedTerms {
  Tensor cu_seqlens_q;  // int32 [N+1]
  std::int64_t max_seqlen_q, max_seqlen_k;
  Terms terms;  // B is N

  static PackedTerms take(Stack& stack) {
    return {
        .cu_seqlens_q = stack.take<Tensor>(),
        .max_seqlen_q = stack.take<std::int64_t>(),
        .max_seqlen_k = stack.take<std::int64_t>(),
        .terms =
            {
                .cache_lengths = stack.take<Tensor>(),
                .block_table = stack.take<Tensor>(),
                .key_scale = stack.take<std::optional<Tensor>>(),
                .value_scale = stack.take<std::optional<Tensor>>(),
                .features = stack.take<Features>(),
                .num_splits = stack.take<std::int64_t>(),
            },
    };
  }

  std::int64_t sequences() const { return cu_seqlens_q.size(0) - 1; }
};

void check_mask(const Tensor& mask, const Tensor& query) {
  refuse_unless(mask.device() == query.device() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 &&
                    (mask.size(0) == 1 || mask.size(0) == query.size(0)) &&
                    (mask.size(1) == 1 || mask.size(1) == query.size(1)) && mask.size(2) == query.size(2),
                "attn_mask must be bool [B|1,Hq|1,Lq,K], on the device of query");
}

// Of the same shape.
bool are_same(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && std::ranges::equal(a.strides(), b.strides());
}

// Of so many batch entries, or packed sequences; checked.
Cache cache_of(const Qkv& qkv, const Terms& terms, std::int64_t entries) {
  Cache cache = checked_cache(qkv, {terms.block_table, terms.key_scale, terms.value_scale}, entries);
  check_int32("cache_lengths", terms.cache_lengths, qkv.query, entries, 1);
  cache.splits = terms.num_splits;
  refuse_unless(cache.splits >= 0, "num_splits is ", cache.splits, "; it must be 0 (automatic) or more");
  if (terms.attn_mask) check_mask(*terms.attn_mask, qkv.query);
  cache.has_leftpad = terms.cache_leftpad.has_value();
  if (!cache.has_leftpad) return cache;
  check_int32("cache_leftpad", *terms.cache_leftpad, qkv.query, entries, 1);
  refuse_unless(cache.pages_per_sequence <= 1, "cache_leftpad must be None where entries have several pages");
  return cache;
}

// Their problem, checked and bound. `sequences`: of packed queries [1,Hq,Tq,D].
Operands operands_of(const Qkv& qkv, const Terms& terms, const Cache& cache, std::int64_t sequences = 0) {
  const bool is_packed = sequences > 0;
  check_features(qkv, terms.features, is_packed ? sequences : qkv.query.size(0), is_packed ? "N" : "B");
  Operands operands(qkv, terms.features, sequences);
  Problem& problem = operands.problem;
  problem.cache = cache;
  problem.has_key_lengths = true;
  problem.key_strides[0] = qkv.key.stride(0);
  problem.value_strides[0] = qkv.value.stride(0);
  problem.key_length = capacity_of(qkv.key, cache);
  if (terms.block_table) operands.read_contiguous(kBlockTable, *terms.block_table);
  operands.read_contiguous(kKeyLengths, terms.cache_lengths);
  if (terms.key_scale) operands.read(kKeyScale, *terms.key_scale);
  if (terms.value_scale) operands.read(kValueScale, *terms.value_scale);
  problem.value_is_key = problem.value_is_key && (!terms.key_scale || are_same(*terms.key_scale, *terms.value_scale));
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
  const Tensor& query = qkv.query;
  Operands operands = operands_of(qkv, terms, cache_of(qkv, terms, query.size(0)));
  const Tensor out = allocate_rows(query, qkv.value.size(3), query.scalar_type());
  const Tensor lse = allocate(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  operands.write_results(out, lse);
  operands.run(plan_forward(operands.problem));
  return {out, lse};
}

// Returns out [Tq,Hq,Dv] and lse [Hq,Tq] float32.
std::tuple<Tensor, Tensor> decode_packed(const Qkv& qkv, const PackedTerms& packed) {
  const Qkv view{packed_view("query", qkv.query), qkv.key, qkv.value};
  check_starts("cu_seqlens_q", packed.cu_seqlens_q, qkv.query,
               packed.cu_seqlens_q.dim() == 1 ? packed.cu_seqlens_q.size(0) : 0);
  const std::int64_t sequences = packed.sequences();
  const Cache cache = cache_of(view, packed.terms, sequences);
  for (const auto& [name, longest] :
       {std::pair("max_seqlen_q", packed.max_seqlen_q), {"max_seqlen_k", packed.max_seqlen_k}})
    refuse_unless(longest >= 0, name, " is ", longest, "; it must be 0 or more");
  const Tensor out = packed_rows(qkv.query, qkv.value.size(3), qkv.query.scalar_type());
  const Tensor lse = packed_lse(qkv.query);
  if (sequences == 0) return {out, lse};
  Operands operands = operands_of(view, packed.terms, cache, sequences);
  operands.read_contiguous(kQueryStarts, packed.cu_seqlens_q);
  operands.problem.longest_query = packed.max_seqlen_q;
  operands.problem.key_length = std::min(operands.problem.key_length, packed.max_seqlen_k);
  operands.write_results(packed_view("out", out), lse);
  operands.run(plan_forward(operands.problem));
  return {out, lse};
}

}  // namespace

void attention_varlen_paged(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&decode_packed, stack, argument_count, result_count);
}

void attention_decode(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&decode, stack, argument_count, result_count);
}

}  // namespace mfa
