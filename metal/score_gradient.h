// dS' between backward_dkdv and backward_dq_from_ds: one blob per 8 keys x 8 queries, in the fragment layout, so that
// the lane that wrote two elements reads the same two. In float32: 16 bits would round each dS, which dQ would show.
// Tiles in which no query sees a key are never written.
#pragma once

#include "fragment.h"
#include "params.h"

namespace mfa {

struct ScoreGradient {
  device float* head;  // first blob of a head
  int query_tiles, key_tiles;
  ushort lane_index;

  // `head_index` counts the heads that the scratch holds.
  ScoreGradient(device float* scratch, constant AttentionParams& params, int head_index, ushort lane)
      : query_tiles((params.query_length + kFragment - 1) / kFragment),
        key_tiles((params.key_length + kFragment - 1) / kFragment),
        lane_index(lane) {
    head = scratch + (long(head_index) * query_tiles * key_tiles) * (kFragment * kFragment);
  }

  device float2* blob(int key_tile, int query_tile) const {
    return (device float2*)(head + (long(query_tile) * key_tiles + key_tile) * (kFragment * kFragment)) + lane_index;
  }

  void store(thread Fragment<float>& fragment, int key_tile, int query_tile) const {
    if (key_tile < key_tiles && query_tile < query_tiles) {
      *blob(key_tile, query_tile) = elements(fragment);
    }
  }

  void load(thread Fragment<float>& fragment, int key_tile, int query_tile) const {
    MFA_COUNT_FRAGMENT_LOAD();
    elements(fragment) = *blob(key_tile, query_tile);
  }
};

}  // namespace mfa
