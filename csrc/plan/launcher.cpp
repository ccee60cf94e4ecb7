#include "plan/launcher.h"

#include <atomic>
#include <stdexcept>

namespace {

std::atomic<mfa::Launcher*> simulator = nullptr;

}  // namespace

mfa::Launcher* mfa::simulated_launcher() { return simulator.load(); }

#ifndef MFA_METAL
mfa::Launcher& mfa::metal_launcher() {
  throw std::runtime_error("attention on MPS tensors needs Metal, but this build of mfa has no Metal backend");
}
#endif

mfa::Launcher* mfa_set_simulated_launcher(mfa::Launcher* launcher) { return simulator.exchange(launcher); }
