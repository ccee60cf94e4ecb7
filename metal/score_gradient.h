// dS' between backward_dkdv and backward_dq_from_ds: one blob per 8 keys x 8 queries, in the fragment layout, so that
// the lane that wrote two elements reads the same two. In float32: 16 bits would round each dS, which dQ would show.
// Tiles in which no query sees a key are never written.
#pragma once

#include "fragment.h"
#include "params.h"

namespace mfa {

constant constexpr int kBlob = 32;  // lanes

struct ScoreGradient {
  device Fragment<float>* base;  // this lane's part of the head's first blob
  int query_tiles, key_tiles, stride;

  // `head_index` counts the heads that the scratch holds; key tiles count from `first_key_tile` on.
  ScoreGradient(device float* scratch, constant AttentionParams& params, int head_index, ushort lane_index,
                int first_key_tile = 0)
      : query_tiles((params.query_length + kFragment - 1) / kFragment),
        key_tiles((params.key_length + kFragment - 1) / kFragment - first_key_tile),
        stride((params.key_length + kFragment - 1) / kFragment) {
    base = (device Fragment<float>*)scratch + (first_key_tile * kBlob + lane_index);
    base += long(uint(head_index)) * query_tiles * stride * kBlob;
  }

  device Fragment<float>* blob(int key_tile, int query_tile) const {
    return base + (long(uint(query_tile)) * stride + key_tile) * kBlob;
  }

  // Of the first key tile there is at least one key.
  void store(Fragment<float> fragment, int key_tile, int query_tile) const {
    if ((key_tile == 0 || key_tile < key_tiles) && query_tile < query_tiles) {
      *blob(key_tile, query_tile) = fragment;
    }
  }

  Fragment<float> load(int key_tile, int query_tile) const {
    MFA_COUNT_FRAGMENT_LOAD();
    return *blob(key_tile, query_tile);
  }
};

}  // namespace mfa
