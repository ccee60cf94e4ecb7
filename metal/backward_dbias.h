// dBias = dS, summed over the dimensions in which the bias broadcasts. One threadgroup per tile of the bias: it visits,
// in a fixed order, every (batch, head) and every tile of queries and keys that this part of the bias was added to, and
// recomputes dS there. So the sum needs neither atomics nor memory beyond the bias's own size.
//
//   for each batch, head, query tile, key tile that the tile of the bias stands for:
//     P = exp2(score - lse), dP = dO V', sum += P (dP - delta)
//   reduce over rows and columns where they broadcast, store
#pragma once

#include "backward.h"
#include "device_rows.h"

namespace mfa {

// kRowTiles * 8 queries and kBlockKeys keys: dS, summed over what a tile of the bias stands for.
template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys>
struct BackwardBias {
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kKeyTiles = kBlockKeys / kFragment;

  Fragment<float> sum[kRowTiles][kKeyTiles];
  Lane lane;

  explicit BackwardBias(ushort lane_index) : lane(lane_index) { clear(sum); }

  template <typename Keys, typename Values>
  void add_block(constant AttentionParams& params, Sequence sequence, Rules<T> rules, HeadRows<T> queries, Keys keys,
                 Values values, HeadRows<T> grad_outs, const device float2* statistics, int first_row, int first_key,
                 bool masked) {
    Fragment<float> score[kRowTiles][kKeyTiles];
    Fragment<float> dp[kRowTiles][kKeyTiles];
    typedef OwnRows<T, kRowTiles> Own;
    const ReadRows<T, kHeadDim, Own> left_queries = {Own(queries, first_row, lane)};
    const ReadRows<T, kValueDim, Own> left_grad_outs = {Own(grad_outs, first_row, lane)};
    keep_in_loop();  // among keys
    multiply_transposed<T, kHeadDim>(score, left_queries, keys, lane);
    multiply_transposed<T, kValueDim>(dp, left_grad_outs, values, lane);
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const int query = first_row + r * kFragment + lane.row;
      const Range seen = query < params.query_length ? visible_keys(params, sequence, query) : Range{0, -1};
      const float2 row = statistics[min(query, params.query_length - 1)];
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; ++n) {
        const int key = first_key + lane.column_of(n);
        float2 derivative;
        const float2 p =
            probability(params, rules, score[r][n], int2(query), int2(key, key + 1), float2(row.x), derivative);
        float2 grad = dp[r][n];
        if (has_dropout) {
          grad *= rules.dropout.of_keys(query, key);
        }
        grad = p * (grad - row.y);
        sum[r][n] += masked ? seen.keep(grad, key) : grad;
      }
    }
  }

  void sum_rows() {
    MFA_UNROLL
    for (short n = 0; n < kKeyTiles; ++n) {
      float2 x = sum[0][n];
      MFA_UNROLL
      for (short r = 1; r < kRowTiles; ++r) {
        x += sum[r][n];
      }
      x += simd_shuffle_xor(x, 2);
      x += simd_shuffle_xor(x, 4);
      sum[0][n] = x + simd_shuffle_xor(x, 16);
    }
  }

  // Afterwards element (row, 0) holds its row's sum.
  void sum_columns() {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      float2 x = float2(0);
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; ++n) {
        x += sum[r][n];
      }
      sum[r][0] = float2(row_sum(x.x + x.y), 0);
    }
  }
};

// How K and V of a block get to the products.
template <Path kPath>
struct BiasBlocks;

// Straight from device memory.
template <>
struct BiasBlocks<staged> {
  static constant constexpr int kRowTiles = 1;

  template <typename T, int kHeadDim, int kValueDim, int kBlockKeys>
  static void add_block(thread BackwardBias<T, kHeadDim, kValueDim, kRowTiles, kBlockKeys>& bias,
                        constant AttentionParams& params, Sequence sequence, Rules<T> rules, HeadRows<T> queries,
                        HeadRows<T> keys, HeadRows<T> values, HeadRows<T> grad_outs, const device float2* statistics,
                        int first_row, int first_key) {
    bias.add_block(params, sequence, rules, queries, DeviceRows<T, kHeadDim, quads>(keys.from(first_key), bias.lane),
                   DeviceRows<T, kValueDim, quads>(values.from(first_key), bias.lane), grad_outs, statistics, first_row,
                   first_key, true);
  }
};

template <Path kPath, typename T, int kHeadDim, int kValueDim, int kSimdgroups, int kBlockKeys>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void backward_dbias(
    MFA_GRADIENT_ARGUMENTS, const device uchar* bias [[buffer(kBias)]],
    const device float* alibi_slopes [[buffer(kAlibiSlopes), function_constant(has_alibi)]],
    const device uint* rng_state [[buffer(kRngState), function_constant(has_dropout)]],
    device float* grad_bias [[buffer(kGradBias)]], MFA_PLACE_ARGUMENTS) {
  typedef BiasBlocks<kPath> Blocks;
  typedef BackwardBias<T, kHeadDim, kValueDim, Blocks::kRowTiles, kBlockKeys> Bias;
  constexpr int kRows = Bias::kRows;
  threadgroup float2 partial[kSimdgroups][kBlockKeys / 2];  // column sums, where rows broadcast
  const bool one_row = params.bias_rows == 1;
  const bool one_column = params.bias_columns == 1;
  const int bias_batch = position.z / params.bias_heads;
  const int bias_head = position.z % params.bias_heads;
  const int head_dim = is_exact_head ? kHeadDim : params.head_dim;
  const int value_dim = is_exact_head ? kValueDim : params.value_dim;

  // A broadcast dimension is visited whole, any other one in this tile alone.
  const int batch_end = params.bias_batch == 1 ? params.batch : bias_batch + 1;
  const int head_end = params.bias_heads == 1 ? params.query_heads : bias_head + 1;
  const int own_row = (position.y * kSimdgroups + simdgroup) * kRows;
  const int row_end = one_row ? params.query_length : min(own_row + kRows, params.query_length);
  const int own_key = position.x * kBlockKeys;
  const int key_end = one_column ? params.key_length : min(own_key + kBlockKeys, params.key_length);

  Bias tile(lane_index);
  for (int b = bias_batch; b < batch_end; ++b) {
    for (int h = bias_head; h < head_end; ++h) {
      const int key_head = h / params.group_size;
      const Sequence sequence = {b, params.query_length, params.key_length, 0, 0};
      const HeadRows<T> queries = query_rows(query, params.query_strides, sequence, h, head_dim);
      const HeadRows<T> grad_outs = query_rows(grad_out, params.grad_out_strides, sequence, h, value_dim);
      const HeadRows<T> keys = key_rows(key, params.key_strides, sequence, key_head, head_dim);
      const HeadRows<T> values = key_rows(value, params.value_strides, sequence, key_head, value_dim);
      const Rules<T> rules(params, sequence, bias, nullptr, alibi_slopes, rng_state, h);
      for (int row = own_row; row < row_end; row += kSimdgroups * kRows) {
        const View view = view_of_queries(params, sequence, row, row + kRows);
        for (int first = own_key; first < key_end; first += kBlockKeys) {
          if (view.sees(first, kBlockKeys)) {
            Blocks::add_block(tile, params, sequence, rules, queries, keys, values, grad_outs,
                              statistics + first_row_index(params, sequence, h), row, first);
          }
        }
      }
    }
  }

  if (one_column) {
    tile.sum_columns();
  }
  const Lane lane = tile.lane;
  device float* target = grad_bias + long(position.z) * params.bias_rows * params.bias_columns;
  if (one_row) {
    tile.sum_rows();
    MFA_UNROLL
    for (short n = 0; n < kBlockKeys / kFragment; ++n) {
      if (lane.row == 0) {
        partial[simdgroup][lane.column_of(n) / 2] = tile.sum[0][n];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int column = own_key + lane_index;
    if (simdgroup == 0 && lane_index < kBlockKeys && column < params.bias_columns) {
      float total = 0;
      MFA_UNROLL
      for (short s = 0; s < kSimdgroups; ++s) {
        total += partial[s][lane_index / 2][lane_index % 2];
      }
      target[column] = total;
    }
    return;
  }
  MFA_UNROLL
  for (short r = 0; r < Blocks::kRowTiles; ++r) {
    const int row = own_row + r * kFragment + lane.row;
    if (row >= params.query_length) {
      continue;
    }
    MFA_UNROLL
    for (short n = 0; n < kBlockKeys / kFragment; ++n) {
      MFA_UNROLL
      for (short e = 0; e < 2; ++e) {
        const int column = own_key + lane.column_of(n) + e;
        if (column < params.bias_columns) {
          target[long(row) * params.bias_columns + column] = tile.sum[r][n][e];
        }
      }
    }
  }
}

#define BACKWARD_DBIAS(dtype, path, head_dim, value_dim, simdgroups, block_keys)                 \
  template[[host_name("backward_dbias_" #dtype "_d" #head_dim "_v" #value_dim MFA_IN_NAME_##path \
                      "_s" #simdgroups "_k" #block_keys)]] [[kernel]]                            \
  decltype(backward_dbias<path, dtype, head_dim, value_dim, simdgroups, block_keys>)             \
      backward_dbias<path, dtype, head_dim, value_dim, simdgroups, block_keys>;

}  // namespace mfa
