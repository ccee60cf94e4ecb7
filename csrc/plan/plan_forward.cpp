#include "plan/launches.h"
#include "plan/plan_decode.h"
#include "plan/tuning.h"

namespace mfa {
namespace {

bool sums_score_gradient(const Problem& problem, const Instance& instance) {
  const BiasKind bias = problem.bias.kind;
  const bool has_terms =
      problem.has_sinks || problem.alibi != Alibi::none || bias == BiasKind::same_dtype || bias == BiasKind::float32;
  return problem.trains_terms && has_terms && is_on_unit(instance.path);
}

}  // namespace

Plan plan_forward(const Problem& problem) {
  const Canonical start = canonical(problem);
  const Instance& instance = *choose(Kind::forward, problem, start.bucket, is_exact(problem, start));
  if (packs_rows(problem, start, instance)) return plan_decode(problem, start);
  Plan plan{.launches = {}, .params = start.params};
  const bool has_classes = add_mask_blocks(plan, problem, start);
  add_tile_map(plan, problem, false, instance.rows);
  // The heads of a group are adjacent, so that they find each other's K and V in the cache.
  add_launch(plan, instance,
             score_constants(problem, start, instance,
                             {{kWritesLse, problem.wants_lse},
                              {kHasSinks, problem.has_sinks},
                              {kHasMaskBlocks, has_classes},
                              {kHasCorrection, problem.has_correction},
                              {kSumsScoreGradient, sums_score_gradient(problem, instance)}}),
             {problem.query_heads, row_tiles(problem, problem.query_length, instance.rows), problem.batch});
  return plan;
}

}  // namespace mfa
