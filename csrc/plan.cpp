#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <stdexcept>

#include "catalogue.h"

namespace mfa {
namespace {

struct Tuning {
  Family family;
  DType dtype;
  int head_dim, value_dim;
  Path path;
  int simdgroups, row_tiles, block_keys;
};

constexpr Tuning kTuning[] = {
#define TUNE(family, dtype, head_dim, value_dim, path, simdgroups, row_tiles, block_keys) \
  {Family::family, DType::dtype, head_dim, value_dim, Path::path, simdgroups, row_tiles, block_keys},
#include "tuning.def"
};

constexpr const Instance* find_instance(const Tuning& row) {
  for (const Instance& instance : kForwardInstances)
    if (instance.dtype == row.dtype && instance.head_dim == row.head_dim && instance.value_dim == row.value_dim &&
        instance.path == row.path && instance.simdgroups == row.simdgroups && instance.row_tiles == row.row_tiles &&
        instance.block_keys == row.block_keys)
      return &instance;
  return nullptr;
}

constexpr bool every_row_has_an_instance() {
  for (const Tuning& row : kTuning)
    if (!find_instance(row)) return false;
  return true;
}
static_assert(every_row_has_an_instance(), "tuning.def names an instance that instances.def does not have");

struct Bucket {
  int head_dim, value_dim;
};
// In order of cost: a problem runs in the first bucket that holds D and Dv.
constexpr Bucket kBuckets[] = {{32, 32}, {64, 64}, {96, 96}, {128, 128}, {192, 128}, {192, 192}, {256, 256}};

Bucket bucket_of(const Problem& problem) {
  return *std::ranges::find_if(kBuckets, [&](Bucket bucket) {
    return problem.head_dim <= bucket.head_dim && problem.value_dim <= bucket.value_dim;
  });
}

const Instance& choose(const Problem& problem, Bucket bucket, bool takes_direct) {
  for (const Tuning& row : kTuning)
    if (row.family <= problem.family && row.dtype == problem.dtype && row.head_dim == bucket.head_dim &&
        row.value_dim == bucket.value_dim && (row.path == staged || takes_direct))
      return *find_instance(row);
  throw std::logic_error("tuning.def has no staged row for a bucket");
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const Problem& problem) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  for (std::int64_t count : {problem.batch, problem.query_heads, problem.key_heads})
    require(0 <= count && count <= kMost, "batch and heads must be within 0 ... 2^31 - 1");
  require(problem.query_heads == 0 || (problem.key_heads > 0 && problem.query_heads % problem.key_heads == 0),
          "query_heads must be a multiple of key_heads");
  require(0 <= problem.query_length && problem.query_length <= kLongestProblem && 0 <= problem.key_length &&
              problem.key_length <= kLongestProblem - problem.query_length,
          "query_length + key_length must be within 0 ... 2^30 - 1024");
  for (std::int64_t dim : {problem.head_dim, problem.value_dim})
    require(1 <= dim && dim <= kLargestHeadDim, "head_dim and value_dim must be within 1 ... 256");
  for (const Strides& strides :
       {problem.query_strides, problem.key_strides, problem.value_strides, problem.out_strides})
    require(std::ranges::min(strides) >= 0, "strides must not be negative");
  require(!std::isnan(problem.scale), "scale must be a number");
}

bool strides_aligned(const Problem& problem) {
  const auto aligned = [&](const Strides& strides, std::int64_t heads, std::int64_t rows) {
    const Strides sizes = {problem.batch, heads, rows};
    for (int i = 0; i < 3; ++i)
      if (sizes[i] > 1 && strides[i] % (16 / element_size(problem.dtype)) != 0) return false;
    return true;
  };
  return aligned(problem.query_strides, problem.query_heads, problem.query_length) &&
         aligned(problem.key_strides, problem.key_heads, problem.key_length) &&
         aligned(problem.value_strides, problem.key_heads, problem.key_length) &&
         aligned(problem.out_strides, problem.query_heads, problem.query_length);
}

// Relative to the lower-right diagonal, key j of query i lies at j - (i+Lk-Lq), which is within -(Lk-1) ... Lq-1.
struct Window {
  std::int64_t left, right;
  bool hides_a_pair;
};

Window canonical_window(const Problem& problem) {
  const std::int64_t open = problem.query_length + problem.key_length;
  const std::int64_t left = std::clamp(problem.window_left.value_or(open), -open, open);
  const std::int64_t right = std::clamp(problem.window_right.value_or(open), -open, open);
  const bool any_pair = problem.query_length > 0 && problem.key_length > 0;
  return {left, right, any_pair && (left < problem.key_length - 1 || right < problem.query_length - 1)};
}

std::int64_t visible_keys(const Problem& problem, const Window& window, std::int64_t query) {
  const std::int64_t diagonal = query + problem.key_length - problem.query_length;
  const std::int64_t first = std::max<std::int64_t>(diagonal - window.left, 0);
  const std::int64_t last = std::min(diagonal + window.right, problem.key_length - 1);
  return std::max<std::int64_t>(last - first + 1, 0);
}

AttentionParams make_params(const Problem& problem, const Window& window) {
  AttentionParams params{};
  params.batch = static_cast<int>(problem.batch);
  params.query_heads = static_cast<int>(problem.query_heads);
  params.key_heads = static_cast<int>(problem.key_heads);
  params.group_size = problem.key_heads ? static_cast<int>(problem.query_heads / problem.key_heads) : 1;
  params.query_length = static_cast<int>(problem.query_length);
  params.key_length = static_cast<int>(problem.key_length);
  params.head_dim = static_cast<int>(problem.head_dim);
  params.value_dim = static_cast<int>(problem.value_dim);
  params.window_left = static_cast<int>(window.left);
  params.window_right = static_cast<int>(window.right);
  params.scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e);
  // Groups start in grid order. The long ones first: what is left at the end is then short, and fills the GPU evenly.
  params.heavy_first =
      visible_keys(problem, window, problem.query_length - 1) > visible_keys(problem, window, 0) ? 1 : 0;
  std::ranges::copy(problem.query_strides, params.query_strides);
  std::ranges::copy(problem.key_strides, params.key_strides);
  std::ranges::copy(problem.value_strides, params.value_strides);
  std::ranges::copy(problem.out_strides, params.out_strides);
  return params;
}

}  // namespace

const char* name(FunctionConstant constant) {
  switch (constant) {
    case kHasWindow: return "has_window";
    case kWritesLse: return "writes_lse";
    case kAligned: return "is_aligned";
    case kExactHead: return "is_exact_head";
  }
  throw std::logic_error("a function constant without a name");
}

Plan plan_forward(const Problem& problem) {
  check(problem);
  const Window window = canonical_window(problem);
  Plan plan{{}, make_params(problem, window)};
  if (problem.batch == 0 || problem.query_heads == 0 || problem.query_length == 0) return plan;

  const Bucket bucket = bucket_of(problem);
  const bool aligned = problem.aligned && strides_aligned(problem);
  const bool exact_head = problem.head_dim == bucket.head_dim && problem.value_dim == bucket.value_dim;
  const Instance& instance = choose(problem, bucket, aligned && exact_head);
  const std::int64_t tiles = (problem.query_length + instance.block_queries() - 1) / instance.block_queries();
  plan.launches.push_back({
      .kernel = instance.name,
      .constants = {{kHasWindow, window.hides_a_pair},
                    {kWritesLse, problem.wants_lse},
                    {kAligned, aligned},
                    {kExactHead, exact_head}},
      // The heads of a group are adjacent, so that they find each other's K and V in the cache.
      .grid = {static_cast<std::uint32_t>(problem.query_heads), static_cast<std::uint32_t>(tiles),
               static_cast<std::uint32_t>(problem.batch)},
      .group = {static_cast<std::uint32_t>(instance.threads()), 1, 1},
      .threadgroup_memory = static_cast<std::uint32_t>(instance.threadgroup_memory()),
  });
  return plan;
}

}  // namespace mfa
