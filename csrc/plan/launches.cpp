#include "plan/launches.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "plan/tuning.h"

namespace mfa {
namespace {

struct NamedConstant {
  FunctionConstant index;
  const char* name;
};

constexpr NamedConstant kConstants[] = {
    {kHasWindow, "has_window"},
    {kWritesLse, "writes_lse"},
    {kAligned, "is_aligned"},
    {kExactHead, "is_exact_head"},
    {kHasBias, "has_bias"},
    {kHasMask, "has_mask"},
    {kHasFloatBias, "has_float_bias"},
    {kHasSoftcap, "has_softcap"},
    {kHasAlibi, "has_alibi"},
    {kHasSinks, "has_sinks"},
    {kHasDropout, "has_dropout"},
    {kHasGradLse, "has_grad_lse"},
    {kWantsGradKey, "wants_grad_key"},
    {kWantsGradValue, "wants_grad_value"},
    {kWantsGradAlibi, "wants_grad_alibi"},
    {kWritesScoreGradient, "writes_score_gradient"},
    {kIsVarlen, "is_varlen"},
    {kHasKeyLengths, "has_key_lengths"},
    {kIsPaged, "is_paged"},
    {kHasLeftpad, "has_leftpad"},
    {kKeyIsQuantized, "key_is_quantized"},
    {kKeyIsInt8, "key_is_int8"},
    {kKeyIsE5m2, "key_is_e5m2"},
    {kValueIsQuantized, "value_is_quantized"},
    {kValueIsInt8, "value_is_int8"},
    {kValueIsE5m2, "value_is_e5m2"},
    {kIsSplit, "is_split"},
    {kHasMaskBlocks, "has_mask_blocks"},
    {kHasCorrection, "has_correction"},
    {kBiasIsOfLastKeys, "bias_is_of_last_keys"},
    {kHasRotary, "has_rotary"},
    {kHasRotarySeqlens, "has_rotary_seqlens"},
    {kRotaryInterleaved, "is_rotary_interleaved"},
    {kRotaryFloat, "is_rotary_float"},
    {kHasKeyStarts, "has_key_starts"},
    {kValueIsKey, "value_is_key"},
    {kHasBlockMask, "has_block_mask"},
    {kSumsScoreGradient, "sums_score_gradient"},
};

constexpr bool in_order_of_index() {
  for (std::size_t i = 0; i < std::size(kConstants); ++i)
    if (kConstants[i].index != i) return false;
  return true;
}
static_assert(in_order_of_index());

}  // namespace

const char* name(FunctionConstant constant) {
  if (constant < std::size(kConstants)) return kConstants[constant].name;
  throw std::logic_error("a function constant without a name");
}

std::vector<Constant> constants(std::initializer_list<Constant> used) {
  std::vector<Constant> all;
  all.reserve(std::size(kConstants));
  for (const NamedConstant& constant : kConstants) all.push_back({constant.index, false});
  for (const Constant& constant : used) all[constant.index].value = constant.value;
  return all;
}

std::vector<Constant> score_constants(const Problem& problem, const Canonical& canonical, const Instance& instance,
                                      std::initializer_list<Constant> more) {
  std::vector<Constant> all = constants({
      {kHasWindow, canonical.has_window},
      {kAligned, canonical.aligned},
      {kExactHead, problem.head_dim == instance.head_dim && problem.value_dim == instance.value_dim},
      {kHasBias, problem.bias.kind != BiasKind::none},
      {kHasMask, problem.bias.kind == BiasKind::mask},
      {kHasFloatBias, problem.bias.kind == BiasKind::float32},
      {kHasBlockMask, problem.bias.kind == BiasKind::blocks},
      {kBiasIsOfLastKeys, problem.bias.is_of_last_keys},
      {kHasSoftcap, canonical.params.softcap > 0},
      {kHasAlibi, problem.alibi != Alibi::none},
      {kHasDropout, canonical.params.dropout_threshold > 0},
      {kIsVarlen, problem.sequences > 0},
      {kValueIsKey, problem.value_is_key && instance.path == team &&
                        (instance.kind == Kind::forward || instance.kind == Kind::decode)},
      {kHasKeyStarts, problem.has_key_starts()},
      {kHasKeyLengths, problem.has_key_lengths},
  });
  for (const Constant& constant : more) all[constant.index].value = constant.value;
  return all;
}

std::vector<Constant> with_cache(std::vector<Constant> all, const Cache& cache) {
  using Format = Cache::Format;
  const Constant own[] = {
      {kIsPaged, cache.page_size > 0},
      {kKeyIsQuantized, cache.key_format != Format::same_dtype},
      {kKeyIsInt8, cache.key_format == Format::int8},
      {kKeyIsE5m2, cache.key_format == Format::e5m2},
      {kValueIsQuantized, cache.value_format != Format::same_dtype},
      {kValueIsInt8, cache.value_format == Format::int8},
      {kValueIsE5m2, cache.value_format == Format::e5m2},
  };
  for (const Constant& constant : own) all[constant.index].value = constant.value;
  return all;
}

void set_cache(AttentionParams& params, const Cache& cache) {
  params.page_size = static_cast<int>(cache.page_size);
  params.pages = static_cast<int>(cache.pages);
  params.pages_per_sequence = static_cast<int>(cache.pages_per_sequence);
  std::ranges::copy(cache.key_scale_strides, params.key_scale_strides);
  std::ranges::copy(cache.value_scale_strides, params.value_scale_strides);
}

bool add_mask_blocks(Plan& plan, const Problem& problem, const Canonical& canonical) {
  if (!classifies_mask(problem)) return false;
  const Instance& instance = *choose(Kind::mask_blocks, problem, canonical.bucket);
  const auto& [batch, heads, rows, columns] = problem.bias.sizes;
  const std::int64_t down = tiles(rows, instance.rows), across = tiles(columns, instance.block);
  constexpr int kBytes = 16;  // of a block's classes
  add_launch(plan, instance,
             constants({{kHasBias, true},
                        {kHasMask, problem.bias.kind == BiasKind::mask},
                        {kHasFloatBias, problem.bias.kind == BiasKind::float32}}),
             {across, down, batch * heads});
  plan.mask_class_bytes = static_cast<std::uint64_t>(batch * heads * down * across * kBytes);
  return true;
}

void add_launch(Plan& plan, const Instance& instance, std::vector<Constant> constants,
                const std::array<std::int64_t, 3>& grid, std::array<std::int64_t, 2> unit) {
  if (std::ranges::find(grid, 0) != grid.end()) return;
  Launch launch{
      .kernel = instance.name,
      .constants = std::move(constants),
      .grid = {},
      .group = {static_cast<std::uint32_t>(instance.threads()), 1, 1},
      .threadgroup_memory = static_cast<std::uint32_t>(instance.threadgroup_memory),
      .unit = {static_cast<int>(unit[0]), static_cast<int>(unit[1])},
  };
  std::ranges::transform(grid, launch.grid.begin(), [](std::int64_t size) { return static_cast<std::uint32_t>(size); });
  plan.launches.push_back(std::move(launch));
}

std::int64_t row_tiles(const Problem& problem, std::int64_t length, int rows) {
  // Of a block mask, tiles come by blocks, in its order: also those that the last block doesn't fill.
  if (problem.bias.kind == BiasKind::blocks) return tiles(length, kMaskBlockRows) * (kMaskBlockRows / rows);
  return tiles(length, rows) + problem.sequences;
}

void add_tile_map(Plan& plan, const Problem& problem, bool of_keys, int rows) {
  if (problem.sequences == 0) return;
  const std::int64_t entries = row_tiles(problem, of_keys ? problem.key_length : problem.query_length, rows);
  add_tile_map(
      plan, of_keys ? Kind::tile_map_of_keys : Kind::tile_map_of_queries, entries, rows,
      constants(
          {{kIsVarlen, true}, {kHasKeyStarts, problem.has_key_starts()}, {kHasKeyLengths, problem.has_key_lengths}}));
}

void add_tile_map(Plan& plan, Kind kind, std::int64_t entries, int rows, std::vector<Constant> constants) {
  add_launch(plan, the_instance(kind), std::move(constants), {1, 1, 1}, {rows, entries});
  plan.tile_map_bytes = std::max(plan.tile_map_bytes, static_cast<std::uint64_t>(entries) * 2 * sizeof(int));
}

}  // namespace mfa
