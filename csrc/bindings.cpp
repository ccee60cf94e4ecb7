// mfa._native: the plan and the catalogue for tests and tools, and the simulator's controls. Needs neither torch nor
// libmfa.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>

#include "catalogue.h"
#include "launcher.h"
#include "plan.h"
#ifdef MFA_SIMULATOR
#include "simulator/launcher.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace mfa;

template <typename Value>
struct Named {
  const char* name;
  Value value;
};

constexpr Named<Family> kFamilies[] = {
    {"apple7", Family::apple7}, {"apple8", Family::apple8}, {"apple9", Family::apple9}, {"apple10", Family::apple10}};
constexpr Named<DType> kDTypes[] = {{"f16", DType::f16}, {"bf16", DType::bf16}, {"f32", DType::f32}};
constexpr Named<Path> kPaths[] = {{"staged", staged}, {"direct", direct}};
constexpr Named<Memory> kMemories[] = {{"split", split}, {"shared", shared}};

template <typename Table>
auto value_of(const Table& table, const std::string& name, const char* what) {
  for (const auto& row : table)
    if (name == row.name) return row.value;
  std::string message = std::string(what) + " is '" + name + "'; it must be one of";
  for (const auto& row : table) message += std::string(" ") + row.name;
  throw nb::value_error(message.c_str());
}

template <typename Table, typename Value>
const char* name_of(const Table& table, Value value) {
  return std::ranges::find_if(table, [&](const auto& row) { return row.value == value; })->name;
}

// A property that is a tuple; of an array, nanobind would make a list.
template <typename Class, auto kMember>
auto triple(const Class& object) {
  const auto& values = object.*kMember;
  return std::tuple(values[0], values[1], values[2]);
}

// Unsigned: lengths that plan_forward() is going to refuse may overflow here.
Strides contiguous(std::uint64_t heads, std::uint64_t rows, std::uint64_t columns) {
  return {static_cast<std::int64_t>(heads * rows * columns), static_cast<std::int64_t>(rows * columns),
          static_cast<std::int64_t>(columns)};
}

Plan plan(const std::string& family, const std::string& dtype, std::int64_t batch, std::int64_t query_heads,
          std::int64_t key_heads, std::int64_t query_length, std::int64_t key_length, std::int64_t head_dim,
          std::int64_t value_dim, std::optional<Strides> query_strides, std::optional<Strides> key_strides,
          std::optional<Strides> value_strides, std::optional<Strides> out_strides, bool aligned, double scale,
          std::optional<std::int64_t> window_left, std::optional<std::int64_t> window_right, bool wants_lse) {
  return plan_forward({
      .family = value_of(kFamilies, family, "family"),
      .dtype = value_of(kDTypes, dtype, "dtype"),
      .batch = batch,
      .query_heads = query_heads,
      .key_heads = key_heads,
      .query_length = query_length,
      .key_length = key_length,
      .head_dim = head_dim,
      .value_dim = value_dim,
      .query_strides = query_strides.value_or(contiguous(query_heads, query_length, head_dim)),
      .key_strides = key_strides.value_or(contiguous(key_heads, key_length, head_dim)),
      .value_strides = value_strides.value_or(contiguous(key_heads, key_length, value_dim)),
      .out_strides = out_strides.value_or(contiguous(query_heads, query_length, value_dim)),
      .aligned = aligned,
      .scale = scale,
      .window_left = window_left,
      .window_right = window_right,
      .wants_lse = wants_lse,
  });
}

nb::typed<nb::dict, nb::str, bool> constants(const Launch& launch) {
  nb::dict result;
  for (const Constant& constant : launch.constants) result[name(constant.index)] = constant.value;
  return nb::borrow<nb::typed<nb::dict, nb::str, bool>>(result);
}

void bind_plan(nb::module_& m) {
  nb::class_<Launch>(m, "Launch", "One kernel of a plan.")
      .def_ro("kernel", &Launch::kernel, "Host name.")
      .def_prop_ro("constants", &constants, "Function constants by name.")
      .def_prop_ro("grid", &triple<Launch, &Launch::grid>, "Threadgroups: query head, query tile, batch.")
      .def_prop_ro("group", &triple<Launch, &Launch::group>, "Threads per threadgroup.")
      .def_ro("threadgroup_memory", &Launch::threadgroup_memory, "Bytes.");

  auto params = nb::class_<AttentionParams>(m, "AttentionParams", "The parameter block of metal/params.h.");
#define FIELD(field) params.def_ro(#field, &AttentionParams::field)
  FIELD(batch), FIELD(query_heads), FIELD(key_heads), FIELD(group_size), FIELD(query_length), FIELD(key_length);
  FIELD(head_dim), FIELD(value_dim), FIELD(window_left), FIELD(window_right), FIELD(scale_log2), FIELD(heavy_first);
#undef FIELD
#define STRIDES(field) params.def_prop_ro(#field, &triple<AttentionParams, &AttentionParams::field>)
  STRIDES(query_strides), STRIDES(key_strides), STRIDES(value_strides), STRIDES(out_strides);
#undef STRIDES

  nb::class_<Plan>(m, "Plan", "What attention_forward would launch.")
      .def_ro("launches", &Plan::launches)
      .def_ro("params", &Plan::params);

  m.def("plan", &plan, nb::kw_only(), "family"_a = "apple7", "dtype"_a = "f16", "batch"_a = 1, "query_heads"_a = 1,
        "key_heads"_a = 1, "query_length"_a, "key_length"_a, "head_dim"_a, "value_dim"_a,
        "query_strides"_a = nb::none(), "key_strides"_a = nb::none(), "value_strides"_a = nb::none(),
        "out_strides"_a = nb::none(), "aligned"_a = true, "scale"_a = 1.0, "window_left"_a = nb::none(),
        "window_right"_a = nb::none(), "wants_lse"_a = true,
        "Strides are those of batch, head and row, in elements; None means contiguous. Raises ValueError.");
}

void bind_catalogue(nb::module_& m) {
  nb::class_<Instance>(m, "Instance", "A kernel: one row of metal/instances.def.")
      .def_ro("name", &Instance::name, "Host name.")
      .def_prop_ro("dtype", [](const Instance& i) { return name_of(kDTypes, i.dtype); })
      .def_prop_ro("path", [](const Instance& i) { return name_of(kPaths, i.path); })
      .def_prop_ro("memory", [](const Instance& i) { return name_of(kMemories, i.memory); })
      .def_ro("head_dim", &Instance::head_dim)
      .def_ro("value_dim", &Instance::value_dim)
      .def_ro("simdgroups", &Instance::simdgroups)
      .def_ro("row_tiles", &Instance::row_tiles)
      .def_ro("block_keys", &Instance::block_keys)
      .def_prop_ro("threads", &Instance::threads)
      .def_prop_ro("block_queries", &Instance::block_queries)
      .def_prop_ro("threadgroup_memory", &Instance::threadgroup_memory);
  m.def(
      "catalogue", [] { return std::vector(std::begin(kForwardInstances), std::end(kForwardInstances)); },
      "Every kernel instance there is.");
}

nb::typed<nb::dict, nb::str, nb::object> device_info() {
  nb::dict result;
  result["family"] = nb::none();
  result["name"] = nb::none();
  result["cores"] = nb::none();
  result["why_not"] = kNoMetal;
  return nb::borrow<nb::typed<nb::dict, nb::str, nb::object>>(result);
}

#ifdef MFA_SIMULATOR
constexpr Named<std::uint32_t> kChecks[] = {
    {"races", MFA_SIM_CHECK_RACES}, {"bounds", MFA_SIM_CHECK_BOUNDS}, {"uninitialised", MFA_SIM_CHECK_UNINITIALISED}};

nb::typed<nb::dict, nb::str, std::uint64_t> counters(const SimulatedLaunch& launch) {
  nb::dict result;
#define COUNTER(field) result[#field] = launch.counters.field
  COUNTER(mma), COUNTER(exp), COUNTER(shuffles), COUNTER(reductions), COUNTER(conversions);
  COUNTER(threadgroup_barriers), COUNTER(simdgroup_barriers), COUNTER(fragment_loads);
  COUNTER(device_read_bytes), COUNTER(device_write_bytes), COUNTER(device_reads), COUNTER(device_writes);
  COUNTER(threadgroup_read_bytes), COUNTER(threadgroup_write_bytes);
  COUNTER(threadgroup_reads), COUNTER(threadgroup_writes);
#undef COUNTER
  return nb::borrow<nb::typed<nb::dict, nb::str, std::uint64_t>>(result);
}

// A simulator, and how it gets into libmfa, which this module doesn't link.
class Simulator {
 public:
  using Install = decltype(mfa_set_simulated_launcher);

  Simulator(const std::string& kernel_library, const std::string& family, const std::vector<std::string>& checks,
            std::uint64_t seed)
      : launcher_(kernel_library, value_of(kFamilies, family, "family"), mask(checks), seed) {}
  ~Simulator() { exit(); }
  Simulator(const Simulator&) = delete;
  Simulator& operator=(const Simulator&) = delete;

  void enter(std::uintptr_t install) {
    if (install_) throw std::runtime_error("this simulator is active already");
    install_ = reinterpret_cast<Install*>(install);
    previous_ = install_(&launcher_);
  }

  void exit() {
    if (install_) install_(previous_);
    install_ = nullptr;
  }

  std::vector<SimulatedLaunch> launches() const { return launcher_.launches(); }
  std::optional<std::string> finding() const { return launcher_.finding(); }
  void clear() { launcher_.clear(); }

 private:
  static std::uint32_t mask(const std::vector<std::string>& checks) {
    std::uint32_t bits = 0;
    for (const std::string& check : checks) bits |= value_of(kChecks, check, "a check");
    return bits;
  }

  SimulatorLauncher launcher_;
  Install* install_ = nullptr;
  Launcher* previous_ = nullptr;
};

void bind_simulator(nb::module_& m) {
  nb::class_<SimulatedLaunch, Launch>(m, "SimulatedLaunch", "A launch that has run; its memory is what it really used.")
      .def_prop_ro("counters", &counters);
  nb::class_<Simulator>(m, "Simulator", "Runs the Metal kernels in software, for CPU tensors.")
      .def(nb::init<const std::string&, const std::string&, const std::vector<std::string>&, std::uint64_t>(),
           "kernel_library"_a, "family"_a, "checks"_a = std::vector<std::string>(), "seed"_a = 0,
           "`checks` are of 'races', 'bounds', 'uninitialised', and need the kernels built in count mode.")
      .def("enter", &Simulator::enter, "install"_a,
           "Takes the place of the current simulator. `install` is the address of libmfa's mfa_set_simulated_launcher.")
      .def("exit", &Simulator::exit, "Puts the previous simulator back; nothing when not active.")
      .def_prop_ro("launches", &Simulator::launches)
      .def_prop_ro("finding", &Simulator::finding, "The text of the last dispatch that failed.")
      .def("clear", &Simulator::clear, "Forgets launches and finding.");
}
#endif

}  // namespace

NB_MODULE(_native, m) {
  bind_plan(m);
  bind_catalogue(m);
#ifdef MFA_SIMULATOR
  bind_simulator(m);
#endif
  m.def("device_info", &device_info, "The GPU: family, name, cores; and why_not when Metal can't be used.");
}
