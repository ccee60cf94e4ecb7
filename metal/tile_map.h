// The work list of a varlen launch: (sequence, tile) for every tile of packed rows, made on the GPU, since the host may
// not know the lengths. One threadgroup. Sequences are dealt into classes of equal log2(rows), the long ones first, so
// that short work fills the GPU at the end; within a class they keep their order, and the tiles of one that sees most
// keys last come last tile first.
#pragma once

#include "layout.h"

namespace mfa {

// Sum of x over all earlier threads; `total` gets the sum over all of them.
template <int kSimdgroups>
inline int exclusive_sum(int x, threadgroup int* sums, ushort simdgroup, ushort lane, thread int& total) {
  const int inside = simd_prefix_exclusive_sum(x);
  if (lane == 31) {
    sums[simdgroup] = inside + x;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int before = 0;
  total = 0;
  MFA_UNROLL
  for (short s = 0; s < kSimdgroups; ++s) {
    before += s < simdgroup ? sums[s] : 0;
    total += sums[s];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return before + inside;
}

// Tiles of sequence i if its rows, in binary, have `bits` digits; 0 otherwise.
template <bool kOfKeys>
inline int tiles_of(constant AttentionParams& params, Layout layout, int i, int bits, int tile_rows) {
  const Sequence sequence = layout.sequence(params, i);
  const int rows = kOfKeys ? sequence.key_length : sequence.query_length;
  return 32 - int(clz(rows)) == bits ? (rows + tile_rows - 1) / tile_rows : 0;
}

// kOfKeys: tiles of keys, for backward_dkdv; of queries otherwise. `tile_rows` rows each; `capacity` entries.
template <bool kOfKeys, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void tile_map(
    const device int* query_starts [[buffer(kQueryStarts)]], const device int* key_starts [[buffer(kKeyStarts)]],
    device int2* map [[buffer(kTileMap)]], constant AttentionParams& params [[buffer(kParams)]],
    constant int2& shape [[buffer(kFirstUnit)]], ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup int sums[kSimdgroups];
  const int tile_rows = shape.x;
  const int capacity = shape.y;
  const Layout layout = {nullptr, query_starts, key_starts, nullptr};  // is_varlen is set
  const int per_thread = (params.sequences + kSimdgroups * 32 - 1) / (kSimdgroups * 32);
  const int first = thread_index * per_thread;
  const int end = min(first + per_thread, params.sequences);
  int base = 0;
  for (int bits = 31; bits > 0; --bits) {
    int count = 0;
    for (int i = first; i < end; ++i) {
      count += tiles_of<kOfKeys>(params, layout, i, bits, tile_rows);
    }
    int total;
    int next = base + exclusive_sum<kSimdgroups>(count, sums, simdgroup, lane, total);
    for (int i = first; i < end; ++i) {
      const int tiles = tiles_of<kOfKeys>(params, layout, i, bits, tile_rows);
      for (int t = 0; t < tiles && next < capacity; ++t, ++next) {
        map[next] = int2(i, params.heavy_first && !kOfKeys ? tiles - 1 - t : t);
      }
    }
    base += total;
  }
  for (int i = base + thread_index; i < capacity; i += kSimdgroups * 32) {
    map[i] = int2(-1, 0);
  }
}

#define TILE_MAP(of, of_keys, simdgroups)                                \
  template [[host_name("tile_map_of_" #of "_s" #simdgroups)]] [[kernel]] \
  decltype(tile_map<of_keys, simdgroups>) tile_map<of_keys, simdgroups>;

}  // namespace mfa
