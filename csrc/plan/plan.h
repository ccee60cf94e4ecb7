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

inline constexpr int kLargestHeadDim = 512;
// MLA: keys are a latent of 512, which is also the value, and 64 that carry positions.
inline constexpr int kLatentHeadDim = 576, kLatentValueDim = 512;

constexpr bool has_head_dims(std::int64_t head_dim, std::int64_t value_dim) {
  return head_dim >= 1 && value_dim >= 1 && value_dim <= kLargestHeadDim &&
         (head_dim <= kLargestHeadDim || (head_dim == kLatentHeadDim && value_dim == kLatentValueDim));
}
// Of Lq + Lk. Positions and window bounds reach 2 * (Lq + Lk) plus a tile, and are 32-bit in the kernels.
inline constexpr std::int64_t kLongestProblem = (std::int64_t{1} << 30) - 1024;
// Of batch * query_heads: a head's index is 32-bit in the kernels.
inline constexpr std::int64_t kMostHeads = (std::int64_t{1} << 31) - 1;

// mask: bools, true = attend; same_dtype: as the query; blocks: a packed block mask, see metal/block_mask.h
enum class BiasKind { none, mask, same_dtype, float32, blocks };

struct Bias {
  BiasKind kind = BiasKind::none;
  std::array<std::int64_t, 4> sizes{1, 1, 1, 1};  // batch, query head, query, key: 1 where it broadcasts
  std::array<std::int64_t, 4> strides{};          // in elements; of no matter where the size is 1
  std::int64_t words = 0;                         // of a packed block mask, int32
  bool is_of_last_keys = false;  // of a cache: sizes[3] is a number of last live keys, and those before have no bias
};

enum class Alibi { none, per_head, per_batch };  // slopes [Hq] or [B,Hq]

// Where keys and values lie, if each batch entry or sequence has its own number of live ones: Problem's key_length is
// then the capacity per entry, and where there are pages its key_strides[0] is that of a page. Packed sequences have
// pages.
struct Cache {
  enum class Format { same_dtype, int8, e4m3, e5m2 };
  Format key_format = Format::same_dtype, value_format = Format::same_dtype;
  std::int64_t page_size = 0, pages = 0, pages_per_sequence = 0;  // 0: not paged
  Strides key_scale_strides{}, value_scale_strides{};             // of a quantized cache
  bool has_leftpad = false;  // each batch entry's live keys start at a slot of its own
  std::int64_t splits = 0;   // parts of the keys; 0: chosen by the plan
};

struct Problem {
  Family family = Family::apple7;
  DType dtype = DType::f16;
  std::int64_t batch = 1, query_heads = 1, key_heads = 1;
  std::int64_t query_length = 0, key_length = 0;
  std::int64_t head_dim = 64, value_dim = 64;
  Strides query_strides{}, key_strides{}, value_strides{}, out_strides{};
  bool aligned = true;  // base addresses of all tensors of D or Dv are multiples of 16 bytes (strides: see the plan)
  double scale = 1.0;
  std::optional<std::int64_t> window_left, window_right;  // none = open
  double softcap = 0;                                     // 0 = off
  Bias bias;
  bool has_sinks = false;
  bool value_is_key = false;  // value is the first columns of key, in memory as well
  Alibi alibi = Alibi::none;
  double dropout_p = 0;
  bool wants_lse = true;        // forward only
  bool has_correction = false;  // of out: forward writes it, backward reads it (metal/correction.h)
  bool trains_terms = false;    // forward only: backward will make gradients of bias, sinks or slopes
  // Packed sequences (varlen): batch is 1, query_length and key_length count all of their rows, the first strides are
  // 0, and windows are relative to each sequence's own lower-right diagonal. 0: not packed. None has more queries
  // and keys than longest_query and longest_key; 0: not known, and few queries are not looked for.
  std::int64_t sequences = 0, longest_query = 0, longest_key = 0;
  bool has_key_lengths = false;  // not all keys of a sequence or batch entry count; so it is where there is a cache
  std::optional<Cache> cache;    // forward only

  bool has_key_starts() const { return cache ? cache->has_leftpad : sequences > 0; }
};

// seven_gemm: dQ, and dK with dV, each recompute P and dP. five_gemm: dQ comes from a dS that was written to scratch.
enum class BackwardMode { automatic, five_gemm, seven_gemm };

inline constexpr std::int64_t kDefaultScratchLimit = 64 << 20;

// What a backward pass is asked for, besides the problem of its forward pass.
struct Gradients {
  bool query = true, key = true, value = true, bias = false, sinks = false, alibi = false;
  bool has_grad_lse = false;
  Strides grad_out_strides{};
  Strides query_strides{}, key_strides{}, value_strides{};  // of the gradients
  // five_gemm falls back to seven_gemm where it can't run: no instance (float32), ALiBi slopes want a gradient, query
  // or key doesn't, or the dS of one key head's group exceeds the limit.
  BackwardMode mode = BackwardMode::automatic;
  std::int64_t scratch_limit = kDefaultScratchLimit;  // bytes
};

// New tokens of a problem's cache. Problem.query_strides and out_strides are those of queries and of rotated queries.
struct Append {
  bool has_lengths = false;  // each batch entry has its own tokens already; else all have `length`
  std::int64_t length = 0;
  std::int64_t tokens = 0;  // new, of each batch entry
  Strides key_strides{}, value_strides{};
  struct Rotary {
    std::int64_t pairs = 0, positions = 0;  // of the tables
    bool has_starts = false;                // else the first new token's position is that of its slot
    bool interleaved = false, is_float = false;
    bool queries_advance = true;
  };
  std::optional<Rotary> rotary;
};

struct Constant {
  FunctionConstant index;
  bool value;
};

const char* name(FunctionConstant constant);  // as in metal/features.h; throws std::logic_error behind the last one

struct Launch {
  const char* kernel;                  // host name, of a row of the catalogue
  std::vector<Constant> constants;     // all of FunctionConstant; false where the kernel doesn't use it
  std::array<std::uint32_t, 3> grid;   // threadgroups; what a position means is for the kernel to say
  std::array<std::uint32_t, 3> group;  // threads per threadgroup
  std::uint32_t threadgroup_memory;    // bytes, static in the kernel
  // For Argument::kFirstUnit. backward_dkdv and backward_dq_from_ds: the first (batch, key head) of a chunk. tile_map:
  // rows per tile, and entries of the map.
  std::array<int, 2> unit{};
};

struct Plan {
  std::vector<Launch> launches;        // in order, dependent ones serialised by the encoder; none has an empty grid
  AttentionParams params;              // every launch gets it at Argument::kParams
  std::uint64_t scratch_bytes = 0;     // for Argument::kScoreGradient
  std::uint64_t tile_map_bytes = 0;    // for Argument::kTileMap
  std::uint64_t mask_class_bytes = 0;  // for Argument::kMaskClasses
  std::uint64_t partial_out_bytes = 0, partial_lse_bytes = 0;  // for Argument::kPartialOut, kPartialLse
};

// Both throw std::invalid_argument for a problem that no kernel takes; ops/checks.cpp refuses those first.
// Few rows, or pages: decode, and combine where the keys are split. Else forward, after mask_blocks. Packed sequences
// have a tile_map before either. The problem alone decides, not the op that poses it.
Plan plan_forward(const Problem& problem);
// backward_delta, then for the gradients that are wanted: dK and dV, dQ (and ALiBi), bias, packed sequences' own
// slopes. The gradient of the sinks needs backward_delta alone.
Plan plan_backward(const Problem& problem, const Gradients& gradients);
// append. The problem's cache says where tokens go.
Plan plan_append(const Problem& problem, const Append& append);

}  // namespace mfa
