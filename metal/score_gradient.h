// dS' between backward_dkdv and backward_dq_from_ds: one blob per 8 keys x 8 queries, in the fragment layout, so that
// the lane that wrote two elements reads the same two. In float32: 16 bits would round each dS, which dQ would show.
// Tiles in which no query sees a key are never written.
#pragma once

#include "fragment.h"
#include "params.h"

namespace mfa {

struct ScoreGradient {
  device float* scratch;
  int query_tiles, key_tiles;
  long first_tile;  // of the head
  ushort lane_index;

  // `head_index` counts the heads that the scratch holds.
  ScoreGradient(device float* scratch_, constant AttentionParams& params, int head_index, ushort lane)
      : scratch(scratch_),
        query_tiles((params.query_length + kFragment - 1) / kFragment),
        key_tiles((params.key_length + kFragment - 1) / kFragment),
        first_tile(long(head_index) * query_tiles * key_tiles),
        lane_index(lane) {}

  device Fragment<float>* blob(int key_tile, int query_tile) const {
    const long tile = first_tile + long(query_tile) * key_tiles + key_tile;
    return (device Fragment<float>*)(scratch + tile * (kFragment * kFragment)) + lane_index;
  }

  void store(Fragment<float> fragment, int key_tile, int query_tile) const {
    if (key_tile < key_tiles && query_tile < query_tiles) {
      *blob(key_tile, query_tile) = fragment;
    }
  }

  Fragment<float> load(int key_tile, int query_tile) const {
    MFA_COUNT_FRAGMENT_LOAD();
    return *blob(key_tile, query_tile);
  }
};

}  // namespace mfa
