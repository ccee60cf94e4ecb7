#include "plan/plan_decode.h"

#include <algorithm>

#include "plan/launches.h"
#include "plan/tuning.h"

namespace mfa {
namespace {

// Threadgroups that a GPU wants: twelve per core if each is a SIMD-group, eight if SIMD-groups share what they load;
// and sixteen cores, between a Pro and a Max. Fewer leave memory idle.
constexpr std::int64_t kWantedAlone = 12 * 16, kWantedSharing = 8 * 16;
// A part of the keys writes and reads back 8 bytes per row and value dimension: a sixteenth of its K and V, in 16 bits,
// if it has 32 keys per row. But no part is refused 256 keys, so that many rows find enough parts; with five per row, a
// part moves less than half of its K and V. None has under 64, which are two steps. Over latents, products take longer
// than what a part moves: two keys per row are enough (128 heads, 8192 keys, m1-max: 288 us instead of 364).
constexpr std::int64_t kKeysPerRow = 32, kFewKeys = 64, kEnoughKeys = 256, kLeastKeysPerRow = 5,
                       kLeastLatentsPerRow = 2;
// Fewer keys are done before combine could start.
constexpr std::int64_t kWorthSplitting = 512;
// Of a group: more fill a GPU without parts. On the matrix unit, to which products cost a quarter, more rows gain by
// reading less.
constexpr std::int64_t kMostPackedRows = 128, kMostPackedRowsOnUnit = 512;

bool is_team(Path path) { return path == team || path == unit_team; }

// MLA: query heads share keys, of which the values are columns.
bool has_latents(const Problem& problem, const Instance& tile) {
  return problem.value_is_key && is_team(tile.path) && problem.query_heads > problem.key_heads;
}

std::int64_t choose_splits(const Instance& tile, bool is_of_latents, std::int64_t groups, std::int64_t rows,
                           std::int64_t keys) {
  if (keys < kWorthSplitting) return 1;
  const std::int64_t least = std::max(std::clamp(kKeysPerRow * rows, kFewKeys, kEnoughKeys),
                                      (is_of_latents ? kLeastLatentsPerRow : kLeastKeysPerRow) * rows);
  const std::int64_t wanted = tile.simdgroups == 1 ? kWantedAlone : kWantedSharing;
  std::int64_t most = std::max<std::int64_t>(1, keys / least);
  // Most cores would have nothing to do: then to move more takes less time (predicted: up to 70 us less, or 28 more).
  if (most == 1 && tile.simdgroups > 1 && 8 * groups < kWantedSharing)
    most = std::max<std::int64_t>(1, keys / std::max<std::int64_t>(kFewKeys, 2 * rows));
  return std::clamp<std::int64_t>((wanted + groups - 1) / std::max<std::int64_t>(1, groups), 1, most);
}

// Of a batch entry, or at most of a packed sequence.
std::int64_t most_queries(const Problem& problem) {
  if (problem.sequences == 0) return problem.query_length;
  return std::clamp<std::int64_t>(problem.longest_query, 0, problem.query_length);
}

std::int64_t most_keys(const Problem& problem) {
  if (problem.sequences == 0 || problem.cache) return problem.key_length;
  return std::clamp<std::int64_t>(problem.longest_key, 0, problem.key_length);
}

// How decode would run a problem.
struct Packing {
  const Instance& tile;
  std::int64_t own_tiles, row_tiles;  // of a batch entry, at most; and in the grid's first dimension, per key head
  std::int64_t splits, split_keys, split_queries;
};

// Packed sequences: their lengths are not known here, but how many tiles they have at most. Parts are for those that
// have few queries; one that has many fills a GPU, and its parts would take memory.
Packing pack(const Problem& problem, const Canonical& start) {
  const std::int64_t group = start.params.group_size;
  const bool is_packed = problem.sequences > 0;
  const std::int64_t longest = most_queries(problem), keys = most_keys(problem);
  const Instance& tile = choose_decode(problem, start.bucket, longest * group);
  const std::int64_t each = tiles(longest * group, tile.rows);
  const std::int64_t row_tiles =
      is_packed ? std::min(problem.sequences * each, mfa::row_tiles(problem, problem.query_length * group, tile.rows))
                : each;
  const std::int64_t split_queries =
      is_packed ? std::min(longest, std::max<std::int64_t>(1, kMostPackedRows / group)) : longest;
  const std::int64_t asked = problem.cache ? problem.cache->splits : 0;
  const std::int64_t wanted =
      asked > 0 ? asked
                : choose_splits(tile, has_latents(problem, tile), problem.key_heads * row_tiles * problem.batch,
                                split_queries * group, keys);
  const std::int64_t blocks = std::max<std::int64_t>(1, tiles(keys, tile.block));
  const std::int64_t blocks_per_part = (blocks + wanted - 1) / wanted;
  return {.tile = tile,
          .own_tiles = each,
          .row_tiles = row_tiles,
          .splits = tiles(blocks, static_cast<int>(blocks_per_part)),
          .split_keys = blocks_per_part * tile.block,
          .split_queries = split_queries};
}

}  // namespace

// Decode packs the queries of all heads that share a key head into tiles of rows, and cuts the keys into parts where
// that fills a GPU: it reads K and V once per tile, a forward kernel once per query head and tile of queries. Decode
// runs where it reads them less often; or as often, but in parts, or for so few rows that the forward kernel's other
// SIMD-groups would have none. Predicted in us, forward's in brackets (8 key heads, 4096 keys, D 128, m1-max; `python
// -m mfa bench --model m1-max`): 4 rows 54 (275), 8 rows 55 (341), 32 rows 73 (341), 64 rows 136 (341), 128 rows 254
// (341). Forward keeps dropout, what leaves a correction for the backward pass, and block masks of more than one row of
// blocks. Only decode reads pages and 8 bits, takes a number of parts, live keys that start anywhere, and a mask of the
// last ones.
// On the matrix unit (8 key heads, 4096 keys, D 128, group of 8, m5-max): 64 rows 48 (407), 256 rows 130 (224), 512
// rows as long as forward. Its forward kernels have no code for tails, its decode kernels have: they take such heads in
// inference, however many rows there are.
// Latents (MLA) have many heads to a key: however many rows there are, forward's teams would read them once per head.
//
// Tiles of teams have 16 rows, or 32: Q and O of a row take 3.2 KB of a core's registers at D 576, so that 64 would
// leave none to work with. Q read again for every block of keys moves more than latents read twice: 90 bytes per row
// and key, where 32 rows read 36. From 32 rows on, products take longer than device memory. Predicted for 64 and 128
// heads, 8k to 128k latents, batch 1 to 8, all chips: tiles of 32 rows take 9% less to 2% more time than those of 16,
// and of 64 rows 3% less to 14% more than those of 32. Row tiles of a part are next to each other in the grid: they run
// at the same time, so that a cache serves all but the first.
bool packs_rows(const Problem& problem, const Canonical& start, const Instance& forward) {
  const Cache cache = problem.cache.value_or(Cache{});
  if (problem.has_correction || start.params.dropout_threshold > 0) return false;
  if (problem.bias.kind == BiasKind::blocks && problem.query_length > kMaskBlockRows) return false;
  if (cache.page_size > 0 || cache.has_leftpad || cache.splits > 0 || problem.bias.is_of_last_keys ||
      cache.key_format != Cache::Format::same_dtype || cache.value_format != Cache::Format::same_dtype)
    return true;
  const std::int64_t longest = most_queries(problem);
  if (problem.sequences > 0 && longest == 0) return false;
  const Packing packing = pack(problem, start);
  if (is_preferred(forward) || is_preferred(packing.tile)) return !is_preferred(forward);
  const bool on_unit = is_on_unit(packing.tile.path);
  if (on_unit && !is_on_unit(forward.path)) return true;
  const bool reads_latents_more_often = has_latents(problem, packing.tile) && is_team(forward.path);
  const std::int64_t most = on_unit ? kMostPackedRowsOnUnit : kMostPackedRows;
  if (longest * start.params.group_size > most && !reads_latents_more_often) return false;
  const std::int64_t reads = start.params.group_size * tiles(longest, forward.rows);
  if (packing.own_tiles > reads) return false;
  return packing.own_tiles < reads || packing.splits > 1 || packing.tile.simdgroups == 1;
}

Plan plan_decode(const Problem& problem, const Canonical& start) {
  const Packing packing = pack(problem, start);
  const Instance& decode = packing.tile;
  const Cache cache = problem.cache.value_or(Cache{});
  Plan plan{.launches = {}, .params = start.params};
  AttentionParams& params = plan.params;
  params.splits = static_cast<int>(packing.splits);
  params.split_keys = static_cast<int>(packing.split_keys);
  params.split_queries = static_cast<int>(packing.split_queries);
  set_cache(params, cache);

  const bool is_split = packing.splits > 1, is_packed = problem.sequences > 0;
  if (is_packed && packing.row_tiles > 0)
    add_tile_map(
        plan, Kind::tile_map_of_packed, packing.row_tiles, decode.rows,
        constants(
            {{kIsVarlen, true}, {kHasKeyStarts, problem.has_key_starts()}, {kHasKeyLengths, problem.has_key_lengths}}));
  add_launch(plan, decode,
             with_cache(score_constants(problem, start, decode,
                                        {{kWritesLse, problem.wants_lse && (is_packed || !is_split)},
                                         {kHasSinks, problem.has_sinks},
                                         {kHasLeftpad, cache.has_leftpad},
                                         {kIsSplit, is_split}}),
                        cache),
             {problem.key_heads * packing.row_tiles, packing.splits, problem.batch});
  if (is_split) {
    const Instance& combine = the_instance(Kind::combine, problem.dtype);
    const std::int64_t entries = is_packed ? problem.sequences : problem.batch;
    const std::int64_t all_rows = entries * problem.query_heads * packing.split_queries;
    add_launch(plan, combine,
               constants({{kWritesLse, problem.wants_lse},
                          {kAligned, start.aligned},
                          {kIsVarlen, is_packed},
                          {kHasBlockMask, problem.bias.kind == BiasKind::blocks}}),
               {tiles(all_rows * tiles(problem.value_dim, 8), combine.threads()), 1, 1});
    const auto floats = static_cast<std::uint64_t>(packing.splits * all_rows) * sizeof(float);
    plan.partial_lse_bytes = floats;
    plan.partial_out_bytes = floats * static_cast<std::uint64_t>(problem.value_dim);
  }
  return plan;
}

}  // namespace mfa
