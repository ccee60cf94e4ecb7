// The dispatcher's stack: an op's arguments in the order of its schema, then its results in their place.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>

namespace mfa {

class Stack {
 public:
  Stack(StableIValue* values, std::uint64_t count) : next_(values), end_(values + count) {}

  // The next argument; or the next ones, for a struct that has `static T take(Stack&)`.
  template <typename T>
  T take() {
    if constexpr (requires { T::take(*this); }) {
      return T::take(*this);
    } else {
      if (next_ == end_) throw std::logic_error("an op of mfa takes more arguments than its schema has");
      return torch::stable::detail::to<T>(*next_++);
    }
  }

  void finish() const {
    if (next_ != end_) throw std::logic_error("an op of mfa takes fewer arguments than its schema has");
  }

 private:
  StableIValue* next_;
  StableIValue* end_;
};

// Calls `op`, which returns a tuple. TORCH_BOX would want a parameter of its own for each argument.
template <typename... Results, typename... Parameters>
void unbox(std::tuple<Results...> (*op)(Parameters...), StableIValue* values, std::uint64_t argument_count,
           std::uint64_t result_count) {
  if (result_count != sizeof...(Results)) throw std::logic_error("an op of mfa has other results than its schema");
  Stack stack(values, argument_count);
  // Braces, since they take in order.
  const std::tuple<std::remove_cvref_t<Parameters>...> arguments{stack.take<std::remove_cvref_t<Parameters>>()...};
  stack.finish();
  std::apply([&](const Results&... results) { ((*values++ = torch::stable::detail::from(results)), ...); },
             std::apply(op, arguments));
}

}  // namespace mfa
