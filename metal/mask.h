// Who sees whom. One primitive: a window relative to the lower-right diagonal; causal is a window. Query i sees key j
// iff i + Lk - Lq - left <= j <= i + Lk - Lq + right, so both bounds of a range grow with the row, in either direction.
#pragma once

#include "layout.h"

namespace mfa {

// first .. last; nothing when last < first.
struct Range {
  int first, last;

  bool has(int i) const { return i >= first && i <= last; }
  // Of neighbours i and i + 1: 0 where they are outside.
  float2 keep(float2 x, int i) const { return float2(has(i) ? x.x : 0, has(i + 1) ? x.y : 0); }
};

inline Range visible_keys(constant AttentionParams& params, Sequence sequence, int row) {
  Range range = {0, sequence.key_length - 1};
  if (has_window) {
    const int diagonal = row + sequence.key_length - sequence.query_length;
    range.first = max(range.first, diagonal - params.window_left);
    range.last = min(range.last, diagonal + params.window_right);
  }
  return range;
}

inline Range visible_queries(constant AttentionParams& params, Sequence sequence, int key) {
  Range range = {0, sequence.query_length - 1};
  if (has_window) {
    const int diagonal = key - sequence.key_length + sequence.query_length;
    range.first = max(range.first, diagonal - params.window_right);
    range.last = min(range.last, diagonal + params.window_left);
  }
  return range;
}

// What a tile of rows sees on the other side. Without a window, bounds are those of the sequence, which take no
// registers.
struct View {
  Range any;  // seen by at least one row
  Range all;  // seen by every row
  bool is_empty;

  bool sees(int first, int count) const {
    return !is_empty && any.first <= any.last && first <= any.last && first + count > any.first;
  }
  bool sees_all(int first, int count) const { return first >= all.first && first + count - 1 <= all.last; }

  int end() const { return is_empty || any.last < any.first ? 0 : any.last + 1; }
  int begin() const { return end() == 0 ? 0 : any.first; }
  int first_block(int block) const { return begin() / block; }
  int end_block(int block) const { return (end() + block - 1) / block; }
};

// Query rows first_row .. end_row - 1; rows past the last query do not count.
inline View view_of_queries(constant AttentionParams& params, Sequence sequence, int first_row, int end_row) {
  const int last_row = min(end_row, sequence.query_length) - 1;
  const Range top = visible_keys(params, sequence, first_row);
  const Range bottom = visible_keys(params, sequence, last_row);
  const bool is_empty = last_row < first_row;
  return {{top.first, bottom.last}, {bottom.first, is_empty ? -1 : top.last}, is_empty};
}

// Keys first_key .. end_key - 1, and the queries that see them; keys past the last do not count.
inline View view_of_keys(constant AttentionParams& params, Sequence sequence, int first_key, int end_key) {
  const int last_key = min(end_key, sequence.key_length) - 1;
  const Range top = visible_queries(params, sequence, first_key);
  const Range bottom = visible_queries(params, sequence, last_key);
  return {{top.first, bottom.last}, {bottom.first, top.last}, last_key < first_key};
}

}  // namespace mfa
