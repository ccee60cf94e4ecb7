#include "metal/launch.h"

#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace mfa {
namespace {

using metal::Pipeline;

static_assert(sizeof(AttentionParams) <= 4096, "Metal's limit of setBytes");

metal::Device usable(metal::Device device) {
  if (!device.why_not.empty()) throw std::runtime_error(device.why_not);
  return device;
}

MTL::Size size_of(const std::array<std::uint32_t, 3>& extent) { return MTL::Size(extent[0], extent[1], extent[2]); }

// A captured GPU trace shows the dispatch under the kernel's name.
class DebugGroup {
 public:
  DebugGroup(MTL::ComputeCommandEncoder& encoder, const NS::String* label) : encoder_(encoder) {
    encoder_.pushDebugGroup(label);
  }
  ~DebugGroup() { encoder_.popDebugGroup(); }
  DebugGroup(const DebugGroup&) = delete;
  DebugGroup& operator=(const DebugGroup&) = delete;

 private:
  MTL::ComputeCommandEncoder& encoder_;
};

// Everything is set on every dispatch: torch's ops use the same encoder, before us and after.
void encode(MTL::ComputeCommandEncoder& encoder, const Pipeline& pipeline, const Launch& launch,
            const AttentionParams& params, const Arguments& arguments) {
  const DebugGroup group(encoder, pipeline.label.get());
  encoder.setComputePipelineState(pipeline.state.get());
  for (NS::UInteger index = 0; index < arguments.size(); ++index)
    if (arguments[index].storage)
      encoder.setBuffer(static_cast<const MTL::Buffer*>(arguments[index].storage), arguments[index].offset, index);
  encoder.setBytes(&params, sizeof params, kParams);
  encoder.setBytes(launch.unit.data(), sizeof launch.unit, kFirstUnit);
  encoder.dispatchThreadgroups(size_of(launch.grid), size_of(launch.group));
}

}  // namespace

MetalLauncher::MetalLauncher(metal::TorchQueue& queue, const std::filesystem::path& library_directory,
                             const std::filesystem::path& cache_directory)
    : device_(usable(metal::device_of(queue))),
      queue_(queue),
      library_(device_, library_directory, notes_),
      archive_(device_, library_.hash(), cache_directory, notes_),
      pipelines_(device_, library_, archive_) {
  if (!device_.note.empty()) notes_.add(device_.note);
}

void MetalLauncher::run(const Plan& plan, const Arguments& arguments) try {
  // Pipelines come before the block: while it runs, every op on this stream waits.
  std::vector<std::pair<const Launch*, std::shared_ptr<const Pipeline>>> steps;
  steps.reserve(plan.launches.size());
  for (const Launch& launch : plan.launches) steps.emplace_back(&launch, pipelines_.get(launch));
  if (steps.empty()) return;
  // Dispatches that depend on one another need no barrier: torch's encoder is a serial one.
  const auto encode_all = [&](MTL::ComputeCommandEncoder& encoder) {
    for (const auto& [launch, pipeline] : steps) encode(encoder, *pipeline, *launch, plan.params, arguments);
  };
  queue_.run(std::cref(encode_all));  // a copy would be on the heap
} catch (const std::exception&) {
  throw;
} catch (...) {
  throw std::runtime_error(metal::text_of_current_exception());
}

void MetalLauncher::clear_cache() {
  pipelines_.clear();
  archive_.clear();
}

}  // namespace mfa
