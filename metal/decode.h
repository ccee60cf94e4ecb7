// Attention of few queries over many keys. The rows of a threadgroup are the queries of all heads of a group (PackGQA),
// so that each K and V is read once for all of them; it works on a part of the keys. A part's result goes to scratch,
// where combine merges the parts in a fixed order. Grid: key heads and row tiles, parts, batch. Packed sequences
// (varlen): the tile map says whose rows and which; one with more queries than parts are for is one part.
//
//   for each key block of this part that a row sees (decode_walk.h):
//     S = Q K' (times the keys' scales), P = softmax step, O += P (times the values' scales) V
//   store O / l and m + log l, of the whole or of the part
#pragma once

#include "cache.h"
#include "decode_walk.h"
#include "team.h"

namespace mfa {

// Row `row` = query * group_size + member of a group's queries; `rows` starts at the first row of a tile.
template <typename T>
struct PackedRows {
  const device T* base;
  long head_stride, row_stride;
  int first_row, rows, group, dim;

  vec<T, 4> quad(short tile, short row_in_tile, short d) const { return guarded(tile, row_in_tile).quad(0, 0, d); }
  Octet<T> octet(short tile, short row_in_tile, short d) const { return guarded(tile, row_in_tile).octet(0, 0, d); }

  GuardedRows<T> guarded(short tile, short row_in_tile) const {
    const int row = first_row + tile * kFragment + row_in_tile;
    return {base + row % group * head_stride + row / group * row_stride, 0, rows - row, dim};
  }
};

#ifndef MFA_MATRIX_UNIT
// Read again for every block, they are for want of registers.
template <typename T, int kDim>
constant constexpr int kMostTogether<ReadRows<T, kDim, PackedRows<T>>> = 1;
#endif

template <typename T>
inline PackedRows<T> sliced(PackedRows<T> rows, int first_dim) {
  rows.base += first_dim;
  rows.dim -= first_dim;
  return rows;
}

#define DECODE_ARGUMENTS                                                                                     \
  const device T *query [[buffer(kQuery)]], const device uchar *key [[buffer(kKey)]],                        \
      const device uchar *value [[buffer(kValue)]], device T *out [[buffer(kOut)]],                          \
      device float *lse [[buffer(kLse), function_constant(writes_lse)]],                                     \
      device float *partial_out [[buffer(kPartialOut), function_constant(is_split)]],                        \
      device float *partial_lse [[buffer(kPartialLse), function_constant(is_split)]],                        \
      const device uchar *bias [[buffer(kBias), function_constant(has_bias)]],                               \
      const device float *sinks [[buffer(kSinks), function_constant(has_sinks)]],                            \
      const device float *alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],               \
      const device int2 *tile_map [[buffer(kTileMap), function_constant(is_varlen)]],                        \
      const device int *query_starts [[buffer(kQueryStarts), function_constant(is_varlen)]],                 \
      const device int *key_starts [[buffer(kKeyStarts), function_constant(has_key_starts)]],                \
      const device int *key_lengths [[buffer(kKeyLengths), function_constant(has_key_lengths)]],             \
      constant int *block_table [[buffer(kBlockTable), function_constant(is_paged)]],                        \
      const device float *key_scale [[buffer(kKeyScale), function_constant(key_is_quantized)]],              \
      const device float *value_scale [[buffer(kValueScale), function_constant(value_is_quantized)]],        \
      constant AttentionParams &params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]], \
      ushort lane_index [[thread_index_in_simdgroup]]

// Where a threadgroup works.
struct DecodeTile {
  Sequence sequence;
  int key_head, head;        // and the group's first query head
  int first_row, row_count;  // of a group's rows
  int part;

  DecodeTile(constant AttentionParams& params, Layout layout, uint3 position, int rows)
      : DecodeTile(params, Tile(params, layout, position.z, position.x / params.key_heads, 0), position, rows) {}

  DecodeTile(constant AttentionParams& params, Tile tile, uint3 position, int rows)
      : sequence(tile.sequence),
        key_head(position.x % params.key_heads),
        head(key_head * params.group_size),
        first_row(tile.index * rows),
        row_count(sequence.query_length * params.group_size),
        part(position.y) {}

  // Whether the keys are not cut into parts; then there is nothing to do but for the first one.
  bool is_whole(constant AttentionParams& params) const {
    return !is_split || (is_varlen && sequence.query_length > params.split_queries);
  }

  template <typename T>
  PackedRows<T> queries(constant AttentionParams& params, const device T* query, int row, int dim) const {
    return {query + sequence.index * params.query_strides[0] + head * params.query_strides[1] +
                sequence.first_query * params.query_strides[2],
            long(params.query_strides[1]),
            long(params.query_strides[2]),
            row,
            row_count,
            params.group_size,
            dim};
  }

  // Of the blocks of keys that a view has, those of this part.
  Range blocks(constant AttentionParams& params, View view, int block_keys) const {
    if (is_whole(params)) {
      return {view.first_block(block_keys), view.end_block(block_keys) - 1};
    }
    const int count = params.split_keys / block_keys;
    return {max(view.first_block(block_keys), part * count), min(view.end_block(block_keys), (part + 1) * count) - 1};
  }

  // `block_mask` is that of the group's first head, `own_row` the lane's.
  template <int kRows, int kBlockKeys>
  DecodeWalk<kRows, kBlockKeys> walk(constant AttentionParams& params, BlockMask block_mask, View view, int own_row,
                                     ushort lane_index) const {
    return {params, block_mask, view,      blocks(params, view, kBlockKeys), first_row, row_count,
            part,   own_row,    lane_index};
  }
};

// Of a quantized cache: S takes the scale of its key, and P, after it was summed, that of its value.
template <typename Rows>
inline void scale_column(thread Rows& rows, short n, float2 scale) {
  MFA_UNROLL
  for (short r = 0; r < Rows::kTiles; ++r) {
    rows.score[r][n] *= scale;
  }
}

// Each lane has the scale of one key of the block, and all lanes share them;
template <typename Rows>
inline void scale_columns(thread Rows& rows, float own) {
  MFA_UNROLL
  for (short n = 0; n < Rows::kKeyTiles; ++n) {
    const ushort column = rows.lane.column_of(n);
    scale_column(rows, n, float2(simd_shuffle(own, column), simd_shuffle(own, column + 1)));
  }
}

// or all are in threadgroup memory.
template <typename Rows>
inline void scale_columns(thread Rows& rows, const threadgroup float* scales) {
  MFA_UNROLL
  for (short n = 0; n < Rows::kKeyTiles; ++n) {
    scale_column(rows, n, *(const threadgroup float2*)(scales + rows.lane.column_of(n)));
  }
}

// What a mask does to a block of keys for rows from `first_row` on. K and V of a hidden block are not read, as where a
// static cache is longer than what lives in it. A lane looks at one key, and stops at a row that sees it, so that a
// block costs an element per key; but at all rows of drafted tokens, whose blocks are open where those of causal are,
// and therefore give the same bits.
template <typename T, int kRows, int kWalkRows, int kBlockKeys>
inline MaskClass classify(constant AttentionParams& params, Scores<T> scores, DecodeTile tile,
                          thread const DecodeWalk<kWalkRows, kBlockKeys>& walk, int first_row, ushort lane_index) {
  if (has_block_mask) {
    return walk.mask_class();
  }
  const int first_key = walk.first;
  if (!has_bias || (bias_is_of_last_keys && first_key + kBlockKeys <= scores.first_biased)) {
    return kOpen;
  }
  const int key = min(first_key + lane_index % kBlockKeys, scores.key_length - 1);
  const bool is_shared = params.bias_heads == 1 && params.bias_rows == 1;
  const int end = is_shared ? first_row + 1 : min(first_row + kRows, tile.row_count);
  bool hides = true;
  bool sees = has_mask && (is_shared || bias_is_of_last_keys);
  for (int row = first_row; row < end && (hides || sees); ++row) {
    const bool is_hidden =
        scores.of_member(params, row % params.group_size).hides(params, row / params.group_size, key);
    hides = hides && is_hidden;
    sees = sees && !is_hidden;
  }
  return simd_all(hides) ? kHidden : simd_all(sees) ? kOpen : kMixed;
}

// O / l and m + log l. `first_dim` is that of a slice of Dv, of which this is one.
template <int kValueDim, typename T, typename Rows>
inline void store_packed(constant AttentionParams& params, thread Rows& rows, DecodeTile tile, device T* out,
                         device float* lse, device float* partial_out, device float* partial_lse, int first_dim = 0) {
  const int dim = is_exact_head ? kValueDim : params.value_dim - first_dim;
  const bool is_whole = tile.is_whole(params);
  const int sequences = is_varlen ? params.sequences : params.batch;
  MFA_UNROLL
  for (short r = 0; r < Rows::kTiles; ++r) {
    const int row = rows.first_row + r * kFragment + rows.lane.row;
    const float sum = row_sum(rows.row[r].sum);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    if (row < tile.row_count) {
      const int query = row / params.group_size;
      const int query_head = tile.head + row % params.group_size;
      const long part_head = (long(tile.part) * sequences + tile.sequence.index) * params.query_heads + query_head;
      const long partial_index = part_head * params.split_queries + query;
      device T* target = out + (tile.sequence.index * params.out_strides[0] + query_head * params.out_strides[1] +
                                (tile.sequence.first_query + query) * params.out_strides[2] + first_dim);
      MFA_UNROLL
      for (short s = 0; s < sets_of(kValueDim); ++s) {
        thread Fragment<float>* set = &rows.out[r][s * kSetFragments];
        if (is_whole) {
          store_set<kValueDim>(target, dim, set, s, inverse, rows.lane);
        } else if (!has_block_mask || sum != 0) {  // parts that saw nothing are not read: they may be most
          store_set<kValueDim>(partial_out + partial_index * params.value_dim + first_dim, dim, set, s, inverse,
                               rows.lane);
        }
      }
      if (first_dim == 0 && rows.lane.column == 0) {
        const float natural = log_sum_exp(rows.row[r].maximum, sum);
        if (!is_whole) {
          partial_lse[partial_index] = natural;
        } else if (writes_lse) {
          lse[first_row_index(params, tile.sequence, query_head) + query] = natural;
        }
      }
    }
  }
}

// One SIMD-group: fragments come straight from device memory.
template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(32)]] void decode_direct(DECODE_ARGUMENTS) {
  static_assert(kSimdgroups == 1, "SIMD-groups share K and V in threadgroup memory only");
  constexpr int kRows = kRowTiles * kFragment;
  typedef Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys, true> Rows;
  const DecodeTile tile(params, Layout{tile_map, query_starts, key_starts, key_lengths}, position, kRows);
  if (tile.is_whole(params) && tile.part > 0) {
    return;
  }
  // A sink belongs to one part only.
  Rows rows(params, tile.sequence, tile.first_row, sinks, alibi_slopes, tile.head, tile.part == 0, lane_index);
  // Q beside O takes nearly all registers that a thread of M1 has, at D 256 or in float32 at D 128.
  constexpr Own kOwn = kRowTiles * kHeadDim * sizeof(T) > 384 ? reread : held;
  const OwnOperand<T, kOwn, kRowTiles, kHeadDim, PackedRows<T>> queries(
      tile.queries(params, query, tile.first_row, is_exact_head ? kHeadDim : params.head_dim), rows.lane);
  const Rules<T> rules(params, tile.sequence, bias, nullptr, alibi_slopes, nullptr, tile.head);
  const Caches<T> cache(params, key, value, block_table, key_scale, value_scale, tile.sequence, tile.key_head,
                        is_exact_head ? kHeadDim : params.head_dim, is_exact_head ? kValueDim : params.value_dim);

  auto walk = tile.walk<kRows, kBlockKeys>(params, rules.scores.block_mask, rows.view, rows.first_row + rows.lane.row,
                                           lane_index);
  for (; !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    const MaskClass mask_class = classify<T, kRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    if (mask_class == kHidden) {
      continue;
    }
    rows.multiply_keys(queries.operand,
                       CacheRows<T, Rows::kKeyTiles, kHeadDim, quads>(cache.keys, first_key, rows.lane));
    if (key_is_quantized) {
      scale_columns(rows, lane_index < kBlockKeys ? cache.keys.scale(first_key + lane_index) : 0);
    }
    rows.softmax(params, rules.in_block(mask_class, walk), first_key);
    if (value_is_quantized) {
      scale_columns(rows, lane_index < kBlockKeys ? cache.values.scale(first_key + lane_index) : 0);
    }
    rows.add_values(CacheRows<T, Rows::kKeyTiles, kValueDim, octets>(cache.values, first_key, rows.lane));
  }
  store_packed<kValueDim>(params, rows, tile, out, lse, partial_out, partial_lse);
}

// K and V go through threadgroup memory, which the SIMD-groups share. They are of the query's dtype there.
template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void decode_staged(DECODE_ARGUMENTS,
                                                                                   ushort simdgroup
                                                                                   [[simdgroup_index_in_threadgroup]],
                                                                                   ushort thread_index
                                                                                   [[thread_index_in_threadgroup]]) {
  constexpr int kRows = kRowTiles * kFragment;
  constexpr int kThreads = kSimdgroups * 32;
  typedef Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys, true> Rows;
  typedef StagedRows<T, kHeadDim, quads> Keys;
  typedef StagedRows<T, kValueDim, octets> Values;
  threadgroup uint4
      memory[decode_threadgroup_bytes(staged, kHeadDim, kValueDim, kSimdgroups * kRows, kBlockKeys, sizeof(T)) / 16];
  threadgroup T* keys = (threadgroup T*)memory;
  threadgroup T* values = keys + kBlockKeys * Keys::kStride;
  threadgroup float* scales = (threadgroup float*)(values + kBlockKeys * Values::kStride);  // of keys, then of values

  const DecodeTile tile(params, Layout{tile_map, query_starts, key_starts, key_lengths}, position, kSimdgroups * kRows);
  if (tile.is_whole(params) && tile.part > 0) {
    return;
  }
  Rows rows(params, tile.sequence, tile.first_row + simdgroup * kRows, sinks, alibi_slopes, tile.head, tile.part == 0,
            lane_index);
  const OwnOperand<T, held, kRowTiles, kHeadDim, PackedRows<T>> queries(
      tile.queries(params, query, rows.first_row, is_exact_head ? kHeadDim : params.head_dim), rows.lane);
  const Rules<T> rules(params, tile.sequence, bias, nullptr, alibi_slopes, nullptr, tile.head);
  const Caches<T> cache(params, key, value, block_table, key_scale, value_scale, tile.sequence, tile.key_head,
                        is_exact_head ? kHeadDim : params.head_dim, is_exact_head ? kValueDim : params.value_dim);

  const View view = view_of_queries(params, tile.sequence, rows.query_of(tile.first_row),
                                    rows.query_of(tile.first_row + kSimdgroups * kRows - 1) + 1);
  auto walk = tile.walk<kSimdgroups * kRows, kBlockKeys>(params, rules.scores.block_mask, view,
                                                         rows.first_row + rows.lane.row, lane_index);
  bool is_first = true;
  for (; !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    // All SIMD-groups look at the same elements: what they find must not differ, since barriers follow.
    MaskClass mask_class =
        classify<T, kSimdgroups * kRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    if (mask_class == kHidden) {
      continue;
    }
    if (bias_is_of_last_keys) {
      mask_class = classify<T, kRows>(params, rules.scores, tile, walk, rows.first_row, lane_index);
    }
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    stage_cache<T, kBlockKeys, kHeadDim, quads, kThreads>(keys, cache.keys, first_key, thread_index);
    stage_cache<T, kBlockKeys, kValueDim, octets, kThreads>(values, cache.values, first_key, thread_index);
    if (key_is_quantized && thread_index < kBlockKeys) {
      scales[thread_index] = cache.keys.scale(first_key + thread_index);
    }
    if (value_is_quantized && thread_index >= kBlockKeys && thread_index < 2 * kBlockKeys) {
      scales[thread_index] = cache.values.scale(first_key + thread_index - kBlockKeys);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (rows.view.sees(first_key, kBlockKeys)) {
      rows.multiply_keys(queries.operand, Keys{keys});
      if (key_is_quantized) {
        scale_columns(rows, scales);
      }
      rows.softmax(params, rules.in_block(mask_class, walk), first_key);
      if (value_is_quantized) {
        scale_columns(rows, scales + kBlockKeys);
      }
      rows.add_values(Values{values});
    }
  }
  store_packed<kValueDim>(params, rows, tile, out, lse, partial_out, partial_lse);
}

// As staged; a team shares each row tile. K and V take turns in threadgroup memory; where V is columns of K, it is
// that.
template <typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void decode_team(DECODE_ARGUMENTS,
                                                                                 ushort simdgroup
                                                                                 [[simdgroup_index_in_threadgroup]],
                                                                                 ushort thread_index
                                                                                 [[thread_index_in_threadgroup]]) {
  static_assert(kRowTiles == 1 && kSimdgroups % kTeam == 0, "members have one tile, and teams are whole");
  constexpr int kRows = kSimdgroups / kTeam * kFragment;
  constexpr int kThreads = kSimdgroups * 32;
  constexpr int kSlice = kHeadDim / kTeam;
  constexpr int kValueSlice = kValueDim / kTeam;
  typedef Forward<T, kSlice, kValueSlice, 1, kBlockKeys, true> Rows;
  typedef StagedRows<T, kHeadDim, quads> Keys;
  typedef StagedRows<T, kValueDim, octets> Values;
  typedef PartialScores<Rows::kKeyTiles> Partial;
  threadgroup uint4 memory[decode_threadgroup_bytes(team, kHeadDim, kValueDim, kRows, kBlockKeys, sizeof(T)) / 16];
  threadgroup T* staged_rows = (threadgroup T*)memory;
  threadgroup float2* scores = (threadgroup float2*)(staged_rows + kBlockKeys * larger(Keys::kStride, Values::kStride));
  threadgroup float* scales =
      (threadgroup float*)(scores + kSimdgroups * (Partial::kFloats / 2));  // of keys, of values
  // Where this threadgroup works, and 0. Read back after the loop, it takes no registers in it.
  threadgroup uint4* place = (threadgroup uint4*)(scales + 2 * kBlockKeys);
  if (thread_index == 0) {
    *place = uint4(position, 0);
  }

  const Layout layout = {tile_map, query_starts, key_starts, key_lengths};
  const DecodeTile tile(params, layout, position, kRows);
  if (tile.is_whole(params) && tile.part > 0) {
    return;
  }
  const short member = simdgroup % kTeam;
  const short own = simdgroup / kTeam;
  Rows rows(params, tile.sequence, tile.first_row + own * kFragment, sinks, alibi_slopes, tile.head, tile.part == 0,
            lane_index);
  HeldRows<T, 1, kSlice> queries;
  queries.load(
      sliced(tile.queries(params, query, rows.first_row, is_exact_head ? kHeadDim : params.head_dim), member * kSlice),
      rows.lane);
  const Partial partial = {scores + own * kTeam * (Partial::kFloats / 2), lane_index};
  const Rules<T> rules(params, tile.sequence, bias, nullptr, alibi_slopes, nullptr, tile.head);
  const Caches<T> cache(params, key, value, block_table, key_scale, value_scale, tile.sequence, tile.key_head,
                        is_exact_head ? kHeadDim : params.head_dim, is_exact_head ? kValueDim : params.value_dim);

  const View view = view_of_queries(params, tile.sequence, rows.query_of(tile.first_row),
                                    rows.query_of(tile.first_row + kRows - 1) + 1);
  auto walk =
      tile.walk<kRows, kBlockKeys>(params, rules.scores.block_mask, view, rows.first_row + rows.lane.row, lane_index);
  bool is_first = true;
  for (; !walk.is_done(); walk.next()) {
    const int first_key = walk.first;
    // All SIMD-groups look at the same elements: what they find must not differ, since barriers follow.
    MaskClass mask_class = classify<T, kRows>(params, rules.scores, tile, walk, tile.first_row, lane_index);
    if (mask_class == kHidden) {
      continue;
    }
    if (bias_is_of_last_keys) {
      mask_class = classify<T, kFragment>(params, rules.scores, tile, walk, rows.first_row, lane_index);
    }
    if (!is_first) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    is_first = false;
    stage_cache<T, kBlockKeys, kHeadDim, quads, kThreads>(staged_rows, cache.keys, first_key, thread_index);
    if (key_is_quantized && thread_index < kBlockKeys) {
      scales[thread_index] = cache.keys.scale(first_key + thread_index);
    }
    if (value_is_quantized && !value_is_key && thread_index >= kBlockKeys && thread_index < 2 * kBlockKeys) {
      scales[thread_index] = cache.values.scale(first_key + thread_index - kBlockKeys);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool sees = rows.view.sees(first_key, kBlockKeys);
    if (sees) {
      rows.multiply_keys(queries, Keys{staged_rows + member * kSlice});
      partial.write(rows.score, member);
    } else {
      clear(rows.score);  // else it would be alive from block to block
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!value_is_key || kHeadDim == kValueDim) {
      stage_cache<T, kBlockKeys, kValueDim, octets, kThreads>(staged_rows, cache.values, first_key, thread_index);
    }
    if (sees) {
      partial.sum(rows.score);
      if (key_is_quantized) {
        scale_columns(rows, scales);
      }
      rows.softmax(params, rules.in_block(mask_class, walk), first_key);
      if (value_is_quantized) {
        scale_columns(rows, value_is_key ? scales : scales + kBlockKeys);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sees) {
      add_team_values<T, kHeadDim, kValueDim>(rows, staged_rows, member * kValueSlice);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const DecodeTile same(params, layout, place->xyz, kRows);
  const ushort index = thread_index + place->w;
  rows.lane = Lane(index % 32);
  rows.first_row = same.first_row + index / (32 * kTeam) * kFragment;
  store_packed<kValueSlice>(params, rows, same, out, lse, partial_out, partial_lse, index / 32 % kTeam * kValueSlice);
}

#define DECODE(dtype, path, head_dim, value_dim, simdgroups, row_tiles, block_keys)                               \
  template [[host_name("decode_" #dtype "_d" #head_dim "_v" #value_dim "_" #path "_s" #simdgroups "_r" #row_tiles \
                       "_k" #block_keys)]] [[kernel]]                                                             \
  decltype(decode_##path<dtype, head_dim, value_dim, simdgroups, row_tiles, block_keys>)                          \
      decode_##path<dtype, head_dim, value_dim, simdgroups, row_tiles, block_keys>;

}  // namespace mfa
