// Tensors as a kernel's arguments, and the problem that they pose.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "ops/arguments.h"
#include "plan/launcher.h"
#include "plan/plan.h"

namespace mfa {

class Operands {
 public:
  // Sets the problem's sizes, and binds nothing.
  explicit Operands(const Qkv& qkv);
  // Binds what every op of attention takes; all has been checked. `sequences`: see Problem.
  Operands(const Qkv& qkv, const Features& features, std::int64_t sequences = 0);

  Problem problem;  // `aligned` follows from what has been bound

  // Bind a tensor; the strides are those that the kernels see. A tensor of rows has a contiguous last dimension to
  // them.
  Strides read_rows(Argument argument, const torch::stable::Tensor& tensor);
  Strides write_rows(Argument argument, const torch::stable::Tensor& tensor);
  void read(Argument argument, const torch::stable::Tensor& tensor);
  void read_contiguous(Argument argument, const torch::stable::Tensor& tensor);
  void write(Argument argument, const torch::stable::Tensor& tensor);

  // Bind several, and set what the problem says of them. `correction` has the strides of out.
  void read(const Dropout& dropout);
  void read_bias(const torch::stable::Tensor& bias);
  void read_block_mask(const torch::stable::Tensor& block_mask);
  void read(const Results& results, Gradients& gradients);
  void write_results(const torch::stable::Tensor& out, const torch::stable::Tensor& lse);
  void write_correction(const torch::stable::Tensor& correction, bool trains_terms);

  void run(const Plan& plan);  // allocates what the plan needs besides

 private:
  void bind(Argument argument, const torch::stable::Tensor& tensor, const void* address);
  Strides bind_rows(Argument argument, const torch::stable::Tensor& tensor, const void* address);

  Launcher& launcher_;
  torch::stable::Tensor query_;
  bool is_cpu_;
  Arguments arguments_{};
  std::vector<Argument> empty_;
  std::vector<torch::stable::Tensor> alive_;  // copies must outlast the launches
};

// Contiguous, on the device of `like`; 1 to 5 sizes. Several times cheaper than torch::stable::new_empty, which calls
// the dispatcher by the op's name.
torch::stable::Tensor allocate(const torch::stable::Tensor& like, std::initializer_list<std::int64_t> sizes,
                               torch::headeronly::ScalarType dtype);

// With the sizes of `tensor` but for the last one; B,L,H,D in memory if `tensor` is: a model whose query is so goes on
// with out as [B,L,H*D], which then costs no copy.
torch::stable::Tensor allocate_rows(const torch::stable::Tensor& tensor, std::int64_t last_size,
                                    torch::headeronly::ScalarType dtype);

}  // namespace mfa
