#include "execute.h"

#include <algorithm>
#include <mutex>

#include "findings.h"
#include "settings.h"

namespace mfa::driver {
namespace {

constexpr std::size_t kErrorSize = 8192, kLaunches = 100000;  // no more are remembered

std::mutex lock;
std::vector<LaunchRecord> records;

unsigned long long number(std::uint64_t value) { return value; }

bool is_zero(const Size& size) { return size.width == 0 || size.height == 0 || size.depth == 0; }

// "kernel 'forward_f16_d64'", or with the pipeline's label when that says something else.
std::string name_of(const Pipeline& pipeline) {
  std::string text = std::string("kernel '") + pipeline.kernel() + "'";
  if (pipeline.label != pipeline.kernel()) text += " (" + pipeline.label + ")";
  return text;
}

bool validate_buffer(const Bindings& b, const std::string& who, const mfa_sim_parameter& parameter, std::uint64_t op) {
  const Slot& slot = b.slots[parameter.index];
  if (!slot.bound) {
    report("unbound-buffer", "%s: nothing is bound to buffer %d, parameter '%s'", who.c_str(), parameter.index,
           parameter.name);
  } else if (slot.op != op) {
    report("left-over", "%s: buffer %d, parameter '%s', is left over from an earlier op on this encoder", who.c_str(),
           parameter.index, parameter.name);
  } else if (slot.buffer && slot.buffer->dead) {
    report("use-after-release", "%s: buffer %d, parameter '%s', is %s, which has been released", who.c_str(),
           parameter.index, parameter.name, slot.buffer->describe().c_str());
  } else if ((parameter.is_reference || !slot.buffer) && slot.size() < parameter.element_size) {
    report("short-argument", "%s: buffer %d, parameter '%s', holds %llu bytes, but '%s' reads %zu", who.c_str(),
           parameter.index, parameter.name, number(slot.size()), parameter.type, parameter.element_size);
  } else {
    return true;
  }
  return false;
}

bool validate_threads(const Bindings& b, const std::string& who, const Size& groups, const Size& threads) {
  const Size t = threads;
  const std::uint64_t count = t.width * t.height * t.depth;
  if (is_zero(groups) || is_zero(threads)) {
    report("empty-grid", "%s: a grid of (%llu, %llu, %llu) threadgroups of (%llu, %llu, %llu) threads is empty",
           who.c_str(), number(groups.width), number(groups.height), number(groups.depth), number(t.width),
           number(t.height), number(t.depth));
  } else if (count > b.pipeline->max_threads) {
    report("too-many-threads", "%s: %llu threads per threadgroup, but the pipeline's maximum is %llu", who.c_str(),
           number(count), number(b.pipeline->max_threads));
  } else if (b.pipeline->whole_simdgroups && count % MFA_SIM_LANES != 0) {
    report("partial-simdgroup",
           "%s: %llu threads per threadgroup are not the multiple of %d that the descriptor promised", who.c_str(),
           number(count), MFA_SIM_LANES);
  } else {
    return true;
  }
  return false;
}

bool validate_threadgroup_memory(const Bindings& b, const std::string& who) {
  std::uint64_t dynamic = 0;
  for (const mfa_sim_parameter* parameter : b.pipeline->parameters) {
    if (parameter->kind != MFA_SIM_THREADGROUP) continue;
    const std::uint64_t size = b.threadgroup_memory[parameter->index];
    if (size == 0) {
      report("no-threadgroup-memory", "%s: threadgroup memory %d, parameter '%s', has no length", who.c_str(),
             parameter->index, parameter->name);
      return false;
    }
    dynamic += size;
  }
  const std::uint64_t total = dynamic + b.pipeline->static_threadgroup_memory;
  if (total <= MFA_SIM_THREADGROUP_LIMIT) return true;
  report("threadgroup-memory", "%s: %llu bytes of threadgroup memory, %llu of them static, exceed the limit of %d",
         who.c_str(), number(total), number(b.pipeline->static_threadgroup_memory), MFA_SIM_THREADGROUP_LIMIT);
  return false;
}

}  // namespace

const std::uint8_t* Slot::address() const {
  return buffer ? reinterpret_cast<const std::uint8_t*>(buffer->contents) + offset : bytes.data();
}

bool validate(const Bindings& b, const Size& groups, const Size& threads, std::uint64_t op) {
  if (!b.pipeline) {
    report("no-pipeline", "a dispatch without a pipeline: call setComputePipelineState first");
    return false;
  }
  const std::string who = name_of(*b.pipeline);
  if (b.pipeline_op != op) {
    report("left-over", "%s: the pipeline is left over from an earlier op on this encoder", who.c_str());
    return false;
  }
  if (!validate_threads(b, who, groups, threads) || !validate_threadgroup_memory(b, who)) return false;
  for (const mfa_sim_parameter* parameter : b.pipeline->parameters) {
    if (parameter->kind == MFA_SIM_BUFFER && !validate_buffer(b, who, *parameter, op)) return false;
  }
  return true;
}

std::optional<std::string> execute(const Bindings& b, const Size& groups, const Size& threads) {
  const Settings s = settings();
  const Function& function = *b.pipeline->function;
  std::vector<mfa_sim_constant_value> constants;
  for (const auto& [index, bytes] : function.constants) constants.push_back({index, bytes.data(), bytes.size()});

  mfa_sim_dispatch_info info{};
  info.library = function.library->engine;
  info.kernel = function.kernel->name;
  info.constants = constants.data();
  info.constant_count = static_cast<int>(constants.size());
  std::uint64_t dynamic = 0;
  for (int i = 0; i < 3; ++i) {
    info.threadgroups[i] = static_cast<std::uint32_t>((&groups.width)[i]);
    info.threads_per_threadgroup[i] = static_cast<std::uint32_t>((&threads.width)[i]);
  }
  std::vector<Bytes> copies;  // setBytes gives the kernel its own; the engine takes writable addresses
  copies.reserve(b.slots.size());
  for (std::size_t i = 0; i < b.slots.size(); ++i) {
    const Slot& slot = b.slots[i];
    if (!slot.bound) continue;
    const std::uint8_t* address = slot.buffer ? slot.address() : copies.emplace_back(slot.bytes).data();
    info.arguments[i] = {const_cast<std::uint8_t*>(address), slot.size()};
  }
  for (const mfa_sim_parameter* parameter : b.pipeline->parameters) {
    if (parameter->kind != MFA_SIM_THREADGROUP) continue;
    info.threadgroup_memory[parameter->index] = b.threadgroup_memory[parameter->index];
    dynamic += b.threadgroup_memory[parameter->index];
  }
  info.checks = mfa_sim_is_instrumented(info.library) ? s.checks : 0;
  info.seed = s.seed;

  LaunchRecord record{function.kernel->name, groups, threads, 0, {}};
  char error[kErrorSize] = {};
  if (mfa_sim_dispatch(&info, &record.counters, &record.threadgroup_memory, error, sizeof error) != 0) return error;
  b.pipeline->static_threadgroup_memory = record.threadgroup_memory - std::min(record.threadgroup_memory, dynamic);
  const std::lock_guard guard(lock);
  if (records.size() < kLaunches) records.push_back(std::move(record));
  return std::nullopt;
}

std::vector<LaunchRecord> launches() {
  const std::lock_guard guard(lock);
  return records;
}

void clear_launches() {
  const std::lock_guard guard(lock);
  records.clear();
}

}  // namespace mfa::driver
