// Dropout from a counter: Philox4x32-7 (Salmon et al. 2011), keyed on absolute (batch, head, query, key), so that
// forward and backward agree for every tile shape, and on every device. One call makes sixteen bits for each of eight
// keys.
#pragma once

#include "layout.h"

namespace mfa {

using namespace metal;

struct Dropout {
  uint2 seed;
  uint offset;
  uint head;       // batch * query_heads + head
  uint threshold;  // of 65536: a smaller draw drops
  float factor;    // for what is kept

  // `state` is (seed, offset) as two 64-bit integers.
  Dropout(constant AttentionParams& params, Sequence sequence, const device uint* state, int query_head)
      : seed(0),
        offset(0),
        head(sequence.index * params.query_heads + query_head),
        threshold(params.dropout_threshold),
        factor(params.dropout_factor) {
    if (has_dropout) {
      seed = uint2(state[0], state[1]);
      offset = state[2];
    }
  }

  uint4 draw(int query, int key) const {
    uint4 c = uint4(uint(key) / 8, query, head, offset);
    uint2 k = seed;
    MFA_UNROLL
    for (short round = 0; round < 7; ++round) {
      c = uint4(mulhi(0xCD9E8D57u, c.z) ^ c.y ^ k.x, 0xCD9E8D57u * c.z, mulhi(0xD2511F53u, c.x) ^ c.w ^ k.y,
                0xD2511F53u * c.x);
      k += uint2(0x9E3779B9u, 0xBB67AE85u);
    }
    return c;
  }

  float choose(uint4 draws, int key) const {
    const uint slot = uint(key) % 8;
    const uint2 pair = slot < 4 ? draws.xy : draws.zw;  // no index, which would put the vector in memory
    const uint word = slot % 4 < 2 ? pair.x : pair.y;
    const uint bits = word >> (slot % 2 * 16) & 0xFFFFu;
    return bits < threshold ? 0 : factor;
  }

  // What P is multiplied by. Keys of one query: `key` is even, so one call serves both.
  float2 of_keys(int query, int key) const {
    const uint4 draws = draw(query, key);
    return float2(choose(draws, key), choose(draws, key + 1));
  }
  float2 of_queries(int query, int key) const {
    return float2(choose(draw(query, key), key), choose(draw(query + 1, key), key));
  }
};

}  // namespace mfa
