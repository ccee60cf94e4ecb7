// Problem -> Plan: which kernels run, with which constants, on which grid. Pure: knows neither torch nor Metal.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "../metal/params.h"

namespace mfa {

enum class DType { f16, bf16, f32 };
enum class Family { apple7 = 7, apple8 = 8, apple9 = 9, apple10 = 10 };

constexpr int element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Strides of batch, head and row, in elements; the last dimension is contiguous.
using Strides = std::array<std::int64_t, 3>;

inline constexpr int kLargestHeadDim = 256;
// Of Lq + Lk. Positions and window bounds reach 2 * (Lq + Lk) plus a tile, and are 32-bit in the kernels.
inline constexpr std::int64_t kLongestProblem = (std::int64_t{1} << 30) - 1024;

struct Problem {
  Family family = Family::apple7;
  DType dtype = DType::f16;
  std::int64_t batch = 1, query_heads = 1, key_heads = 1;
  std::int64_t query_length = 0, key_length = 0;
  std::int64_t head_dim = 64, value_dim = 64;
  Strides query_strides{}, key_strides{}, value_strides{}, out_strides{};
  bool aligned = true;  // every base address is a multiple of 16 bytes (strides are checked by plan_forward())
  double scale = 1.0;
  std::optional<std::int64_t> window_left, window_right;  // none = open
  bool wants_lse = true;
};

struct Constant {
  FunctionConstant index;
  bool value;
};

const char* name(FunctionConstant constant);  // as in metal/features.h

struct Launch {
  const char* kernel;                  // host name, of a row of the catalogue
  std::vector<Constant> constants;     // all of FunctionConstant
  std::array<std::uint32_t, 3> grid;   // threadgroups: query head, query tile, batch
  std::array<std::uint32_t, 3> group;  // threads per threadgroup
  std::uint32_t threadgroup_memory;    // bytes, static in the kernel
};

struct Plan {
  std::vector<Launch> launches;  // in order, dependent ones serialised by the encoder; none when there is no query
  AttentionParams params;        // every launch gets it at Argument::kParams
};

// Throws std::invalid_argument for a problem that no kernel takes; csrc/attention.cpp refuses those first.
Plan plan_forward(const Problem& problem);

}  // namespace mfa
