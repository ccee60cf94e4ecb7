#include "plan/plan_decode.h"

#include <algorithm>

#include "plan/launches.h"
#include "plan/tuning.h"

namespace mfa {
namespace {

// SIMD-groups that a GPU wants: twelve per core, and sixteen cores, between a Pro and a Max. Fewer leave memory idle.
constexpr std::int64_t kWantedGroups = 12 * 16;
// A part of the keys writes and reads back 8 bytes per row and value dimension: a sixteenth of its K and V, in 16 bits,
// if it has 32 keys per row. But no part is refused 256 keys, so that many rows find enough parts, and none has under
// 64, which are two steps.
constexpr std::int64_t kKeysPerRow = 32, kFewKeys = 64, kEnoughKeys = 256;
// Fewer keys are done before combine could start.
constexpr std::int64_t kWorthSplitting = 512;

std::int64_t choose_splits(std::int64_t groups, std::int64_t rows, std::int64_t keys) {
  if (keys < kWorthSplitting) {
    return 1;
  }
  const std::int64_t least = std::clamp(kKeysPerRow * rows, kFewKeys, kEnoughKeys);
  return std::clamp<std::int64_t>((kWantedGroups + groups - 1) / std::max<std::int64_t>(1, groups), 1, keys / least);
}

}  // namespace

// Decode packs the queries of all heads that share a key head into tiles of rows, and cuts the keys into parts where
// that fills a GPU: K and V are read once per tile. A forward kernel reads them once per query head and tile of
// queries. Decode runs where it reads them no more often. Forward keeps packed sequences; dropout, which a model that
// generates has not; and what leaves a correction for a backward pass. Only decode reads pages and 8 bits.
bool packs_rows(const Problem& problem, const Canonical& start, const Instance& forward) {
  const AttentionParams& params = start.params;
  if (problem.sequences > 0 || problem.has_correction || params.dropout_threshold > 0) return false;
  const Cache cache = problem.cache.value_or(Cache{});
  if (cache.page_size > 0 || cache.format != Cache::Format::same_dtype || cache.splits > 0) return true;
  const std::int64_t rows = problem.query_length * params.group_size;
  return tiles(rows, choose_decode(problem, start.bucket, rows).rows) <=
         params.group_size * tiles(problem.query_length, forward.rows);
}

Plan plan_decode(const Problem& problem, const Canonical& start) {
  Plan plan{.launches = {}, .params = start.params};
  AttentionParams& params = plan.params;
  const Cache cache = problem.cache.value_or(Cache{});
  const std::int64_t rows = problem.query_length * params.group_size;
  const Instance& decode = choose_decode(problem, start.bucket, rows);
  const std::int64_t tiles_of_rows = tiles(rows, decode.rows);
  const std::int64_t groups = problem.key_heads * tiles_of_rows * problem.batch;
  const std::int64_t wanted =
      cache.splits > 0 ? cache.splits
                       : choose_splits(groups, std::min<std::int64_t>(rows, decode.rows), problem.key_length);
  const std::int64_t blocks = std::max<std::int64_t>(1, tiles(problem.key_length, decode.block));
  const std::int64_t blocks_per_part = (blocks + wanted - 1) / wanted;
  const std::int64_t splits = (blocks + blocks_per_part - 1) / blocks_per_part;
  params.splits = static_cast<int>(splits);
  params.split_keys = static_cast<int>(blocks_per_part * decode.block);
  params.page_size = static_cast<int>(cache.page_size);
  params.pages = static_cast<int>(cache.pages);
  params.pages_per_sequence = static_cast<int>(cache.pages_per_sequence);
  std::ranges::copy(cache.key_scale_strides, params.key_scale_strides);
  std::ranges::copy(cache.value_scale_strides, params.value_scale_strides);

  const bool is_split = splits > 1;
  add_launch(plan, decode,
             score_constants(problem, start, decode,
                             {{kWritesLse, problem.wants_lse && !is_split},
                              {kHasSinks, problem.has_sinks},
                              {kHasKeyLengths, problem.cache.has_value()},
                              {kIsPaged, cache.page_size > 0},
                              {kIsQuantized, cache.format != Cache::Format::same_dtype},
                              {kIsInt8, cache.format == Cache::Format::int8},
                              {kIsSplit, is_split}}),
             {problem.key_heads * tiles_of_rows, splits, problem.batch});
  if (is_split) {
    const Instance& combine = the_instance(Kind::combine, problem.dtype);
    const std::int64_t all_rows = problem.batch * problem.query_heads * problem.query_length;
    add_launch(plan, combine, constants({{kWritesLse, problem.wants_lse}, {kAligned, start.aligned}}),
               {tiles(all_rows * tiles(problem.value_dim, 8), combine.threads()), 1, 1});
    const auto floats = static_cast<std::uint64_t>(splits * all_rows) * sizeof(float);
    plan.partial_lse_bytes = floats;
    plan.partial_out_bytes = floats * static_cast<std::uint64_t>(problem.value_dim);
  }
  return plan;
}

}  // namespace mfa
