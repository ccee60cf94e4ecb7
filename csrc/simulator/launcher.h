// The simulator as a Launcher: what _native installs while mfa.simulate() is active.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../launcher.h"
#include "engine.h"

namespace mfa {

// A launch that has run. threadgroup_memory is what the kernel really used.
struct SimulatedLaunch : Launch {
  mfa_sim_counters counters;
};

class SimulatorLauncher final : public Launcher {
 public:
  // `checks` is a mask of MFA_SIM_CHECK_*, and needs a kernel library built in count mode. Seed 0 is the natural order.
  // Throws std::invalid_argument.
  SimulatorLauncher(const std::string& kernel_library, Family family, std::uint32_t checks, std::uint64_t seed);

  Family family() const override { return family_; }
  void run(const Plan& plan, const Arguments& arguments) override;

  std::vector<SimulatedLaunch> launches() const;
  std::optional<std::string> finding() const;  // the text of the last dispatch that failed
  void clear();                                // forgets launches and finding

 private:
  void dispatch(const Launch& launch, const AttentionParams& params, const Arguments& arguments);

  const mfa_sim_library* library_;
  Family family_;
  std::uint32_t checks_;
  std::uint64_t seed_;
  mutable std::mutex mutex_;  // ops may run on several threads
  std::vector<SimulatedLaunch> launches_;
  std::optional<std::string> finding_;
};

}  // namespace mfa
