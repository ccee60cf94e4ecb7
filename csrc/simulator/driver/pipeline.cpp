#include "pipeline.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "constants.h"
#include "device.h"
#include "findings.h"
#include "runtime.h"

namespace mfa::driver {
namespace {

constexpr const char* kDomain = "AGXMetal";
constexpr std::uint64_t kFailOnArchiveMiss = 4;  // MTLPipelineOption

std::mutex lock;
std::map<std::string, int> counts;

bool in_archives(const PipelineDescriptor& descriptor, const std::string& key) {
  if (!descriptor.archives) return false;
  for (const auto& item : descriptor.archives->items) {
    const auto* archive = dynamic_cast<const Archive*>(item.get());
    if (archive == nullptr) report("archive", "setBinaryArchives: %s is no archive", item->describe().c_str());
    if (archive != nullptr && archive->keys.contains(key)) return true;
  }
  return false;
}

// Whether a function constant removes the parameter.
bool is_removed(const Function& function, const mfa_sim_parameter& parameter) {
  if (parameter.function_constant == nullptr) return false;
  const mfa_sim_library* library = function.library->engine;
  for (int i = 0; i < mfa_sim_function_constant_count(library); ++i) {
    const mfa_sim_function_constant& constant = *mfa_sim_function_constant_at(library, i);
    if (strcmp(constant.name, parameter.function_constant) != 0) continue;
    const auto value = function.constants.find(constant.index);
    if (value == function.constants.end()) return true;
    return std::ranges::none_of(value->second, [](std::uint8_t byte) { return byte != 0; });
  }
  return false;
}

void* build(Device* device, const PipelineDescriptor& descriptor, std::uint64_t options, void** error) {
  Function* function = descriptor.function.get();
  if (function == nullptr) {
    set_error(error, kDomain, 3, "computeFunction must not be nil");
    return nullptr;
  }
  if (function->library->device != device) {
    report("device", "a pipeline of %s is asked of another GPU than its library's", function->describe().c_str());
    return nullptr;
  }
  if (const auto reason = unspecialised(*function)) {
    set_error(error, kDomain, 3, *reason);
    return nullptr;
  }
  const std::string key = function->key();
  if (!in_archives(descriptor, key)) {
    if (options & kFailOnArchiveMiss) {
      set_error(error, kDomain, 2,
                std::string("'") + function->kernel->name + "' is in no binary archive of the descriptor");
      return nullptr;
    }
    const std::lock_guard guard(lock);
    ++counts[key];
  }
  const std::uint64_t own =
      function->kernel->max_total_threads > 0 ? function->kernel->max_total_threads : MFA_SIM_MAX_THREADS;
  auto* pipeline = make<Pipeline>(function, descriptor.label.empty() ? function->kernel->name : descriptor.label,
                                  descriptor.max_threads > 0 ? std::min(descriptor.max_threads, own) : own);
  pipeline->whole_simdgroups = descriptor.whole_simdgroups;
  return give(pipeline);
}

void* with_function(Device* self, const void* function, void** error) {
  PipelineDescriptor descriptor;
  descriptor.function = expect<Function>(function, "MTLFunction", "newComputePipelineStateWithFunction:error:");
  return descriptor.function ? build(self, descriptor, 0, error) : nullptr;
}
void* with_function_options(Device* self, const void* function, std::uint64_t, void** reflection, void** error) {
  if (reflection != nullptr) *reflection = nullptr;
  return with_function(self, function, error);
}
void* with_descriptor(Device* self, const void* descriptor, std::uint64_t options, void** reflection, void** error) {
  if (reflection != nullptr) *reflection = nullptr;
  const auto* d = expect<PipelineDescriptor>(descriptor, "MTLComputePipelineDescriptor",
                                             "newComputePipelineStateWithDescriptor:options:reflection:error:");
  return d == nullptr ? nullptr : build(self, *d, options, error);
}

void set_label(PipelineDescriptor* self, const void* label) { self->label = text_of(label, "setLabel:"); }
void* get_label(PipelineDescriptor* self) { return give_autoreleased(make<String>(self->label)); }
void set_function(PipelineDescriptor* self, const void* function) {
  self->function = expect<Function>(function, "MTLFunction", "setComputeFunction:");
}
void* get_function(PipelineDescriptor* self) { return lend(self->function.get()); }
void set_archives(PipelineDescriptor* self, const void* archives) {
  self->archives = archives == nullptr ? nullptr : expect<Array>(archives, "NSArray", "setBinaryArchives:");
}
void* get_archives(PipelineDescriptor* self) { return lend(self->archives.get()); }
void set_max_threads(PipelineDescriptor* self, std::uint64_t threads) { self->max_threads = threads; }
std::uint64_t get_max_threads(PipelineDescriptor* self) { return self->max_threads; }
void set_whole_simdgroups(PipelineDescriptor* self, bool value) { self->whole_simdgroups = value; }
void reset(PipelineDescriptor* self) {
  self->label.clear();
  self->function = {};
  self->archives = {};
  self->max_threads = 0;
  self->whole_simdgroups = false;
}

std::uint64_t max_threads(Pipeline* self) { return self->max_threads; }
std::uint64_t width(Pipeline*) { return MFA_SIM_LANES; }
std::uint64_t static_memory(Pipeline* self) { return self->static_threadgroup_memory; }
void* label(Pipeline* self) { return give_autoreleased(make<String>(self->label)); }
void* device(Pipeline* self) { return lend(self->device()); }

}  // namespace

Pipeline::Pipeline(Function* of, std::string name, std::uint64_t threads)
    : Object("MTLComputePipelineState"), function(of), label(std::move(name)), max_threads(threads) {
  for (int i = 0; i < of->kernel->parameter_count; ++i) {
    const mfa_sim_parameter& parameter = of->kernel->parameters[i];
    if (parameter.kind != MFA_SIM_BUILTIN && !is_removed(*of, parameter)) parameters.push_back(&parameter);
  }
}

std::map<std::string, int> compilations() {
  const std::lock_guard guard(lock);
  return counts;
}

void forget_compilations() {
  const std::lock_guard guard(lock);
  counts.clear();
}

void define_pipeline() {
  extend("MTLDevice")
      .method<&with_function>("newComputePipelineStateWithFunction:error:")
      .method<&with_function_options>("newComputePipelineStateWithFunction:options:reflection:error:")
      .method<&with_descriptor>("newComputePipelineStateWithDescriptor:options:reflection:error:");
  define("MTLComputePipelineDescriptor", &make_object<PipelineDescriptor>)
      .method<&set_label>("setLabel:")
      .method<&get_label>("label")
      .method<&set_function>("setComputeFunction:")
      .method<&get_function>("computeFunction")
      .method<&set_archives>("setBinaryArchives:")
      .method<&get_archives>("binaryArchives")
      .method<&set_max_threads>("setMaxTotalThreadsPerThreadgroup:")
      .method<&get_max_threads>("maxTotalThreadsPerThreadgroup")
      .method<&set_whole_simdgroups>("setThreadGroupSizeIsMultipleOfThreadExecutionWidth:")
      .method<&reset>("reset");
  define("MTLComputePipelineState")
      .method<&max_threads>("maxTotalThreadsPerThreadgroup")
      .method<&width>("threadExecutionWidth")
      .method<&static_memory>("staticThreadgroupMemoryLength")
      .method<&label>("label")
      .method<&device>("device");
}

}  // namespace mfa::driver
