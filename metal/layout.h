// Where the rows of a threadgroup lie: in a dense batch, or in sequences packed one behind the other (varlen). Contents
// of index tensors are not trusted: whatever they hold, no row outside of the tensors is touched.
#pragma once

#include "features.h"
#include "unroll.h"

namespace mfa {

using namespace metal;

// One batch entry or packed sequence. Masks, ALiBi and dropout count rows from its start.
struct Sequence {
  int index;
  int query_length, key_length;
  int first_query, first_key;  // rows of the tensors where it starts
};

// Index tensors; each is bound only where its function constant is on.
struct Layout {
  const device int2* tile_map;     // (sequence, tile) of each threadgroup; sequence -1: nothing to do
  const device int* query_starts;  // cu_seqlens: [sequences + 1]
  const device int* key_starts;    // or [batch]: slot of each cache's first live key
  const device int* key_lengths;   // [batch or sequences]: keys that count; of a cache, slots up to its last live key

  Sequence sequence(constant AttentionParams& params, int index) const {
    int2 queries = int2(0, params.query_length);
    int2 keys = int2(0, params.key_length);
    if (is_varlen) {
      queries = packed(query_starts, index, params.query_length);
    }
    if (has_key_starts && !has_leftpad) {
      keys = packed(key_starts, index, params.key_length);
    }
    if (has_key_lengths) {
      keys.y = min(max(key_lengths[index], 0), keys.y);
    }
    if (has_leftpad) {
      const int first = min(max(key_starts[index], 0), keys.y);
      keys = int2(first, keys.y - first);
    }
    return {index, queries.y, keys.y, queries.x, keys.x};
  }

  // Start and length of packed sequence `index`, of a tensor of `length` rows.
  int2 packed(const device int* starts, int index, int length) const {
    const int start = min(max(starts[index], 0), length);
    return int2(start, min(max(starts[index + 1], start), length) - start);
  }
};

// A threadgroup's place in the work of a launch.
struct Tile {
  Sequence sequence;
  int index;  // tile of the sequence's queries, or of its keys

  // Of `tiles`, the last comes first where queries have the more keys the later they are; 0: keys, in their own order.
  Tile(constant AttentionParams& params, Layout layout, int batch, int y, int tiles)
      : sequence{0, 0, 0, 0, 0}, index(0) {
    if (is_varlen) {
      const int2 entry = layout.tile_map[y];
      if (entry.x >= 0) {
        sequence = layout.sequence(params, entry.x);
        index = entry.y;
      }
    } else {
      sequence = layout.sequence(params, batch);
      index = params.heavy_first && tiles > 0 ? tiles - 1 - y : y;
    }
  }
};

// Where a (sequence, query head) starts in a tensor [batch, query_heads, query_length] of packed or dense rows.
inline long first_row_index(constant AttentionParams& params, Sequence sequence, int head) {
  const uint batch = is_varlen ? 0 : sequence.index;
  return long(batch * params.query_heads + head) * params.query_length + sequence.first_query;
}

}  // namespace mfa
