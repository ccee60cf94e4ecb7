// New keys and values into a cache, in place, and queries and keys rotated on the way.
#include <torch/csrc/stable/ops.h>

#include "ops/attention.h"
#include "ops/cache.h"
#include "ops/checks.h"
#include "ops/operands.h"

namespace mfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the op takes besides query [B,Hq,Lq,D] and the caches (ops/cache.h), in the schema's order.
struct Terms {
  Tensor key, value;                             // [B,Hkv,Lnew,D|Dv]
  std::optional<Tensor> cache_lengths;           // int32 [B]: where the new tokens go
  std::int64_t cache_length;                     // the same for all, without them
  std::optional<Tensor> block_table;             // int32 [B,pages_per_sequence]
  std::optional<Tensor> key_scale, value_scale;  // of 8 bits: float32, the first three sizes of key_cache
  std::optional<Tensor> rotary_cos, rotary_sin;  // float32 or the query's dtype [positions,R/2]
  std::optional<Tensor> rotary_seqlens;          // int32 [B]: positions of the first new tokens
  bool rotary_interleaved, queries_advance;

  static Terms take(Stack& stack) {
    return {
        .key = stack.take<Tensor>(),
        .value = stack.take<Tensor>(),
        .cache_lengths = stack.take<std::optional<Tensor>>(),
        .cache_length = stack.take<std::int64_t>(),
        .block_table = stack.take<std::optional<Tensor>>(),
        .key_scale = stack.take<std::optional<Tensor>>(),
        .value_scale = stack.take<std::optional<Tensor>>(),
        .rotary_cos = stack.take<std::optional<Tensor>>(),
        .rotary_sin = stack.take<std::optional<Tensor>>(),
        .rotary_seqlens = stack.take<std::optional<Tensor>>(),
        .rotary_interleaved = stack.take<bool>(),
        .queries_advance = stack.take<bool>(),
    };
  }
};

void check_sizes(const Qkv& qkv, std::int64_t capacity) {
  const std::int64_t heads = qkv.query.size(1), key_heads = qkv.key.size(1), dim = qkv.query.size(3);
  refuse_unless(heads == 0 || (key_heads > 0 && heads % key_heads == 0), "query has ", heads,
                " heads; it must have a multiple of those of key_cache, ", key_heads);
  refuse_unless(qkv.key.size(3) == dim, "key_cache has head dimension ", qkv.key.size(3),
                "; it must have that of query, ", dim);
  refuse_unless(qkv.query.size(2) <= kLongestProblem && capacity <= kLongestProblem - qkv.query.size(2),
                "query has length ", qkv.query.size(2), " and key_cache a capacity of ", capacity,
                "; together they must be at most ", kLongestProblem);
}

void check_new(const char* name, const Tensor& tensor, const Tensor& query, const Tensor& cache, std::int64_t tokens) {
  refuse_unless(tensor.device() == query.device() && tensor.scalar_type() == query.scalar_type(), name,
                " must have the device and dtype of query");
  refuse_unless(tensor.dim() == 4 && tensor.size(0) == query.size(0) && tensor.size(1) == cache.size(1) &&
                    tensor.size(2) == tokens && tensor.size(3) == cache.size(3),
                name, " must have shape [B,Hkv,Lnew,D]");
}

void check_writable(const char* name, const Tensor& tensor) {
  for (std::int64_t i = 0; i < tensor.dim(); ++i)
    refuse_unless(tensor.size(i) <= 1 || tensor.stride(i) != 0, name,
                  " is expanded: it must have memory for each of its elements");
}

std::optional<Append::Rotary> rotary_of(const Terms& terms, const Tensor& query) {
  const auto& cos = terms.rotary_cos;
  const auto& sin = terms.rotary_sin;
  refuse_unless(cos.has_value() == sin.has_value(), "rotary_cos and rotary_sin must both be given, or none");
  refuse_unless(cos || !terms.rotary_seqlens, "rotary_seqlens is given; it must be None without rotary_cos");
  if (!cos) return std::nullopt;
  const ScalarType dtype = cos->scalar_type();
  refuse_unless(cos->dim() == 2 && cos->size(0) > 0 && 2 * cos->size(1) <= query.size(3) &&
                    cos->device() == query.device() && (dtype == ScalarType::Float || dtype == query.scalar_type()),
                "rotary_cos must be float32 or of the query's dtype, on its device, and have shape [positions,R/2]");
  refuse_unless(sin->dim() == 2 && sin->size(0) == cos->size(0) && sin->size(1) == cos->size(1) &&
                    sin->device() == query.device() && sin->scalar_type() == dtype,
                "rotary_sin must have the shape, dtype and device of rotary_cos");
  refuse_unless(cos->size(0) <= kLongestProblem, "rotary_cos has ", cos->size(0), " positions; it must have at most ",
                kLongestProblem);
  if (terms.rotary_seqlens) check_int32("rotary_seqlens", *terms.rotary_seqlens, query, query.size(0), 1);
  return Append::Rotary{
      .pairs = cos->size(1),
      .positions = cos->size(0),
      .has_starts = terms.rotary_seqlens.has_value(),
      .interleaved = terms.rotary_interleaved,
      .is_float = dtype == ScalarType::Float,
      .queries_advance = terms.queries_advance,
  };
}

// Returns rotated_query, as query or of size 0, and lengths int32 [B].
std::tuple<Tensor, Tensor> append(const Qkv& qkv, const Terms& terms) {
  const auto& [query, key_cache, value_cache] = qkv;
  const Cache cache = checked_cache(qkv, {terms.block_table, terms.key_scale, terms.value_scale}, qkv.query.size(0));
  const std::int64_t capacity = capacity_of(key_cache, cache);
  check_sizes(qkv, capacity);
  refuse_unless(terms.key.dim() == 4, "key has ", terms.key.dim(), " dimensions; it must have 4");
  Append append{.length = terms.cache_length, .tokens = terms.key.size(2), .rotary = rotary_of(terms, query)};
  check_new("key", terms.key, query, key_cache, append.tokens);
  check_new("value", terms.value, query, value_cache, append.tokens);
  append.has_lengths = terms.cache_lengths.has_value();
  if (append.has_lengths) check_int32("cache_lengths", *terms.cache_lengths, query, query.size(0), 1);
  refuse_unless(append.length >= 0 && append.length <= capacity, "cache_length is ", append.length,
                "; it must be within 0 ... ", capacity, ", the cache's capacity");
  refuse_unless(append.tokens <= capacity, "key has length ", append.tokens,
                "; it must be at most the capacity of the cache, ", capacity);
  check_writable("key_cache", key_cache);
  check_writable("value_cache", value_cache);
  if (terms.key_scale) check_writable("key_scale", *terms.key_scale);
  if (terms.value_scale) check_writable("value_scale", *terms.value_scale);

  Operands operands(qkv);
  Problem& problem = operands.problem;
  problem.cache = cache;
  problem.key_length = capacity;
  const Tensor rotated = append.rotary ? allocate_rows(query, query.size(3), query.scalar_type())
                                       : allocate(query, {0}, query.scalar_type());
  const Tensor lengths = allocate(query, {query.size(0)}, ScalarType::Int);
  if (append.rotary) {
    problem.query_strides = operands.read_rows(kQuery, query);
    problem.out_strides = operands.write_rows(kOut, rotated);
    operands.read_contiguous(kRotaryCos, *terms.rotary_cos);
    operands.read_contiguous(kRotarySin, *terms.rotary_sin);
    if (terms.rotary_seqlens) operands.read_contiguous(kRotarySeqlens, *terms.rotary_seqlens);
  }
  append.key_strides = operands.read_rows(kNewKey, terms.key);
  append.value_strides = operands.read_rows(kNewValue, terms.value);
  problem.key_strides = operands.write_rows(kKey, key_cache);
  problem.value_strides = operands.write_rows(kValue, value_cache);
  problem.aligned = problem.aligned && rows_aligned(key_cache) && rows_aligned(value_cache);
  if (terms.key_scale) operands.write(kKeyScale, *terms.key_scale);
  if (terms.value_scale) operands.write(kValueScale, *terms.value_scale);
  if (terms.block_table) operands.read_contiguous(kBlockTable, *terms.block_table);
  if (terms.cache_lengths) operands.read_contiguous(kKeyLengths, *terms.cache_lengths);
  operands.write(kNewLengths, lengths);
  operands.run(plan_append(problem, append));
  return {rotated, lengths};
}

}  // namespace

void attention_append(StableIValue* stack, std::uint64_t argument_count, std::uint64_t result_count) {
  unbox(&append, stack, argument_count, result_count);
}

}  // namespace mfa
