// mfa.simulate(): csrc/metal, the host code of a Mac, over the driver, for CPU tensors.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "plan/launcher.h"

namespace mfa {

// A launch that has run. threadgroup_memory is what the kernel really used.
struct SimulatedLaunch : Launch {
  mfa_sim_counters counters;
};

class __attribute__((visibility("default"))) SimulatorLauncher final : public Launcher {
 public:
  // `checks` is a mask of MFA_SIM_CHECK_*, and needs a kernel library built in count mode. Seed 0 is the natural order.
  // Throws std::invalid_argument.
  SimulatorLauncher(const std::string& kernel_library, Family family, std::uint32_t checks, std::uint64_t seed);
  ~SimulatorLauncher() override;

  Family family() const override;
  void run(const Plan& plan, const Arguments& arguments) override;

  std::vector<SimulatedLaunch> launches() const;
  std::optional<std::string> finding() const;  // what was wrong with the last run that failed
  std::vector<std::string> notes() const;      // what is unusual, and why
  void clear();                                // forgets launches and finding

 private:
  struct Backend;  // csrc/metal's launcher; keeps metal-cpp out of this header

  void record(const Plan& plan);

  std::string kernel_library_;
  Family family_;
  std::uint32_t checks_;
  std::uint64_t seed_;
  std::unique_ptr<Backend> backend_;
  mutable std::mutex mutex_;  // of the results
  std::vector<SimulatedLaunch> launches_;
  std::optional<std::string> finding_;
};

}  // namespace mfa
