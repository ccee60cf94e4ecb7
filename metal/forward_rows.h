// The inner steps of the forward pass, on the rows of one SIMD-group: S = Q K', scores, online softmax, O += P V.
#pragma once

#include "arguments.h"
#include "correction.h"
#include "mask.h"
#include "rules.h"
#include "tile.h"

namespace mfa {

// One SIMD-group's rows. kPacked: the rows are all query heads of a key head, row = query * group_size + member, so
// that each K and V is read once for the whole group; otherwise they are the queries of one head.
template <typename T, int kHeadDim, int kValueDim, int kRowTiles, int kBlockKeys, bool kPacked = false>
struct Forward {
  static constant constexpr int kTiles = kRowTiles;
  static constant constexpr int kRows = kRowTiles * kFragment;
  static constant constexpr int kKeyTiles = kBlockKeys / kFragment;

  Fragment<float> score[kRowTiles][kKeyTiles];
  Fragment<float> out[kRowTiles][kValueDim / kFragment];
  SoftmaxRow row[kRowTiles];
  float slope_log2[kRowTiles];  // ALiBi
  Lane lane;
  Sequence sequence;
  int first_row;
  int group;
  View view;

  // `head` is the query head, or the first one of the group.
  Forward(constant AttentionParams& params, Sequence sequence_, int first_row_, const device float* sinks,
          const device float* slopes, int head, bool counts_sink, ushort lane_index)
      : lane(lane_index),
        sequence(sequence_),
        first_row(first_row_),
        group(kPacked ? params.group_size : 1),
        view(view_of_queries(params, sequence_, query_of(first_row_), query_of(first_row_ + kRows - 1) + 1)) {
    clear(out);
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const int row_head = head + (kPacked ? (first_row + r * kFragment + lane.row) % group : 0);
      if (has_sinks && counts_sink) {
        row[r].start_with_sink(sinks[row_head], lane.column == 0);
      }
      slope_log2[r] = slope_of(params, sequence, slopes, row_head);
    }
  }

  int query_of(int packed_row) const { return kPacked ? packed_row / group : packed_row; }

  // S = Q K'.
  template <typename Queries, typename Keys>
  void multiply_keys(thread const Queries& queries, Keys keys) {
    multiply_transposed<T, kHeadDim>(score, queries, keys, lane);
  }

  // Whether the scores of a block are S * scale, all of them seen, for all rows of a view. max(S) * scale is the
  // largest only for a scale that is not negative.
  bool is_open(constant AttentionParams& params, thread const Scores<T>& scores, View rows, int first_key) const {
    return !(scores.are_modified() || params.scale_log2 < 0 || !rows.sees_all(first_key, kBlockKeys));
  }

  // The scores that S makes, but for a factor, which it returns. kIsOpen: the block is known to be open.
  template <bool kIsOpen>
  float make_scores(constant AttentionParams& params, Rules<T> rules, int first_key) {
    if (kIsOpen || is_open(params, rules.scores, view, first_key)) {
      return params.scale_log2;
    }
    modify_and_mask(params, rules.scores, first_key);
    return 1;
  }

  // P = softmax step of the scores that S makes.
  void softmax(constant AttentionParams& params, Rules<T> rules, int first_key) {
    const float scale = make_scores<false>(params, rules, first_key);
    rescale(scale);
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      subtract_maximum(r, scale);
      exponentiate(r, rules, first_key);
    }
  }

  // A row's exponents. The fma does not round its product, but the maximum is rounded: of huge scores the difference
  // alone overflows exp2. A branch, since computing both would cost three operations per score.
  void subtract_maximum(short r, float scale) {
    const float maximum = row[r].maximum;
    if (fabs(maximum) > kExactProduct) {
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; ++n) {
        const float2 rounded = score[r][n] * scale;  // within one expression the compiler may make an fma
        score[r][n] = rounded - maximum;
      }
    } else {
      subtract_exactly(r, scale);
    }
  }

  void subtract_exactly(short r, float scale) {
    const float maximum = row[r].maximum;
    MFA_UNROLL
    for (short n = 0; n < kKeyTiles; ++n) {
      score[r][n] = fma(score[r][n], float2(scale), float2(-maximum));
    }
  }

  // A row's P of its exponents.
  void exponentiate(short r, Rules<T> rules, int first_key) {
    float sum = 0;
    MFA_UNROLL
    for (short n = 0; n < kKeyTiles; ++n) {
      const float2 p = fast::exp2(score[r][n]);
      sum += p.x + p.y;
      score[r][n] = p;
      if (has_dropout) {
        score[r][n] *= rules.dropout.of_keys(first_row + r * kFragment + lane.row, first_key + lane.column_of(n));
      }
    }
    row[r].add(sum);
  }

  template <typename Values>
  void add_values(Values values) {
    multiply_accumulate<T, kValueDim>(out, score, values, lane);
  }

  // kMasked is a sentinel of the scaled domain, hence the order.
  void modify_and_mask(constant AttentionParams& params, Scores<T> scores, int first_key) {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const int packed_row = first_row + r * kFragment + lane.row;
      const int query = query_of(packed_row);
      const Scores<T> own = kPacked ? scores.of_member(params, packed_row % group) : scores;
      const Range keys = kPacked && own.hides_block() ? Range{0, -1} : visible_keys(params, sequence, query);
      MFA_UNROLL
      for (short n = 0; n < kKeyTiles; ++n) {
        const int key = first_key + lane.column_of(n);
        float2 derivative;
        const float2 x = own.apply(params, score[r][n], int2(query), int2(key, key + 1), slope_log2[r], derivative);
        score[r][n] = float2(keys.has(key) ? x.x : kMasked, keys.has(key + 1) ? x.y : kMasked);
      }
    }
  }

  // Of a row, this lane's.
  float largest_score(short r) const {
    const float2 first = score[r][0];
    float largest = max(first.x, first.y);
    MFA_UNROLL
    for (short n = 1; n < kKeyTiles; ++n) {
      const float2 x = score[r][n];
      largest = max(largest, max(x.x, x.y));
    }
    return largest;
  }

  // Moves each row's maximum if it has to move, and what was accumulated under the old one with it. No vote before the
  // branch: a GPU skips it as well where no lane takes it.
  void rescale(float scale) {
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const float candidate = row_max(largest_score(r)) * scale;
      if (row[r].is_exceeded(candidate)) {
        const float factor = row[r].move_to(candidate);
        MFA_UNROLL
        for (short j = 0; j < kValueDim / kFragment; ++j) {
          out[r][j] *= factor;
        }
      }
    }
  }

  // `first_dim` is that of a slice of Dv, of which this is one.
  void store(constant AttentionParams& params, device T* out_tensor, device float* lse, device half* correction,
             int head, int first_dim = 0) {
    float inverse[kRowTiles];
    MFA_UNROLL
    for (short r = 0; r < kRowTiles; ++r) {
      const float sum = row_sum(row[r].sum);
      inverse[r] = sum == 0 ? 0 : 1 / sum;
      const int i = first_row + lane.row + r * kFragment;
      if (writes_lse && first_dim == 0 && lane.column == 0 && i < sequence.query_length) {
        lse[first_row_index(params, sequence, head) + i] = log_sum_exp(row[r].maximum, sum);
      }
    }
    const long offset = uint(sequence.index) * params.out_strides[0] + uint(head) * params.out_strides[1] +
                        uint(sequence.first_query) * params.out_strides[2] + first_dim;
    const int dim = is_exact_head ? kValueDim : params.value_dim - first_dim;
    store_rows<T, kValueDim>(out_tensor + offset, params.out_strides[2], first_row, sequence.query_length, dim, out,
                             inverse, lane);
    if (has_correction) {
      keep_rounding<T>(out, inverse);
      store_rows<half, kValueDim>(correction + offset, params.out_strides[2], first_row, sequence.query_length, dim,
                                  out, inverse, lane);
    }
  }
};

}  // namespace mfa
