// The work list of a varlen launch: (sequence, tile) for every tile of packed rows, made on the GPU, since the host may
// not know the lengths. One threadgroup. Sequences are dealt into classes of equal log2(length), the long ones first,
// so that short work fills the GPU at the end; within a class they keep their order, and the tiles of one that sees
// most keys last come last tile first. The length is that of the rows, or over a cache, where one query may see many
// keys, that of the keys.
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

// What rows are. packed: the queries of all heads of a key head, for decode.
enum MappedRows { queries, keys, packed };

// Tiles of sequence i if its length, in binary, has `bits` digits; 0 otherwise.
template <MappedRows kRows>
inline int tiles_of(constant AttentionParams& params, Layout layout, int i, int bits, int tile_rows) {
  const Sequence sequence = layout.sequence(params, i);
  const int length = kRows == queries ? sequence.query_length : sequence.key_length;
  const int rows = kRows == packed ? sequence.query_length * params.group_size : length;
  return 32 - int(clz(length)) == bits ? (rows + tile_rows - 1) / tile_rows : 0;
}

// `tile_rows` rows per tile; `capacity` entries.
template <MappedRows kRows, int kSimdgroups>
[[kernel, max_total_threads_per_threadgroup(kSimdgroups * 32)]] void tile_map(
    const device int* query_starts [[buffer(kQueryStarts)]],
    const device int* key_starts [[buffer(kKeyStarts), function_constant(has_key_starts)]],
    const device int* key_lengths [[buffer(kKeyLengths), function_constant(has_key_lengths)]],
    device int2* map [[buffer(kTileMap)]], constant AttentionParams& params [[buffer(kParams)]],
    constant int2& shape [[buffer(kFirstUnit)]], ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup int sums[kSimdgroups];
  const int tile_rows = shape.x;
  const int capacity = shape.y;
  const Layout layout = {nullptr, query_starts, key_starts, key_lengths};  // is_varlen is set
  const int per_thread = (params.sequences + kSimdgroups * 32 - 1) / (kSimdgroups * 32);
  const int first = thread_index * per_thread;
  const int end = min(first + per_thread, params.sequences);
  int base = 0;
  constexpr int kFewest = kRows == packed ? 0 : 1;  // rows over an empty cache have tiles too
  for (int bits = 31; bits >= kFewest; --bits) {
    int count = 0;
    for (int i = first; i < end; ++i) {
      count += tiles_of<kRows>(params, layout, i, bits, tile_rows);
    }
    int total;
    int next = base + exclusive_sum<kSimdgroups>(count, sums, simdgroup, lane, total);
    for (int i = first; i < end; ++i) {
      const int tiles = tiles_of<kRows>(params, layout, i, bits, tile_rows);
      for (int t = 0; t < tiles && next < capacity; ++t, ++next) {
        map[next] = int2(i, params.heavy_first && kRows != keys ? tiles - 1 - t : t);
      }
    }
    base += total;
  }
  for (int i = base + thread_index; i < capacity; i += kSimdgroups * 32) {
    map[i] = int2(-1, 0);
  }
}

#define TILE_MAP(of, simdgroups)                                         \
  template [[host_name("tile_map_of_" #of "_s" #simdgroups)]] [[kernel]] \
  decltype(tile_map<of, simdgroups>) tile_map<of, simdgroups>;

}  // namespace mfa
