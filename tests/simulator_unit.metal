// Kernels of test_simulator_unit.py: one product on the matrix unit, and what must not be done with it.
#include <metal_stdlib>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;

#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(product<__VA_ARGS__>) product<__VA_ARGS__>;

template <typename Tensor, typename T>
void load(thread Tensor& tensor, const device T* source, int columns) {
  for (ushort i = 0; i < tensor.get_capacity(); ++i) {
    const auto at = tensor.get_multidimensional_index(i);
    tensor[i] = source[at[1] * columns + at[0]];
  }
}

// D = A B, or D += A B; `places` are those of the elements of A, B and D, by lane, as column and row.
template <typename A, typename B, typename D, int kM, int kN, int kK, bool kLeft, bool kRight, bool kAccumulates>
kernel void product(const device A* a [[buffer(0)]], const device B* b [[buffer(1)]], device D* d [[buffer(2)]],
                    device int* places [[buffer(3)]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr auto mode = kAccumulates ? matmul2d_descriptor::mode::multiply_accumulate : matmul2d_descriptor::mode::multiply;
  constexpr auto descriptor = matmul2d_descriptor(kM, kN, kK, kLeft, kRight, true, mode);
  matmul2d<descriptor, execution_simdgroup> op;
  auto left = op.template get_left_input_cooperative_tensor<A, B, D>();
  auto right = op.template get_right_input_cooperative_tensor<A, B, D>();
  auto sum = op.template get_destination_cooperative_tensor<remove_addrspace_t<decltype(left)>,
                                                                    remove_addrspace_t<decltype(right)>, D>();
  load(left, a, kLeft ? kM : kK);
  load(right, b, kRight ? kK : kN);
  if (kAccumulates) {
    load(sum, d, kN);
  }
  op.run(left, right, sum);
  for (ushort i = 0; i < sum.get_capacity(); ++i) {
    const auto at = sum.get_multidimensional_index(i);
    d[at[1] * kN + at[0]] = sum[i];
  }
  const int sizes[] = {left.get_capacity(), right.get_capacity(), sum.get_capacity()};
  places += 2 * lane * (sizes[0] + sizes[1] + sizes[2]);
  for (ushort i = 0; i < sizes[0]; ++i) {
    const auto at = left.get_multidimensional_index(i);
    *places++ = at[0];
    *places++ = at[1];
  }
  for (ushort i = 0; i < sizes[1]; ++i) {
    const auto at = right.get_multidimensional_index(i);
    *places++ = at[0];
    *places++ = at[1];
  }
  for (ushort i = 0; i < sizes[2]; ++i) {
    const auto at = sum.get_multidimensional_index(i);
    *places++ = at[0];
    *places++ = at[1];
  }
}
