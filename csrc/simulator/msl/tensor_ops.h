// <MetalPerformancePrimitives/MetalPerformancePrimitives.h>: products of cooperative tensors in one SIMD-group, which
// run on the matrix unit. Operands in memory, reductions and other scopes are left out.
//
// A product itself is an engine's own: its unit_product.h.
#pragma once

#include "cooperative_tensor.h"
#include "unit.h"

namespace mpp::tensor_ops {

template <typename T>
constexpr T dynamic_length_v = static_cast<T>(-1);

// A template argument, so every member is public.
struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };

  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;

  constexpr matmul2d_descriptor(int m, int n, int k = dynamic_length_v<int>, bool transpose_left = false,
                                bool transpose_right = false, bool relaxed_precision = false,
                                mode matmul_mode = mode::multiply)
      : m(m),
        n(n),
        k(k),
        transpose_left(transpose_left),
        transpose_right(transpose_right),
        relaxed_precision(relaxed_precision),
        matmul_mode(matmul_mode) {}
};

}  // namespace mpp::tensor_ops

namespace mfa_sim {

template <typename L, typename R, typename D>
constexpr bool is_unit_product() {
  if constexpr (is_matrix_element<L> && is_matrix_element<R>) {
    return __is_same(D, float) || (__is_same(L, D) && __is_same(R, D));
  } else {
    return __is_same(L, R) && (__is_same(L, char) || __is_same(L, signed char) || __is_same(L, uchar)) &&
           __is_same(D, int);
  }
}

constexpr bool is_unit_length(int x) { return x == 16 || x == 32; }

enum class Role { left, right, destination };

// The layout of one operand of matmul2d<kDescriptor, ..> of these element types.
template <mpp::tensor_ops::matmul2d_descriptor kDescriptor, Role kRole, typename L, typename R, typename D>
struct OperandOf;

#define MFA_SIM_OPERAND(role, rows, columns, is_transposed)                                                           \
  template <mpp::tensor_ops::matmul2d_descriptor kDescriptor, typename L, typename R, typename D>                     \
  struct OperandOf<kDescriptor, Role::role, L, R, D> : Spread<kDescriptor.rows, kDescriptor.columns, is_transposed> { \
  };
MFA_SIM_OPERAND(left, m, k, kDescriptor.transpose_left)
MFA_SIM_OPERAND(right, k, n, kDescriptor.transpose_right)
MFA_SIM_OPERAND(destination, m, n, false)
#undef MFA_SIM_OPERAND

template <typename T>
struct IsDestination : metal::false_type {};
template <mpp::tensor_ops::matmul2d_descriptor kDescriptor, typename L, typename R, typename D>
struct IsDestination<OperandOf<kDescriptor, Role::destination, L, R, D>> : metal::true_type {};

// Whether each lane holds the same elements of both.
template <typename A, typename B>
constexpr bool is_spread_alike() {
  if constexpr (A::kCapacity == B::kCapacity) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < A::kCapacity; ++i) {
        if (!(A::stored(lane, i) == B::stored(lane, i))) return false;
      }
    }
    return true;
  } else {
    return false;
  }
}

}  // namespace mfa_sim

namespace mpp::tensor_ops {

template <matmul2d_descriptor kDescriptor, typename Scope, typename... Unused>
class matmul2d {
  static constexpr int kM = kDescriptor.m, kN = kDescriptor.n, kK = kDescriptor.k;
  static_assert(__is_same(Scope, metal::execution_simdgroup) && sizeof...(Unused) == 0,
                "operands in registers belong to one SIMD-group: execution_simdgroup");
  static_assert(::mfa_sim::is_unit_length(kM) && ::mfa_sim::is_unit_length(kN) && ::mfa_sim::is_unit_length(kK),
                "with operands in registers each of m, n and k is the constant 16 or 32");
  static_assert(kM == 32 || kN == 32 || kK == 32, "with operands in registers one of m, n and k is 32");

  template <::mfa_sim::Role kRole, typename Element, typename L, typename R, typename D>
  using Tensor = metal::cooperative_tensor<Element, metal::extents<int, metal::dynamic_extent, metal::dynamic_extent>,
                                           ::mfa_sim::OperandOf<kDescriptor, kRole, L, R, D>>;
  template <typename L, typename R, typename D>
  using Left = Tensor<::mfa_sim::Role::left, L, L, R, D>;
  template <typename L, typename R, typename D>
  using Right = Tensor<::mfa_sim::Role::right, R, L, R, D>;
  template <typename L, typename R, typename D>
  using Destination = Tensor<::mfa_sim::Role::destination, D, L, R, D>;

  template <typename L, typename R, typename D>
  static constexpr void require_types() {
    static_assert(::mfa_sim::is_unit_product<L, R, D>(), "the matrix unit has no product of these element types");
    static_assert(kDescriptor.relaxed_precision || !(__is_same(L, float) || __is_same(R, float)),
                  "without relaxed_precision a product of float runs elsewhere than on the matrix unit");
  }

  // A destination as the next input: the very registers.
  template <typename Input, bool kIsTransposed, typename Source>
  static MFA_SIM_INLINE Input from_destination(const Source& source) {
    static_assert(::mfa_sim::IsDestination<typename Source::layout>::value, "only a destination becomes an input");
    static_assert(__is_same(typename Source::element_type, typename Input::element_type),
                  "a destination becomes an input of its own element type");
    static_assert(!kIsTransposed && ::mfa_sim::is_spread_alike<typename Source::layout, typename Input::layout>(),
                  "a destination becomes an input of its own shape, and not a transposed one");
    Input input;
    input.elements = source.elements;
    return input;
  }

 public:
  template <typename L, typename R, typename D, typename Coordinate = int>
  MFA_SIM_INLINE Left<L, R, D> get_left_input_cooperative_tensor() const {
    require_types<L, R, D>();
    return {};
  }
  template <typename L, typename R, typename D, typename Coordinate = int>
  MFA_SIM_INLINE Right<L, R, D> get_right_input_cooperative_tensor() const {
    require_types<L, R, D>();
    return {};
  }
  // Of operand types, unlike the two others.
  template <typename LeftOperand, typename RightOperand, typename D, typename Coordinate = int>
  MFA_SIM_INLINE auto get_destination_cooperative_tensor() const {
    using L = typename LeftOperand::element_type;
    using R = typename RightOperand::element_type;
    require_types<L, R, D>();
    return Destination<L, R, D>{};
  }

  template <typename L, typename R, typename D, typename Coordinate = int, typename E, typename X, typename S>
  MFA_SIM_INLINE Left<L, R, D> get_left_input_cooperative_tensor(
      const metal::cooperative_tensor<E, X, S>& source) const {
    require_types<L, R, D>();
    return from_destination<Left<L, R, D>, kDescriptor.transpose_left>(source);
  }
  template <typename L, typename R, typename D, typename Coordinate = int, typename E, typename X, typename S>
  MFA_SIM_INLINE Right<L, R, D> get_right_input_cooperative_tensor(
      const metal::cooperative_tensor<E, X, S>& source) const {
    require_types<L, R, D>();
    return from_destination<Right<L, R, D>, kDescriptor.transpose_right>(source);
  }
  template <typename L, typename R, typename D, typename E, typename X, typename S>
  static constexpr bool is_compatible_as_left_input(const metal::cooperative_tensor<E, X, S>&) {
    return __is_same(E, L) && !kDescriptor.transpose_left &&
           ::mfa_sim::is_spread_alike<S, typename Left<L, R, D>::layout>();
  }
  template <typename L, typename R, typename D, typename E, typename X, typename S>
  static constexpr bool is_compatible_as_right_input(const metal::cooperative_tensor<E, X, S>&) {
    return __is_same(E, R) && !kDescriptor.transpose_right &&
           ::mfa_sim::is_spread_alike<S, typename Right<L, R, D>::layout>();
  }

  // One collective of the SIMD-group.
  template <typename L, typename R, typename D>
  MFA_SIM_COLLECTIVE void run(Left<L, R, D>& left, Right<L, R, D>& right, Destination<L, R, D>& destination,
                              MFA_SIM_SITE) const {
    using Product =
        ::mfa_sim::UnitProduct<kM, kN, kK, kDescriptor.transpose_left, kDescriptor.transpose_right,
                               kDescriptor.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate, L, R, D>;
    destination.elements = Product::run(left.elements, right.elements, destination.elements, MFA_SIM_HERE);
  }
};

}  // namespace mpp::tensor_ops
