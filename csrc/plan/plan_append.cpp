#include <algorithm>

#include "plan/launches.h"
#include "plan/tuning.h"

namespace mfa {

Plan plan_append(const Problem& problem, const Append& append) {
  const Canonical start = canonical(problem);
  require(0 <= append.tokens && append.tokens <= problem.key_length, "tokens must be within 0 ... key_length");
  require(0 <= append.length && append.length <= problem.key_length, "length must be within 0 ... key_length");
  require(!append.rotary || (append.rotary->pairs >= 0 && 2 * append.rotary->pairs <= problem.head_dim),
          "rotary.pairs must be within 0 ... head_dim / 2");
  const Instance& instance = the_instance(Kind::append, problem.dtype);
  const Cache cache = problem.cache.value_or(Cache{});
  const Append::Rotary rotary = append.rotary.value_or(Append::Rotary{});

  Plan plan{.launches = {}, .params = start.params};
  AttentionParams& params = plan.params;
  set_cache(params, cache);
  params.cache_length = static_cast<int>(append.length);
  params.new_tokens = static_cast<int>(append.tokens);
  params.rotary_pairs = static_cast<int>(rotary.pairs);
  params.rotary_positions = static_cast<int>(rotary.positions);
  params.queries_advance = rotary.queries_advance ? 1 : 0;
  std::ranges::copy(append.key_strides, params.new_key_strides);
  std::ranges::copy(append.value_strides, params.new_value_strides);

  const bool aligned = start.aligned && rows_aligned(problem, append.key_strides, problem.key_heads, append.tokens) &&
                       rows_aligned(problem, append.value_strides, problem.key_heads, append.tokens);
  const std::int64_t queries = append.rotary ? problem.query_heads * problem.query_length : 0;
  const std::int64_t rows = queries + 2 * problem.key_heads * append.tokens;
  // One at least, which writes the new lengths.
  add_launch(plan, instance,
             with_cache(constants({{kAligned, aligned},
                                   {kHasKeyLengths, append.has_lengths},
                                   {kHasRotary, append.rotary.has_value()},
                                   {kHasRotarySeqlens, rotary.has_starts},
                                   {kRotaryInterleaved, rotary.interleaved},
                                   {kRotaryFloat, rotary.is_float}}),
                        cache),
             {std::max<std::int64_t>(1, tiles(rows, instance.rows)), problem.batch, 1});
  return plan;
}

}  // namespace mfa
