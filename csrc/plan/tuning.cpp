#include "plan/tuning.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <vector>

namespace mfa {
namespace {

// A row of tuning.def, and the part of an instance that it names.
struct Tuning {
  Family family;
  Kind kind;
  DType dtype;
  int head_dim, value_dim;
  Path path;
  Own own;
  int simdgroups, rows, block;
};

constexpr Tuning kTuning[] = {
#define TUNE_FORWARD(family, dtype, head_dim, value_dim, path, simdgroups, row_tiles, block_keys) \
  {Family::family, Kind::forward, DType::dtype,                                                   \
   head_dim,       value_dim,     Path::path,                                                     \
   held,           simdgroups,    rows_of(Path::path, head_dim, simdgroups, row_tiles),           \
   block_keys},
#define TUNE_DELTA(family, dtype, simdgroups) \
  {Family::family, Kind::backward_delta, DType::dtype, 0, 0, staged, held, simdgroups, 4 * simdgroups, 0},
#define TUNE_DKDV(family, dtype, head_dim, value_dim, path, simdgroups, row_tiles, block_queries)                   \
  {Family::family, Kind::backward_dkdv, DType::dtype,                                                               \
   head_dim,       value_dim,           Path::path,                                                                 \
   held,           simdgroups,          backward_dkdv_rows(Path::path, head_dim, value_dim, simdgroups, row_tiles), \
   block_queries},
#define TUNE_DQ(family, dtype, own, head_dim, value_dim, path, simdgroups, row_tiles, block_keys)    \
  {Family::family, Kind::backward_dq, DType::dtype,                                                  \
   head_dim,       value_dim,         Path::path,                                                    \
   Own::own,       simdgroups,        backward_dq_rows(Path::path, head_dim, simdgroups, row_tiles), \
   block_keys},
#define TUNE_DQ_FROM_DS(family, dtype, head_dim, simdgroups, query_tiles, block_keys)     \
  {Family::family, Kind::backward_dq_from_ds,    DType::dtype, head_dim, 0, staged, held, \
   simdgroups,     8 * query_tiles * simdgroups, block_keys},
#define TUNE_DBIAS(family, dtype, head_dim, value_dim, path, simdgroups, block_keys) \
  {Family::family,                                                                   \
   Kind::backward_dbias,                                                             \
   DType::dtype,                                                                     \
   head_dim,                                                                         \
   value_dim,                                                                        \
   Path::path,                                                                       \
   held,                                                                             \
   simdgroups,                                                                       \
   backward_dbias_rows(Path::path, simdgroups),                                      \
   block_keys},
#define TUNE_MASK_BLOCKS(family, dtype, simdgroups) \
  {Family::family, Kind::mask_blocks, DType::dtype, 0, 0, staged, held, simdgroups, kMaskBlockRows, kMaskBlockRows},
#include "plan/tuning.def"
};

struct Mode {
  Family family;
  int head_dim;  // up to
  BackwardMode mode;
};

constexpr Mode kModes[] = {
#define TUNE_MODE(family, head_dim, mode) {Family::family, head_dim, BackwardMode::mode},
#include "plan/tuning.def"
};

struct MaskPass {
  Family family;
  int least_keys, most_bytes;
};

constexpr MaskPass kMaskPasses[] = {
#define TUNE_MASK_PASS(family, least_keys, most_bytes) {Family::family, least_keys, most_bytes},
#include "plan/tuning.def"
};

constexpr const Instance* find_instance(const Tuning& row) {
  for (const Instance& instance : kInstances)
    if (instance.kind == row.kind && instance.dtype == row.dtype && instance.head_dim == row.head_dim &&
        instance.value_dim == row.value_dim && instance.path == row.path && instance.own == row.own &&
        instance.simdgroups == row.simdgroups && instance.rows == row.rows && instance.block == row.block)
      return &instance;
  return nullptr;
}

constexpr bool every_row_has_an_instance() {
  for (const Tuning& row : kTuning)
    if (!find_instance(row)) return false;
  return true;
}
static_assert(every_row_has_an_instance(), "tuning.def names an instance that instances.def does not have");

// Such kernels have no code for tails.
constexpr bool takes_exact_only(Path path) { return path == direct || is_on_unit(path); }

constexpr bool fits(int dim, int bucket) { return dim == 0 || dim == bucket; }  // 0: the kernel takes any

std::vector<const Instance*> preferred;  // before the rows of tuning.def, newest first

const Instance* find_preferred(Kind kind, const Problem& problem, Bucket bucket, bool is_exact) {
  for (const Instance* instance : preferred)
    if (instance->kind == kind && instance->dtype == problem.dtype && fits(instance->head_dim, bucket.head_dim) &&
        fits(instance->value_dim, bucket.value_dim) && (is_exact || !takes_exact_only(instance->path)))
      return instance;
  return nullptr;
}

}  // namespace

const Instance* choose(Kind kind, const Problem& problem, Bucket bucket, bool is_exact) {
  if (const Instance* instance = find_preferred(kind, problem, bucket, is_exact)) return instance;
  for (const Tuning& row : kTuning)
    if (row.kind == kind && row.family <= problem.family && row.dtype == problem.dtype &&
        fits(row.head_dim, bucket.head_dim) && fits(row.value_dim, bucket.value_dim) &&
        (is_exact || !takes_exact_only(row.path)))
      return find_instance(row);
  return nullptr;
}

BackwardMode default_mode(Family family, Bucket bucket) {
  for (const Mode& row : kModes)
    if (row.family <= family && bucket.head_dim <= row.head_dim) return row.mode;
  throw std::logic_error("tuning.def has no mode for a bucket");
}

bool classifies_mask(const Problem& problem) {
  const Bias& bias = problem.bias;
  if (bias.kind == BiasKind::none || bias.kind == BiasKind::blocks) return false;
  const std::int64_t size = bias.kind == BiasKind::mask      ? 1
                            : bias.kind == BiasKind::float32 ? 4
                                                             : element_size(problem.dtype);
  // In double: the counts of a legal problem may overflow 64 bits.
  const double read = 1.0 * size * bias.sizes[0] * bias.sizes[1] * bias.sizes[2] * bias.sizes[3];
  const double scores = 1.0 * problem.batch * problem.query_heads * problem.query_length * problem.key_length;
  for (const MaskPass& row : kMaskPasses)
    if (row.family <= problem.family) return problem.key_length >= row.least_keys && read <= row.most_bytes * scores;
  throw std::logic_error("tuning.def has no mask pass for a family");
}

const Instance& the_instance(Kind kind, std::optional<DType> dtype) {
  for (const Instance& instance : kInstances)
    if (instance.kind == kind && (!dtype || instance.dtype == *dtype)) return instance;
  throw std::logic_error("instances.def lacks a kind of kernel");
}

bool is_preferred(const Instance& instance) { return std::ranges::find(preferred, &instance) != preferred.end(); }

const Instance& choose_decode(const Problem& problem, Bucket bucket, std::int64_t rows) {
  // On the matrix unit a lane has two rows, and follows the block mask of one.
  const bool on_unit = problem.family >= Family::apple10 && problem.bias.kind != BiasKind::blocks;
  const auto takes = [&](const Instance& instance) {
    return instance.kind == Kind::decode && instance.dtype == problem.dtype && instance.head_dim == bucket.head_dim &&
           instance.value_dim == bucket.value_dim && (on_unit || !is_on_unit(instance.path));
  };
  for (const Instance* instance : preferred)
    if (takes(*instance)) return *instance;
  // The smallest tile that holds all rows, or else the largest; of such two, the matrix unit's.
  const auto order = [&](const Instance& instance) {
    return std::tuple(-std::min<std::int64_t>(rows, instance.rows), instance.rows, !is_on_unit(instance.path));
  };
  const Instance* best = nullptr;
  for (const Instance& instance : kInstances)
    if (takes(instance) && (!best || order(instance) < order(*best))) best = &instance;
  if (!best) throw std::logic_error("instances.def lacks a decode kernel");
  return *best;
}

}  // namespace mfa

int mfa_prefer_instance(const char* name) {
  if (!name) {
    mfa::preferred.clear();
    return 1;
  }
  for (const mfa::Instance& instance : mfa::kInstances)
    if (std::string_view(name) == instance.name) {
      mfa::preferred.insert(mfa::preferred.begin(), &instance);
      return 1;
    }
  return 0;
}
