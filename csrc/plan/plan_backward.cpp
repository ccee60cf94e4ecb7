// Which kernels a backward pass takes, in two modes:
//
//   seven GEMMs   backward_dkdv: S, dP, dK, dV      backward_dq: S, dP, dQ
//   five GEMMs    backward_dkdv, which also writes dS to scratch, and backward_dq_from_ds: dQ. In chunks of units (one
//                 key head of one batch, with the query heads of its group), so that the scratch is bounded. Not on the
//                 matrix unit, where products cost less than dS's way through memory.
#include <algorithm>
#include <limits>

#include "plan/launches.h"
#include "plan/tuning.h"

namespace mfa {
namespace {

// Columns of dQ that one launch of backward_dq_from_ds gives to a threadgroup, above the buckets that it has whole.
constexpr int kLargestWhole = 256, kLargestPart = 128;

struct Backward {
  const Problem& problem;
  const Gradients& gradients;
  Canonical start;
  Plan plan;
  bool has_classes;  // of the mask's blocks

  std::int64_t units() const { return problem.batch * problem.key_heads; }

  const Instance& instance(Kind kind) const { return *choose(kind, problem, start.bucket, is_exact(problem, start)); }

  void add_delta() {
    const Instance& delta = instance(Kind::backward_delta);
    add_launch(plan, delta,
               constants({{kAligned, start.aligned},
                          {kHasGradLse, gradients.has_grad_lse},
                          {kHasCorrection, problem.has_correction}}),
               {problem.query_heads, tiles(problem.query_length, delta.rows), problem.batch});
  }

  void add_dkdv(bool key, bool value, std::int64_t first_unit, std::int64_t unit_count, bool writes_score_gradient) {
    if (!key && !value) return;
    const Instance& dkdv = instance(Kind::backward_dkdv);
    add_tile_map(plan, problem, true, dkdv.rows);
    add_launch(plan, dkdv,
               score_constants(problem, start, dkdv,
                               {{kWantsGradKey, key},
                                {kWantsGradValue, value},
                                {kWritesScoreGradient, writes_score_gradient},
                                {kHasMaskBlocks, has_classes}}),
               {unit_count, row_tiles(problem, problem.key_length, dkdv.rows), 1}, {first_unit});
  }

  void add_dq() {
    const Instance& dq = instance(Kind::backward_dq);
    add_tile_map(plan, problem, false, dq.rows);
    add_launch(plan, dq,
               score_constants(problem, start, dq, {{kWantsGradAlibi, gradients.alibi}, {kHasMaskBlocks, has_classes}}),
               {problem.query_heads, row_tiles(problem, problem.query_length, dq.rows), problem.batch});
  }

  void add_dslopes() {
    add_launch(plan, the_instance(Kind::backward_dslopes), constants({{kIsVarlen, true}}),
               {problem.query_heads, problem.sequences, 1});
  }

  // Null where there is none: in float32. Above kLargestWhole, of the largest equal parts of D that there are.
  const Instance* dq_from_ds() const {
    const int head_dim = start.bucket.head_dim;
    for (int part = head_dim <= kLargestWhole ? head_dim : kLargestPart; part > 0; part -= 16)
      if (const Instance* found = head_dim % part ? nullptr : choose(Kind::backward_dq_from_ds, problem, {part, part}))
        return found;
    return nullptr;
  }

  void add_dq_from_ds(std::int64_t first_unit, std::int64_t unit_count) {
    const Instance& dq = *dq_from_ds();
    const std::int64_t parts = tiles(problem.head_dim, dq.head_dim);
    add_launch(plan, dq,
               constants({{kHasWindow, start.has_window},
                          {kAligned, start.aligned},
                          {kExactHead, problem.head_dim == start.bucket.head_dim},
                          {kHasMaskBlocks, has_classes}}),
               {unit_count * start.params.group_size, tiles(problem.query_length, dq.rows), parts}, {first_unit});
  }

  void add_dbias() {
    const Instance& dbias = instance(Kind::backward_dbias);
    const auto& [batch, heads, rows, columns] = problem.bias.sizes;
    add_launch(plan, dbias, score_constants(problem, start, dbias, {}),
               {tiles(columns, dbias.block), tiles(rows, dbias.rows), batch * heads});
  }

  // dS of one query head: a blob of 8x8 float32 per 8 keys x 8 queries that exist.
  std::int64_t score_gradient_bytes() const {
    return tiles(problem.query_length, 8) * tiles(problem.key_length, 8) * 64 * 4;
  }

  // How many units a chunk of the five-GEMM mode has; 0 for the seven-GEMM mode.
  std::int64_t units_per_chunk() const {
    const BackwardMode mode =
        gradients.mode == BackwardMode::automatic ? default_mode(problem.family, start.bucket) : gradients.mode;
    if (mode != BackwardMode::five_gemm || !dq_from_ds() || is_on_unit(instance(Kind::backward_dkdv).path)) return 0;
    // Without dK, dQ alone is cheaper; and only backward_dq has the sums that ALiBi's gradient needs.
    if (!gradients.query || !gradients.key || gradients.alibi || problem.sequences > 0) return 0;
    if (problem.bias.kind == BiasKind::blocks) return 0;  // of dS, blocks that no list names would stay unwritten
    const std::int64_t bytes_per_head = score_gradient_bytes();
    if (bytes_per_head == 0 || units() == 0 || start.params.group_size == 0) return 0;
    const std::int64_t most = gradients.scratch_limit / bytes_per_head / start.params.group_size;
    if (most == 0) return 0;
    const std::int64_t chunks = (units() + most - 1) / most;
    return (units() + chunks - 1) / chunks;  // all chunks alike, up to one unit
  }

  void add_gradients() {
    has_classes = add_mask_blocks(plan, problem, start);
    const Path path = instance(Kind::backward_dkdv).path;
    const bool is_team = path == team || path == unit_team;
    const bool separate =
        !is_team && start.bucket.head_dim + start.bucket.value_dim > (path == unit ? kLargestUnitPair : kLargestPair);
    const bool value_first = separate && gradients.key && gradients.value;
    const bool value_with_key = gradients.value && !value_first;
    if (value_first) add_dkdv(false, true, 0, units(), false);
    const std::int64_t chunk = units_per_chunk();
    if (chunk == 0) {
      add_dkdv(gradients.key, value_with_key, 0, units(), false);
      if (gradients.query || gradients.alibi) add_dq();
      return;
    }
    for (std::int64_t first = 0; first < units(); first += chunk) {
      const std::int64_t count = std::min(chunk, units() - first);
      add_dkdv(true, value_with_key, first, count, true);
      add_dq_from_ds(first, count);
    }
    plan.scratch_bytes = static_cast<std::uint64_t>(chunk * start.params.group_size * score_gradient_bytes());
  }
};

bool all_rows_aligned(const Problem& problem, const Gradients& gradients) {
  // backward_dq writes the gradient of query also when it runs for that of the slopes alone.
  const bool writes_query = gradients.query || gradients.alibi;
  return rows_aligned(problem, gradients.grad_out_strides, problem.query_heads, problem.query_length) &&
         (!writes_query || rows_aligned(problem, gradients.query_strides, problem.query_heads, problem.query_length)) &&
         (!gradients.key || rows_aligned(problem, gradients.key_strides, problem.key_heads, problem.key_length)) &&
         (!gradients.value || rows_aligned(problem, gradients.value_strides, problem.key_heads, problem.key_length));
}

}  // namespace

Plan plan_backward(const Problem& problem, const Gradients& gradients) {
  for (const Strides& strides :
       {gradients.grad_out_strides, gradients.query_strides, gradients.key_strides, gradients.value_strides})
    require(std::ranges::min(strides) >= 0, "strides must not be negative");
  require(!gradients.bias || problem.bias.kind == BiasKind::same_dtype || problem.bias.kind == BiasKind::float32,
          "only a bias of floats has a gradient: it must not be wanted otherwise");
  require(!gradients.sinks || problem.has_sinks, "a gradient of sinks must not be wanted without sinks");
  require(!gradients.alibi || problem.alibi != Alibi::none, "a gradient of slopes must not be wanted without slopes");
  require(gradients.scratch_limit >= 0, "scratch_limit must be 0 or more");

  // backward_dkdv counts rows in 32 bits.
  require(problem.batch * problem.query_heads <=
              std::numeric_limits<std::uint32_t>::max() / std::max<std::int64_t>(1, problem.query_length),
          "batch * query_heads * query_length of a backward pass must be below 2^32");

  Backward backward{problem, gradients, canonical(problem), {}, false};
  backward.start.aligned = backward.start.aligned && all_rows_aligned(problem, gradients);
  AttentionParams& params = backward.plan.params = backward.start.params;
  std::ranges::copy(gradients.grad_out_strides, params.grad_out_strides);
  std::ranges::copy(gradients.query_strides, params.grad_query_strides);
  std::ranges::copy(gradients.key_strides, params.grad_key_strides);
  std::ranges::copy(gradients.value_strides, params.grad_value_strides);

  const bool any = gradients.query || gradients.key || gradients.value || gradients.alibi;
  if (any || gradients.bias || gradients.sinks) backward.add_delta();
  if (any) backward.add_gradients();
  if (gradients.bias) backward.add_dbias();
  if (gradients.alibi && problem.sequences > 0 && problem.alibi == Alibi::per_batch) backward.add_dslopes();
  return backward.plan;
}

}  // namespace mfa
