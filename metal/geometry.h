// Sizes that the kernels' threadgroup arrays and the host's catalogue must agree on. Compiled as MSL and as C++.
#pragma once

namespace mfa {

// How fragments of K and V reach a SIMD-group; in a team, which shares rows (team.h), as staged. And on the matrix
// unit, where they do so directly (unit/forward.h, unit/forward_team.h).
enum Path { staged, direct, team, unit, unit_team };
constexpr int kTeamMembers = 4;

constexpr bool is_on_unit(Path path) { return path == unit || path == unit_team; }

// What the names of backward kernels say of it.
#define MFA_IN_NAME_staged ""
#define MFA_IN_NAME_team "_team"
#define MFA_IN_NAME_unit "_unit"
#define MFA_IN_NAME_unit_team "_unit_team"

// SIMD-groups that share rows, by D; and keys, by D and Dv, in the backward pass on the matrix unit, where one holds
// 128 columns of dK and dV, or 160. Other teams of the backward pass are the whole threadgroup.
constexpr int members_of(Path path, int head_dim) {
  return path == team ? kTeamMembers : path == unit_team ? (head_dim <= 256 ? 2 : 4) : 1;
}
constexpr int unit_members_of_keys(int head_dim, int value_dim) {
  const int members = (head_dim + value_dim) / 128;
  return members < 2 ? 2 : members;
}

// That a threadgroup owns: rows, or in backward_dkdv keys.
constexpr int rows_of(Path path, int head_dim, int simdgroups, int row_tiles) {
  return 8 * row_tiles * simdgroups / members_of(path, head_dim);
}
constexpr int backward_dq_rows(Path path, int head_dim, int simdgroups, int row_tiles) {
  return path == team ? 8 * row_tiles : rows_of(path, head_dim, simdgroups, row_tiles);
}
constexpr int backward_dkdv_rows(Path path, int head_dim, int value_dim, int simdgroups, int row_tiles) {
  return path == team
             ? 8 * row_tiles
             : 8 * row_tiles * simdgroups / (path == unit_team ? unit_members_of_keys(head_dim, value_dim) : 1);
}
constexpr int backward_dbias_rows(Path path, int simdgroups) { return (path == unit ? 16 : 8) * simdgroups; }

// Threadgroup memory of a staged kernel. split: K and V side by side, Q in registers. shared: K and V take turns in one
// buffer, Q beside it.
enum Memory { split, shared };

// Where a SIMD-group's own left operands are: in registers for the whole kernel, or read again for every block.
enum Own { held, reread };

// What is loaded from rows in threadgroup memory: quads of neighbouring rows (K in Q K'), octets (V in P V), or both.
// Or pairs, instead of quads: rows 2i and 2i + 1 are interleaved, element by element, as fragments have them
// (fragment.h): half of the loads, and nothing to move.
enum Loads { quads, octets, both, pairs };

// Padding makes a row an odd number of four or of eight of 32 banks of 4 bytes. Then no load conflicts if the banks
// serve a whole SIMD-group at once; and, for one kind of loads and 16-bit quads and octets or 32-bit quads, none if
// they serve 128 bytes of neighbouring lanes at a time, as NVIDIA's do.
constexpr int padded_row_bytes(int dim, int element_size, Loads loads) {
  const int bytes = dim * element_size;  // a multiple of 32
  if (loads == pairs) {
    return bytes;
  }
  const bool eight = (element_size == 2 && loads == octets) || (element_size == 4 && loads == quads);
  return bytes + (!eight ? 16 : bytes % 64 == 0 ? 32 : 0);
}

// Pairs are swizzled instead: chunk c of 16 bytes of a set lies where chunk c ^ swizzle_of_pair() would. No padding
// would do for banks that serve 64 bytes of neighbouring lanes at a time as well as for those that serve 128. whole: a
// set of 32 values of the head dimension, not of the 16 that may be left at the end.
constexpr int swizzle_of_pair(int dim, int element_size, int pair, bool whole) {
  return element_size == 4 ? pair % 2 * (whole ? 1 : 6)
         : whole           ? pair % 2 * (dim % 32 == 0 ? 6 : 2)
                           : (pair ^ pair / 2) % 2 * 2;
}

// Rows that are read in both ways: in 16 bits a copy for each, in 32, which would not fit, one.
constexpr int paired_row_bytes(int dim, int element_size) {
  return element_size == 2 ? padded_row_bytes(dim, element_size, pairs) : 0;
}
constexpr int plain_row_bytes(int dim, int element_size) {
  return padded_row_bytes(dim, element_size, element_size == 2 ? octets : both);
}

constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int forward_threadgroup_bytes(Path path, Memory memory, int head_dim, int value_dim, int block_queries,
                                        int block_keys, int element_size) {
  // K and V of a team take turns; beside them are the members' partial scores.
  // Of a team on the matrix unit, these alone, of two blocks.
  return path == direct || path == unit ? 0
         : path == unit_team ? 2 * members_of(path, head_dim) * block_queries * block_keys * int(sizeof(float))
         : path == team      ? block_keys * larger(padded_row_bytes(head_dim, element_size, quads),
                                                   padded_row_bytes(value_dim, element_size, octets)) +
                                   kTeamMembers * block_queries * block_keys * int(sizeof(float))
         : memory == split   ? block_keys * (padded_row_bytes(head_dim, element_size, pairs) +
                                             padded_row_bytes(value_dim, element_size, octets))
                             : block_queries * padded_row_bytes(head_dim, element_size, octets) +
                                   block_keys * larger(padded_row_bytes(head_dim, element_size, pairs),
                                                       padded_row_bytes(value_dim, element_size, octets));
}

// K and V of a block of keys, and their scales. Those of a team as above, and where it works.
constexpr int decode_threadgroup_bytes(Path path, int head_dim, int value_dim, int rows, int block_keys,
                                       int element_size) {
  return path == direct || path == unit ? 0
         : path == unit_team
             ? forward_threadgroup_bytes(path, shared, head_dim, value_dim, rows, block_keys, element_size)
             : block_keys * 2 * int(sizeof(float)) +
                   (path == team
                        ? forward_threadgroup_bytes(team, shared, head_dim, value_dim, rows, block_keys, element_size) +
                              4 * int(sizeof(int))
                        : block_keys * (padded_row_bytes(head_dim, element_size, quads) +
                                        padded_row_bytes(value_dim, element_size, octets)));
}

// Of D and Dv: above it, the accumulators of dK and dV don't fit in registers together, so each has a launch of its
// own. A SIMD-group has 8 keys, or on the matrix unit 16.
constexpr int kLargestPair = 256;
constexpr int kLargestUnitPair = 128;

// Plain copies of Q and dO, in one place: dK needs that of Q, dV that of dO.
constexpr bool plain_copies_take_turns(int head_dim, int value_dim, int element_size) {
  return element_size == 2 && head_dim + value_dim > kLargestPair;
}

// K of a block of keys.
constexpr int backward_dq_from_ds_threadgroup_bytes(int head_dim, int block_keys, int element_size) {
  return block_keys * padded_row_bytes(head_dim, element_size, pairs);
}

// Of every SIMD-group, its part of a block's scores or of dP.
constexpr int team_scores_bytes(int simdgroups, int row_tiles, int block) {
  return simdgroups * row_tiles * 8 * block * int(sizeof(float));
}

// Q, dO and the statistics of a block of queries. Of a team (backward_team.h), Q and dO in turns, and the members'
// parts of scores and of dP; on the matrix unit these alone.
constexpr int backward_dkdv_threadgroup_bytes(Path path, int head_dim, int value_dim, int simdgroups, int row_tiles,
                                              int block_queries, int element_size) {
  const int scores =
      path == team || path == unit_team ? 2 * team_scores_bytes(simdgroups, row_tiles, block_queries) : 0;
  const int queries = plain_row_bytes(head_dim, element_size);
  const int grad_outs = plain_row_bytes(value_dim, element_size);
  const int row =
      is_on_unit(path) ? 0
      : path == team
          ? larger(padded_row_bytes(head_dim, element_size, both), padded_row_bytes(head_dim, element_size, octets))
          : paired_row_bytes(head_dim, element_size) + paired_row_bytes(value_dim, element_size) +
                (plain_copies_take_turns(head_dim, value_dim, element_size) ? larger(queries, grad_outs)
                                                                            : queries + grad_outs) +
                2 * int(sizeof(float));
  return block_queries * row + scores;
}

// K and V of a block of keys. Of a team K, and the members' parts of scores and then of dP; on the matrix unit such
// parts alone, in two places.
constexpr int backward_dq_threadgroup_bytes(Path path, int head_dim, int value_dim, int simdgroups, int row_tiles,
                                            int block_keys, int element_size) {
  const int scores = team_scores_bytes(simdgroups, row_tiles, block_keys);
  return path == unit        ? 0
         : path == unit_team ? 2 * scores
         : path == team
             ? block_keys * padded_row_bytes(head_dim, element_size, both) + scores
             : block_keys * (paired_row_bytes(head_dim, element_size) + plain_row_bytes(head_dim, element_size) +
                             padded_row_bytes(value_dim, element_size, pairs));
}

}  // namespace mfa
