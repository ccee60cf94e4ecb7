// mfa._native: plan and catalogue, and the simulator's controls. Needs neither torch nor libmfa.
#include "python/bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "plan/launcher.h"
#ifdef MFA_SIMULATOR
#include "simulator/metal_launcher.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace mfa;

#ifdef MFA_SIMULATOR
constexpr Named<std::uint32_t> kChecks[] = {
    {"races", MFA_SIM_CHECK_RACES}, {"bounds", MFA_SIM_CHECK_BOUNDS}, {"uninitialised", MFA_SIM_CHECK_UNINITIALISED}};

nb::typed<nb::dict, nb::str, std::uint64_t> counters(const SimulatedLaunch& launch) {
  nb::dict result;
#define COUNTER(field) result[#field] = launch.counters.field
  COUNTER(mma), COUNTER(unit_mma), COUNTER(exp), COUNTER(shuffles), COUNTER(reductions), COUNTER(conversions);
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
  std::vector<std::string> notes() const { return launcher_.notes(); }
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
      .def_prop_ro("notes", &Simulator::notes, "What is unusual, and why.")
      .def("clear", &Simulator::clear, "Forgets launches and finding.");
}
#endif

}  // namespace

NB_MODULE(_native, m) {
  // torch keeps kernels in Python, and all that their modules hold, until the process ends. Launches and plans among it
  // would be reported as leaked by these bindings.
  nb::set_leak_warnings(false);
  bind_plan(m);
  bind_catalogue(m);
#ifdef MFA_SIMULATOR
  bind_simulator(m);
#endif
}
