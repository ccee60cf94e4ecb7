// mfa._native: the plan and the catalogue, for tests and tools.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <iterator>
#include <type_traits>
#include <utility>

#include "plan/catalogue.h"
#include "plan/plan.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mfa {
namespace {

constexpr Named<DType> kDTypes[] = {{"f16", DType::f16}, {"bf16", DType::bf16}, {"f32", DType::f32}};
constexpr Named<Path> kPaths[] = {
    {"staged", staged}, {"direct", direct}, {"team", team}, {"unit", unit}, {"unit_team", unit_team}};
constexpr Named<Memory> kMemories[] = {{"split", split}, {"shared", shared}};
constexpr Named<Own> kOwns[] = {{"held", held}, {"reread", reread}};
constexpr Named<Kind> kKinds[] = {{"forward", Kind::forward},
                                  {"backward_delta", Kind::backward_delta},
                                  {"backward_dkdv", Kind::backward_dkdv},
                                  {"backward_dq", Kind::backward_dq},
                                  {"backward_dq_from_ds", Kind::backward_dq_from_ds},
                                  {"backward_dbias", Kind::backward_dbias},
                                  {"backward_dslopes", Kind::backward_dslopes},
                                  {"mask_blocks", Kind::mask_blocks},
                                  {"append", Kind::append},
                                  {"decode", Kind::decode},
                                  {"combine", Kind::combine},
                                  {"tile_map_of_queries", Kind::tile_map_of_queries},
                                  {"tile_map_of_keys", Kind::tile_map_of_keys},
                                  {"tile_map_of_packed", Kind::tile_map_of_packed}};
constexpr Named<BiasKind> kBiasKinds[] = {{"none", BiasKind::none},
                                          {"mask", BiasKind::mask},
                                          {"same_dtype", BiasKind::same_dtype},
                                          {"float32", BiasKind::float32},
                                          {"blocks", BiasKind::blocks}};
constexpr Named<Alibi> kAlibis[] = {
    {"none", Alibi::none}, {"per_head", Alibi::per_head}, {"per_batch", Alibi::per_batch}};
constexpr Named<Cache::Format> kFormats[] = {{"same_dtype", Cache::Format::same_dtype},
                                             {"int8", Cache::Format::int8},
                                             {"e4m3", Cache::Format::e4m3},
                                             {"e5m2", Cache::Format::e5m2}};
constexpr Named<BackwardMode> kModes[] = {{"automatic", BackwardMode::automatic},
                                          {"five_gemm", BackwardMode::five_gemm},
                                          {"seven_gemm", BackwardMode::seven_gemm}};

// A property that is a tuple; of an array, nanobind would make a list.
template <typename Class, auto kMember>
auto tuple_of(const Class& object) {
  const auto& values = object.*kMember;
  constexpr std::size_t size = std::size(std::remove_cvref_t<decltype(values)>{});
  return [&]<std::size_t... i>(std::index_sequence<i...>) {
    return std::tuple(values[i]...);
  }(std::make_index_sequence<size>());
}

// Unsigned: lengths that the plan is going to refuse may overflow here.
Strides contiguous(std::uint64_t heads, std::uint64_t rows, std::uint64_t columns) {
  return {static_cast<std::int64_t>(heads * rows * columns), static_cast<std::int64_t>(rows * columns),
          static_cast<std::int64_t>(columns)};
}

// Keyword arguments by the names of fields; what is not there keeps its default.
class Fields {
 public:
  explicit Fields(const nb::kwargs& kwargs) { left_.update(kwargs); }

  template <typename Value>
  void take(const char* name, Value& target) {
    if (left_.contains(name)) target = nb::cast<Value>(left_.attr("pop")(name));
  }

  template <typename Table, typename Value>
  void take_named(const char* name, const Table& table, Value& target) {
    std::string text = name_of(table, target);
    take(name, text);
    target = value_of(table, text, name);
  }

  void finish() const {
    for (auto [key, value] : left_)
      throw nb::type_error(("plan() has no argument " + nb::cast<std::string>(key)).c_str());
  }

 private:
  nb::dict left_;
};

Problem take_problem(Fields& fields) {
  Problem problem;
  fields.take_named("family", kFamilies, problem.family);
  fields.take_named("dtype", kDTypes, problem.dtype);
#define FIELD(field) fields.take(#field, problem.field)
  FIELD(batch), FIELD(query_heads), FIELD(key_heads), FIELD(query_length), FIELD(key_length), FIELD(head_dim);
  FIELD(value_dim), FIELD(aligned), FIELD(scale), FIELD(window_left), FIELD(window_right), FIELD(softcap);
  FIELD(value_is_key), FIELD(has_sinks), FIELD(dropout_p), FIELD(wants_lse), FIELD(has_correction), FIELD(trains_terms),
      FIELD(sequences), FIELD(longest_query), FIELD(longest_key);
  FIELD(has_key_lengths);
  problem.query_strides = contiguous(problem.query_heads, problem.query_length, problem.head_dim);
  problem.key_strides = contiguous(problem.key_heads, problem.key_length, problem.head_dim);
  problem.value_strides = contiguous(problem.key_heads, problem.key_length, problem.value_dim);
  problem.out_strides = contiguous(problem.query_heads, problem.query_length, problem.value_dim);
  FIELD(query_strides), FIELD(key_strides), FIELD(value_strides), FIELD(out_strides);
#undef FIELD
  fields.take_named("alibi", kAlibis, problem.alibi);
  fields.take_named("bias", kBiasKinds, problem.bias.kind);
  fields.take("bias_sizes", problem.bias.sizes);
  fields.take("bias_strides", problem.bias.strides);
  fields.take("bias_words", problem.bias.words);
  fields.take("bias_is_of_last_keys", problem.bias.is_of_last_keys);
  return problem;
}

Gradients take_gradients(Fields& fields, const Problem& problem) {
  Gradients gradients;
#define WANTED(field) fields.take("wants_" #field, gradients.field)
  WANTED(query), WANTED(key), WANTED(value), WANTED(bias), WANTED(sinks), WANTED(alibi);
#undef WANTED
  fields.take("has_grad_lse", gradients.has_grad_lse);
  fields.take_named("mode", kModes, gradients.mode);
  fields.take("scratch_limit", gradients.scratch_limit);
  gradients.grad_out_strides = problem.out_strides;
  gradients.query_strides = problem.query_strides;
  gradients.key_strides = problem.key_strides;
  gradients.value_strides = problem.value_strides;
  fields.take("grad_out_strides", gradients.grad_out_strides);
  fields.take("grad_query_strides", gradients.query_strides);
  fields.take("grad_key_strides", gradients.key_strides);
  fields.take("grad_value_strides", gradients.value_strides);
  return gradients;
}

Cache take_cache(Fields& fields) {
  Cache cache;
  fields.take_named("key_format", kFormats, cache.key_format);
  fields.take_named("value_format", kFormats, cache.value_format);
#define FIELD(field) fields.take(#field, cache.field)
  FIELD(page_size), FIELD(pages), FIELD(pages_per_sequence), FIELD(has_leftpad), FIELD(splits);
  FIELD(key_scale_strides), FIELD(value_scale_strides);
#undef FIELD
  return cache;
}

Plan plan(const nb::kwargs& kwargs) {
  Fields fields(kwargs);
  const Problem problem = take_problem(fields);
  fields.finish();
  return plan_forward(problem);
}

Plan backward_plan(const nb::kwargs& kwargs) {
  Fields fields(kwargs);
  const Problem problem = take_problem(fields);
  const Gradients gradients = take_gradients(fields, problem);
  fields.finish();
  return plan_backward(problem, gradients);
}

Plan decode_plan(const nb::kwargs& kwargs) {
  Fields fields(kwargs);
  Problem problem = take_problem(fields);
  problem.cache = take_cache(fields);
  problem.has_key_lengths = true;
  fields.finish();
  return plan_forward(problem);
}

Append take_append(Fields& fields, const Problem& problem) {
  Append append;
  fields.take("has_lengths", append.has_lengths);
  fields.take("length", append.length);
  fields.take("tokens", append.tokens);
  append.key_strides = contiguous(problem.key_heads, append.tokens, problem.head_dim);
  append.value_strides = contiguous(problem.key_heads, append.tokens, problem.value_dim);
  fields.take("new_key_strides", append.key_strides);
  fields.take("new_value_strides", append.value_strides);
  bool has_rotary = false;
  fields.take("has_rotary", has_rotary);
  if (!has_rotary) return append;
  Append::Rotary& rotary = append.rotary.emplace();
#define ROTARY(field) fields.take("rotary_" #field, rotary.field)
  ROTARY(pairs), ROTARY(positions), ROTARY(has_starts), ROTARY(interleaved), ROTARY(is_float);
#undef ROTARY
  fields.take("queries_advance", rotary.queries_advance);
  return append;
}

Plan append_plan(const nb::kwargs& kwargs) {
  Fields fields(kwargs);
  Problem problem = take_problem(fields);
  problem.cache = take_cache(fields);
  const Append append = take_append(fields, problem);
  fields.finish();
  return plan_append(problem, append);
}

nb::typed<nb::dict, nb::str, bool> constants(const Launch& launch) {
  nb::dict result;
  for (const Constant& constant : launch.constants) result[name(constant.index)] = constant.value;
  return nb::borrow<nb::typed<nb::dict, nb::str, bool>>(result);
}

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<Launch>(m, "Launch", "One kernel of a plan.")
      .def_ro("kernel", &Launch::kernel, "Host name.")
      .def_prop_ro("constants", &constants, "Function constants by name.")
      .def_prop_ro("grid", &tuple_of<Launch, &Launch::grid>, "Threadgroups.")
      .def_prop_ro("group", &tuple_of<Launch, &Launch::group>, "Threads per threadgroup.")
      .def_ro("threadgroup_memory", &Launch::threadgroup_memory, "Bytes.")
      .def_prop_ro("unit", &tuple_of<Launch, &Launch::unit>,
                   "What Argument::kFirstUnit of metal/params.h is bound to.");

  auto params = nb::class_<AttentionParams>(m, "AttentionParams", "The parameter block of metal/params.h.");
  params.def("__bytes__", [](const AttentionParams& p) { return nb::bytes(&p, sizeof p); }, "As kernels read it.");
#define FIELD(field) params.def_ro(#field, &AttentionParams::field)
  FIELD(batch), FIELD(query_heads), FIELD(key_heads), FIELD(group_size), FIELD(query_length), FIELD(key_length);
  FIELD(head_dim), FIELD(value_dim), FIELD(window_left), FIELD(window_right), FIELD(scale), FIELD(scale_log2);
  FIELD(softcap), FIELD(heavy_first), FIELD(dropout_threshold), FIELD(dropout_factor), FIELD(alibi_batch_stride);
  FIELD(bias_batch), FIELD(bias_heads), FIELD(bias_rows), FIELD(bias_columns), FIELD(splits), FIELD(split_keys);
  FIELD(split_queries);
#undef FIELD
#define STRIDES(field) params.def_prop_ro(#field, &tuple_of<AttentionParams, &AttentionParams::field>)
  STRIDES(bias_strides), STRIDES(query_strides), STRIDES(key_strides), STRIDES(value_strides), STRIDES(out_strides);
  STRIDES(grad_out_strides), STRIDES(grad_query_strides), STRIDES(grad_key_strides), STRIDES(grad_value_strides);
#undef STRIDES

  nb::class_<Plan>(m, "Plan", "What an op would launch.")
      .def_ro("launches", &Plan::launches)
      .def_ro("params", &Plan::params)
      .def_ro("scratch_bytes", &Plan::scratch_bytes)
      .def_ro("tile_map_bytes", &Plan::tile_map_bytes)
      .def_ro("mask_class_bytes", &Plan::mask_class_bytes)
      .def_ro("partial_out_bytes", &Plan::partial_out_bytes)
      .def_ro("partial_lse_bytes", &Plan::partial_lse_bytes);

  m.def("plan", &plan, nb::sig("def plan(**problem: object) -> Plan"),
        "Of attention_forward. The fields of Problem in csrc/plan/plan.h, enumerators by name, the bias flattened: "
        "bias (its kind), bias_sizes, bias_strides. Strides that are not given are contiguous. Raises ValueError.");
  m.def("plan_backward", &backward_plan, nb::sig("def plan_backward(**problem: object) -> Plan"),
        "Of attention_backward. As plan(), with the fields of Gradients: wants_query ... wants_alibi, has_grad_lse, "
        "grad_out_strides, grad_query_strides, grad_key_strides, grad_value_strides, mode, scratch_limit.");
  m.def(
      "plan_append", &append_plan, nb::sig("def plan_append(**problem: object) -> Plan"),
      "Of attention_append. As plan_decode(), with the fields of Append: has_lengths, length, tokens, new_key_strides, "
      "new_value_strides; and where has_rotary is true those of Rotary: rotary_pairs, rotary_positions, "
      "rotary_has_starts, rotary_interleaved, rotary_is_float, queries_advance.");
  m.def("plan_decode", &decode_plan, nb::sig("def plan_decode(**problem: object) -> Plan"),
        "Of attention_decode. As plan(), with the fields of Cache: key_format, value_format, page_size, pages, "
        "pages_per_sequence, key_scale_strides, value_scale_strides, has_leftpad, splits; and bias_is_of_last_keys.");
}

void bind_catalogue(nb::module_& m) {
  nb::class_<Instance>(m, "Instance", "A kernel: one row of metal/instances.def.")
      .def_ro("name", &Instance::name, "Host name.")
      .def_prop_ro("kind", [](const Instance& i) { return name_of(kKinds, i.kind); })
      .def_prop_ro("dtype", [](const Instance& i) { return name_of(kDTypes, i.dtype); })
      .def_prop_ro("path", [](const Instance& i) { return name_of(kPaths, i.path); })
      .def_prop_ro(
          "memory", [](const Instance& i) { return name_of(kMemories, i.memory); }, "Of a forward kernel.")
      .def_prop_ro(
          "own", [](const Instance& i) { return name_of(kOwns, i.own); }, "Of backward_dq.")
      .def_ro("head_dim", &Instance::head_dim, "Bucket; 0 for any.")
      .def_ro("value_dim", &Instance::value_dim, "Bucket; 0 for any.")
      .def_ro("simdgroups", &Instance::simdgroups)
      .def_ro("rows", &Instance::rows, "That a threadgroup owns.")
      .def_ro("block", &Instance::block, "Rows of the other side per step.")
      .def_prop_ro("threads", &Instance::threads)
      .def_ro("threadgroup_memory", &Instance::threadgroup_memory);
  m.def(
      "catalogue", [] { return std::vector(std::begin(kInstances), std::end(kInstances)); },
      "Every kernel instance there is.");
}

}  // namespace mfa
