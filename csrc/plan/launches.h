// How a plan's launches are put together.
#pragma once

#include <initializer_list>
#include <vector>

#include "plan/catalogue.h"
#include "plan/problem.h"

namespace mfa {

// All function constants: those of `used`, and false. A kernel thus has one pipeline, whatever it doesn't use is set
// to.
std::vector<Constant> constants(std::initializer_list<Constant> used);

// For a kernel that computes scores: features, alignment and exactness; and `more`.
std::vector<Constant> score_constants(const Problem& problem, const Canonical& canonical, const Instance& instance,
                                      std::initializer_list<Constant> more);

// Where keys and values lie in a cache, and how: the constants beside `all`, and the parameters.
std::vector<Constant> with_cache(std::vector<Constant> all, const Cache& cache);
void set_cache(AttentionParams& params, const Cache& cache);

// The launch of mask_blocks, where tuning.def has it run. Returns whether.
bool add_mask_blocks(Plan& plan, const Problem& problem, const Canonical& canonical);

constexpr std::int64_t tiles(std::int64_t rows, int rows_per_tile) {
  return (rows + rows_per_tile - 1) / rows_per_tile;
}

// Appends a launch, unless its grid is empty.
void add_launch(Plan& plan, const Instance& instance, std::vector<Constant> constants,
                const std::array<std::int64_t, 3>& grid, std::array<std::int64_t, 2> unit = {});

// Tiles of `rows` rows, of query_length or key_length: how many threadgroups a grid has for them. Packed sequences: at
// most one tile of each is not full.
std::int64_t row_tiles(const Problem& problem, std::int64_t length, int rows);

// The launch that fills the tile map of a varlen launch with that many rows per tile; nothing otherwise.
void add_tile_map(Plan& plan, const Problem& problem, bool of_keys, int rows);
// The same of any rows: `kind` is one of tile_map's.
void add_tile_map(Plan& plan, Kind kind, std::int64_t entries, int rows, std::vector<Constant> constants);

}  // namespace mfa
