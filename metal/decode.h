// Attention of few queries over a long cache. One SIMD-group per (key head and row tile, part of the keys, batch
// entry): its rows are the queries of all heads of the group (PackGQA), so that each K and V is read once, and comes
// straight from device memory into fragments. A part's result goes to scratch, where combine merges the parts in a
// fixed order.
//
//   for each key block of this part that a row sees:
//     S = Q K' (times the keys' scales), P = softmax step, O += P (times the values' scales) V
//   store O / l and m + log l, of the whole or of the part
#pragma once

#include "cache.h"
#include "forward_rows.h"

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

// Of a quantized cache: S takes the scale of its key, and P, after it was summed, that of its value.
template <typename T, typename Rows>
inline void scale_columns(thread Rows& rows, thread const Cache<T>& cache, int first_key, ushort lane_index) {
  if (is_quantized) {
    // Each lane reads one scale, and all lanes share them.
    const float own = lane_index < Rows::kKeyTiles * kFragment ? cache.scale(first_key + lane_index) : 0;
    MFA_UNROLL
    for (short n = 0; n < Rows::kKeyTiles; ++n) {
      const ushort column = n * kFragment + rows.lane.column;
      const float2 scale = float2(simd_shuffle(own, column), simd_shuffle(own, column + 1));
      MFA_UNROLL
      for (short r = 0; r < Rows::kTiles; ++r) {
        rows.score[r][n] *= scale;
      }
    }
  }
}

// Whether a mask hides a block of keys from all of a tile's rows: then K and V are not read, as where a static cache is
// longer than what lives in it. A lane looks at one key, and stops at a row that sees it, so that an open block costs
// an element per key.
template <typename T, int kRows, int kBlockKeys>
inline bool is_hidden(constant AttentionParams& params, Scores<T> scores, int first_row, int row_count, int first_key,
                      ushort lane_index) {
  if (!has_bias) {
    return false;
  }
  const int key = min(first_key + lane_index % kBlockKeys, scores.key_length - 1);
  const bool is_shared = params.bias_heads == 1 && params.bias_rows == 1;
  const int end = is_shared ? first_row + 1 : min(first_row + kRows, row_count);
  bool hides = true;
  for (int row = first_row; row < end && hides; ++row) {
    hides = scores.of_member(params, row % params.group_size).hides(params, row / params.group_size, key);
  }
  return simd_all(hides);
}

template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(32)]] void decode(
    const device T* query [[buffer(kQuery)]], const device uchar* key [[buffer(kKey)]],
    const device uchar* value [[buffer(kValue)]], device T* out [[buffer(kOut)]],
    device float* lse [[buffer(kLse), function_constant(writes_lse)]],
    device float* partial_out [[buffer(kPartialOut), function_constant(is_split)]],
    device float* partial_lse [[buffer(kPartialLse), function_constant(is_split)]],
    const device uchar* bias [[buffer(kBias), function_constant(has_bias)]],
    const device float* sinks [[buffer(kSinks), function_constant(has_sinks)]],
    const device float* alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],
    const device int* key_lengths [[buffer(kKeyLengths), function_constant(has_key_lengths)]],
    constant int* block_table [[buffer(kBlockTable), function_constant(is_paged)]],
    const device float* key_scale [[buffer(kKeyScale), function_constant(is_quantized)]],
    const device float* value_scale [[buffer(kValueScale), function_constant(is_quantized)]],
    constant AttentionParams& params [[buffer(kParams)]], uint3 position [[threadgroup_position_in_grid]],
    ushort lane_index [[thread_index_in_simdgroup]]) {
  constexpr int kRows = kRowTiles * kFragment;
  typedef Forward<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys, true> Rows;
  const int key_head = position.x % params.key_heads;
  const int first_row = position.x / params.key_heads * kRows;
  const int part = position.y;
  const Sequence sequence = Layout{nullptr, nullptr, nullptr, key_lengths}.sequence(params, position.z);
  const int head = key_head * params.group_size;
  const int row_count = sequence.query_length * params.group_size;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;

  // A sink belongs to one part only.
  Rows rows(params, sequence, first_row, sinks, alibi_slopes, head, part == 0, lane_index);
  const PackedRows<T> packed = {query + sequence.index * params.query_strides[0] + head * params.query_strides[1],
                                long(params.query_strides[1]),
                                long(params.query_strides[2]),
                                first_row,
                                row_count,
                                params.group_size,
                                head_dim};
  // Q beside O takes more registers than a thread of M1 has at D 128 with two row tiles, and nearly all at D 256.
  constexpr Own kOwn = kRowTiles * kHeadDim > 192 ? reread : held;
  const OwnOperand<T, kOwn, kRowTiles, kHeadDim, PackedRows<T>> queries(packed, rows.lane);
  const Rules<T> rules(params, sequence, bias, nullptr, alibi_slopes, nullptr, head);
  const Cache<T> keys(params, key, block_table, key_scale, params.key_strides, params.key_scale_strides, sequence.index,
                      key_head, sequence.key_length, head_dim);
  const Cache<T> values(params, value, block_table, value_scale, params.value_strides, params.value_scale_strides,
                        sequence.index, key_head, sequence.key_length, value_dim);

  const int blocks = params.split_keys / kBlockKeys;
  const int begin = max(rows.view.first_block(kBlockKeys), part * blocks);
  const int end = min(rows.view.end_block(kBlockKeys), (part + 1) * blocks);
  for (int block = begin; block < end; ++block) {
    const int first_key = block * kBlockKeys;
    if (is_hidden<T, kRows, kBlockKeys>(params, rules.scores, first_row, row_count, first_key, lane_index)) {
      continue;
    }
    rows.multiply_keys(queries.operand, CacheRows<T, Rows::kKeyTiles>(keys, first_key));
    scale_columns(rows, keys, first_key, lane_index);
    rows.softmax(params, rules, first_key);
    scale_columns(rows, values, first_key, lane_index);
    rows.add_values(CacheRows<T, Rows::kKeyTiles>(values, first_key));
  }

  MFA_UNROLL
  for (short r = 0; r < kRowTiles; ++r) {
    const int row = first_row + r * kFragment + rows.lane.row;
    const float sum = row_sum(rows.row[r].sum);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    if (row < row_count) {
      const int query_head = head + row % params.group_size;
      const long index =
          (long(sequence.index) * params.query_heads + query_head) * params.query_length + row / params.group_size;
      const long partial_index = index + long(part) * params.batch * params.query_heads * params.query_length;
      device T* target = out + (sequence.index * params.out_strides[0] + query_head * params.out_strides[1] +
                                row / params.group_size * params.out_strides[2]);
      MFA_UNROLL
      for (short s = 0; s < sets_of(kValueDim); ++s) {
        thread Fragment<float>* set = &rows.out[r][s * kSetFragments];
        if (is_split) {
          store_set<kValueDim>(partial_out + partial_index * value_dim, value_dim, set, s, inverse, rows.lane);
        } else {
          store_set<kValueDim>(target, value_dim, set, s, inverse, rows.lane);
        }
      }
      if (rows.lane.column == 0) {
        const float natural = log_sum_exp(rows.row[r].maximum, sum);
        if (is_split) {
          partial_lse[partial_index] = natural;
        } else if (writes_lse) {
          lse[index] = natural;
        }
      }
    }
  }
}

#define DECODE(dtype, head_dim, value_dim, row_tiles, block_keys)                                                    \
  template                                                                                                           \
      [[host_name("decode_" #dtype "_d" #head_dim "_v" #value_dim "_r" #row_tiles                                    \
                  "_k" #block_keys)]] [[kernel]] decltype(decode<dtype, head_dim, value_dim, row_tiles, block_keys>) \
          decode<dtype, head_dim, value_dim, row_tiles, block_keys>;

}  // namespace mfa
