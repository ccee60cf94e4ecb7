// Sizes that the kernels' threadgroup arrays and the host's catalogue must agree on. Compiled as MSL and as C++.
#pragma once

namespace mfa {

// How fragments of K and V reach a SIMD-group.
enum Path { staged, direct };
// Threadgroup memory of a staged kernel. split: K and V side by side, Q in registers. shared: K and V take turns in one
// buffer, Q beside it.
enum Memory { split, shared };

// Where a SIMD-group's own left operands are: in registers for the whole kernel, or read again for every block.
enum Own { held, reread };

// 16 bytes of padding shift each row by four banks: K- and V-type loads then conflict in none of a 32-bank model.
constexpr int padded_row_bytes(int head_dim, int element_size) { return head_dim * element_size + 16; }

constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int forward_threadgroup_bytes(Path path, Memory memory, int head_dim, int value_dim, int block_queries,
                                        int block_keys, int element_size) {
  return path == direct ? 0
         : memory == split
             ? block_keys * (padded_row_bytes(head_dim, element_size) + padded_row_bytes(value_dim, element_size))
             : block_queries * padded_row_bytes(head_dim, element_size) +
                   block_keys * padded_row_bytes(larger(head_dim, value_dim), element_size);
}

// Q, dO and the statistics of a block of queries.
constexpr int backward_dkdv_threadgroup_bytes(int head_dim, int value_dim, int block_queries, int element_size) {
  return block_queries * (padded_row_bytes(head_dim, element_size) + padded_row_bytes(value_dim, element_size) +
                          2 * int(sizeof(float)));
}

}  // namespace mfa
