#include "metal/pipeline.h"

#include <stdexcept>

namespace mfa::metal {
namespace {

struct Compiled {
  NS::SharedPtr<MTL::ComputePipelineState> state;
  NS::Error* error = nullptr;
};

Compiled make_state(MTL::Device& device, const MTL::ComputePipelineDescriptor& descriptor,
                    MTL::PipelineOption options) {
  Compiled result;
  result.state = NS::TransferPtr(device.newComputePipelineState(&descriptor, options, nullptr, &result.error));
  return result;
}

void check_threads(const Launch& launch, const MTL::ComputePipelineState& state) {
  const NS::UInteger threads = NS::UInteger{launch.group[0]} * launch.group[1] * launch.group[2];
  const NS::UInteger most = state.maxTotalThreadsPerThreadgroup();
  if (threads > most)
    throw std::runtime_error("kernel " + std::string(launch.kernel) + " is launched with " + std::to_string(threads) +
                             " threads a threadgroup, of which this GPU runs " + std::to_string(most) +
                             ": please report it with the output of python -m mfa info");
}

}  // namespace

Pipelines::Pipelines(const Device& device, Library& library, Archive& archive)
    : device_(device.handle.get()), library_(library), archive_(archive) {}

Pipelines::Key Pipelines::key_of(const Launch& launch) {
  Key key{launch.kernel};
  for (const Constant& constant : launch.constants) {
    key.present |= std::uint64_t{1} << constant.index;
    key.values |= std::uint64_t{constant.value} << constant.index;
  }
  return key;
}

std::shared_ptr<const Pipeline> Pipelines::get(const Launch& launch) {
  std::shared_ptr<Entry> entry;
  {
    const std::lock_guard lock(mutex_);
    std::shared_ptr<Entry>& place = entries_[key_of(launch)];
    if (!place) place = std::make_shared<Entry>();
    entry = place;
  }
  // An entry without a pipeline is being compiled, or its compilation failed and is tried again.
  const std::lock_guard lock(entry->mutex);
  if (!entry->pipeline.state) entry->pipeline = compile(launch);
  return {entry, &entry->pipeline};
}

Pipeline Pipelines::compile(const Launch& launch) {
  const Pool pool;
  const auto function = library_.function(launch);
  auto descriptor = NS::TransferPtr(MTL::ComputePipelineDescriptor::alloc()->init());
  NS::String* label = ns_string(launch.kernel);
  descriptor->setComputeFunction(function.get());
  descriptor->setLabel(label);
  archive_.use_for(*descriptor.get());

  Compiled found;
  if (descriptor->binaryArchives())
    found = make_state(*device_, *descriptor.get(), MTL::PipelineOptionFailOnBinaryArchiveMiss);
  if (!found.state) {
    // Not in the archive, or the archive is damaged inside: compile without it.
    descriptor->setBinaryArchives(nullptr);
    found = make_state(*device_, *descriptor.get(), MTL::PipelineOptionNone);
    if (!found.state)
      throw std::runtime_error("Metal can't compile " + std::string(launch.kernel) + ": " + text_of(found.error));
    archive_.add(*descriptor.get());
    const std::lock_guard lock(mutex_);
    ++compiled_;
  }
  check_threads(launch, *found.state.get());
  return {found.state, NS::RetainPtr(label)};
}

void Pipelines::clear() {
  const std::lock_guard lock(mutex_);
  entries_.clear();
}

std::uint64_t Pipelines::compiled() const {
  const std::lock_guard lock(mutex_);
  return compiled_;
}

}  // namespace mfa::metal
