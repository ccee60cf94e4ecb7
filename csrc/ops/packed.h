// Packed sequences: rows [T,H,X] as a dense tensor of batch 1, and where each sequence starts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "ops/checks.h"
#include "ops/operands.h"

namespace mfa {

// [T,H,X] as [1,H,T,X].
inline torch::stable::Tensor packed_view(const char* name, const torch::stable::Tensor& tensor) {
  refuse_unless(tensor.dim() == 3, name, " has ", tensor.dim(), " dimensions; it must have 3");
  return torch::stable::transpose(torch::stable::unsqueeze(tensor, 0), 1, 2);
}

// cu_seqlens, of `size` elements. Contents are not read: the kernels clamp them.
inline void check_starts(const char* name, const torch::stable::Tensor& starts, const torch::stable::Tensor& query,
                         std::int64_t size) {
  refuse_unless(starts.device() == query.device(), name, " is on another device than query; they must be on the same");
  refuse_unless(starts.scalar_type() == torch::headeronly::ScalarType::Int, name,
                " has another dtype; it must have dtype int32");
  refuse_unless(starts.dim() == 1 && starts.size(0) >= 1 && starts.size(0) == size, name,
                " must have shape [N+1], the same for queries and keys");
}

// Of results: rows of no sequence see nothing, and no kernel visits them.
inline torch::stable::Tensor packed_rows(const torch::stable::Tensor& query, std::int64_t dim,
                                         torch::headeronly::ScalarType dtype) {
  return torch::stable::new_zeros(query, {query.size(0), query.size(1), dim}, dtype);
}

inline torch::stable::Tensor packed_lse(const torch::stable::Tensor& query) {
  torch::stable::Tensor lse = allocate(query, {query.size(1), query.size(0)}, torch::headeronly::ScalarType::Float);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  return lse;
}

}  // namespace mfa
