#include "launcher.h"

#include <algorithm>
#include <stdexcept>

namespace mfa {
namespace {

constexpr std::size_t kErrorSize = 8192;

}  // namespace

SimulatorLauncher::SimulatorLauncher(const std::string& kernel_library, Family family, std::uint32_t checks,
                                     std::uint64_t seed)
    : family_(family), checks_(checks), seed_(seed) {
  char error[kErrorSize] = {};
  library_ = mfa_sim_open(kernel_library.c_str(), error, sizeof error);
  if (!library_) throw std::invalid_argument(error);
  if (checks && !mfa_sim_is_instrumented(library_))
    throw std::invalid_argument("checks need a kernel library built in count mode, which " + kernel_library +
                                " is not");
}

void SimulatorLauncher::run(const Plan& plan, const Arguments& arguments) {
  for (const Launch& launch : plan.launches) dispatch(launch, plan.params, arguments);
}

void SimulatorLauncher::dispatch(const Launch& launch, const AttentionParams& params, const Arguments& arguments) {
  static_assert(std::tuple_size_v<Arguments> == MFA_SIM_BUFFERS);
  std::vector<mfa_sim_constant_value> constants;
  for (const Constant& constant : launch.constants)
    constants.push_back({static_cast<int>(constant.index), &constant.value, sizeof constant.value});

  mfa_sim_dispatch_info info{};
  info.library = library_;
  info.kernel = launch.kernel;
  info.constants = constants.data();
  info.constant_count = static_cast<int>(constants.size());
  std::ranges::copy(launch.grid, info.threadgroups);
  std::ranges::copy(launch.group, info.threads_per_threadgroup);
  for (std::size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].storage)
      info.arguments[i] = {static_cast<char*>(arguments[i].storage) + arguments[i].offset, arguments[i].extent};
  AttentionParams block = params;  // the engine takes writable addresses
  std::array<int, 2> unit = launch.unit;
  info.arguments[kParams] = {&block, sizeof block};
  info.arguments[kFirstUnit] = {unit.data(), sizeof unit};
  info.checks = checks_;
  info.seed = seed_;

  SimulatedLaunch record{launch, {}};
  std::uint64_t threadgroup_memory = 0;
  char error[kErrorSize] = {};
  const int status = mfa_sim_dispatch(&info, &record.counters, &threadgroup_memory, error, sizeof error);

  const std::lock_guard lock(mutex_);
  if (status != 0) {
    finding_ = error;
    throw std::runtime_error(error);
  }
  record.threadgroup_memory = static_cast<std::uint32_t>(threadgroup_memory);
  launches_.push_back(record);
}

std::vector<SimulatedLaunch> SimulatorLauncher::launches() const {
  const std::lock_guard lock(mutex_);
  return launches_;
}

std::optional<std::string> SimulatorLauncher::finding() const {
  const std::lock_guard lock(mutex_);
  return finding_;
}

void SimulatorLauncher::clear() {
  const std::lock_guard lock(mutex_);
  launches_.clear();
  finding_.reset();
}

}  // namespace mfa
