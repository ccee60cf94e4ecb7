#include "plan/problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <stdexcept>

namespace mfa {
namespace {

// In order of cost: a problem runs in the first bucket that holds D and Dv.
constexpr Bucket kBuckets[] = {{32, 32},   {64, 64},   {80, 80},   {96, 96},   {128, 128}, {192, 128},
                               {192, 192}, {256, 256}, {320, 320}, {384, 384}, {512, 512}, {576, 512}};

Bucket bucket_of(const Problem& problem) {
  return *std::ranges::find_if(kBuckets, [&](Bucket bucket) {
    return problem.head_dim <= bucket.head_dim && problem.value_dim <= bucket.value_dim;
  });
}

void check_sizes(const Problem& problem) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  for (std::int64_t count : {problem.batch, problem.query_heads, problem.key_heads})
    require(0 <= count && count <= kMost, "batch and heads must be within 0 ... 2^31 - 1");
  require(problem.query_heads == 0 || (problem.key_heads > 0 && problem.query_heads % problem.key_heads == 0),
          "query_heads must be a multiple of key_heads");
  require(problem.batch * std::max(problem.query_heads, problem.key_heads) <= kMostHeads,
          "batch * query_heads must be at most 2^31 - 1");
  require(0 <= problem.query_length && problem.query_length <= kLongestProblem && 0 <= problem.key_length &&
              problem.key_length <= kLongestProblem - problem.query_length,
          "query_length + key_length must be within 0 ... 2^30 - 1024");
  require(problem.sequences == 0 || problem.batch == 1, "packed sequences need batch 1");
  require(0 <= problem.sequences && problem.sequences <= kLongestProblem,
          "there must be at most 2^30 - 1024 sequences");
  require(has_head_dims(problem.head_dim, problem.value_dim),
          "head_dim and value_dim must be within 1 ... 512, or 576 and 512");
  for (const Strides& strides :
       {problem.query_strides, problem.key_strides, problem.value_strides, problem.out_strides})
    require(std::ranges::min(strides) >= 0, "strides must not be negative");
}

void check_features(const Problem& problem) {
  require(!std::isnan(problem.scale), "scale must be a number");
  require(problem.softcap >= 0 && std::isfinite(problem.softcap), "softcap must be 0 or more, and finite");
  require(0 <= problem.dropout_p && problem.dropout_p < 1, "dropout_p must be within [0, 1)");
  const std::int64_t full[] = {problem.batch, problem.query_heads, problem.query_length, problem.key_length};
  for (int i = 0; i < 4; ++i) {
    const bool is_any = i == 3 && problem.bias.is_of_last_keys;
    require(is_any || problem.bias.sizes[i] == 1 || problem.bias.sizes[i] == full[i],
            "the bias's sizes must each be 1 or that of [batch, query_heads, query_length, key_length]");
    require(problem.bias.strides[i] >= 0, "strides must not be negative");
  }
  const bool has_words = problem.bias.words >= 1 && problem.bias.words <= std::numeric_limits<int>::max();
  require(problem.bias.kind != BiasKind::blocks || has_words, "a block mask must have 1 to 2^31 - 1 words");
}

// Relative to the lower-right diagonal, key j of query i lies at j - (i+Lk-Lq), which is within -(Lk-1) ... Lq-1.
struct Window {
  std::int64_t left, right;
  bool hides_a_pair;
};

Window canonical_window(const Problem& problem) {
  const std::int64_t open = problem.query_length + problem.key_length;
  const bool any_pair = problem.query_length > 0 && problem.key_length > 0;
  const std::int64_t left = std::clamp(problem.window_left.value_or(open), -open, open);
  const std::int64_t right = std::clamp(problem.window_right.value_or(open), -open, open);
  if (left + right < 0) return {-open, -open, any_pair};  // shows nothing: then no kernel visits a block
  // Of packed sequences, the lengths are not known here.
  if (problem.sequences > 0) return {left, right, any_pair && (problem.window_left || problem.window_right)};
  // A cache may have fewer live keys: then windows reach further over them, and hide nothing more.
  return {left, right, any_pair && (left < problem.key_length - 1 || right < problem.query_length - 1)};
}

std::int64_t visible_keys(const Problem& problem, const Window& window, std::int64_t query) {
  const std::int64_t diagonal = query + problem.key_length - problem.query_length;
  const std::int64_t first = std::max<std::int64_t>(diagonal - window.left, 0);
  const std::int64_t last = std::min(diagonal + window.right, problem.key_length - 1);
  return std::max<std::int64_t>(last - first + 1, 0);
}

// A kernel computes softcap * tanh(product * (scale / softcap)). Outside of these bounds the quotient would overflow,
// or fall among the denormals, which a GPU takes for zeros; within 1e-30 either way the result is the same.
float representable_softcap(const Problem& problem) {
  constexpr double kHuge = 1e30, kTiny = 1e-37;
  return static_cast<float>(
      std::clamp(problem.softcap, std::clamp(std::abs(problem.scale) / kHuge, kTiny, kHuge), kHuge));
}

void set_features(AttentionParams& params, const Problem& problem) {
  params.scale = static_cast<float>(problem.scale);
  params.scale_log2 = static_cast<float>(problem.scale * std::numbers::log2e);
  params.softcap = problem.softcap > 0 ? representable_softcap(problem) : 0;
  constexpr int kDraws = 65536;
  params.dropout_threshold = std::min(static_cast<int>(std::lround(problem.dropout_p * kDraws)), kDraws - 1);
  params.dropout_factor = static_cast<float>(kDraws) / static_cast<float>(kDraws - params.dropout_threshold);
  params.alibi_batch_stride = problem.alibi == Alibi::per_batch ? params.query_heads : 0;
  const Bias& bias = problem.bias;
  params.bias_batch = static_cast<int>(bias.sizes[0]);
  params.bias_heads = static_cast<int>(bias.sizes[1]);
  params.bias_rows = static_cast<int>(bias.sizes[2]);
  params.bias_columns = static_cast<int>(bias.sizes[3]);
  params.block_mask_words = static_cast<int>(bias.words);
  for (int i = 0; i < 4; ++i) params.bias_strides[i] = bias.sizes[i] == 1 ? 0 : bias.strides[i];
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
  // Groups start in grid order. The long ones first: what is left at the end is then short, and fills the GPU evenly.
  params.heavy_first =
      visible_keys(problem, window, problem.query_length - 1) > visible_keys(problem, window, 0) ? 1 : 0;
  if (problem.sequences > 0) params.heavy_first = problem.window_right ? 1 : 0;
  params.sequences = static_cast<int>(problem.sequences);
  set_features(params, problem);
  std::ranges::copy(problem.query_strides, params.query_strides);
  std::ranges::copy(problem.key_strides, params.key_strides);
  std::ranges::copy(problem.value_strides, params.value_strides);
  std::ranges::copy(problem.out_strides, params.out_strides);
  return params;
}

}  // namespace

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

bool rows_aligned(const Problem& problem, const Strides& strides, std::int64_t heads, std::int64_t length) {
  // A kernel counts pairs of elements within 32 rows in 32 bits.
  if (length > 1 && strides[2] >= std::int64_t{1} << 28) return false;
  const std::int64_t sizes[] = {problem.batch, heads, length};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && strides[i] % (16 / element_size(problem.dtype)) != 0) return false;
  return true;
}

Canonical canonical(const Problem& problem) {
  check_sizes(problem);
  check_features(problem);
  const Window window = canonical_window(problem);
  return {
      .params = make_params(problem, window),
      .bucket = bucket_of(problem),
      .aligned = problem.aligned &&
                 rows_aligned(problem, problem.query_strides, problem.query_heads, problem.query_length) &&
                 rows_aligned(problem, problem.key_strides, problem.key_heads, problem.key_length) &&
                 rows_aligned(problem, problem.value_strides, problem.key_heads, problem.key_length) &&
                 rows_aligned(problem, problem.out_strides, problem.query_heads, problem.query_length),
      .has_window = window.hides_a_pair,
  };
}

}  // namespace mfa
