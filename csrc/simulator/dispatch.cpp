// mfa_sim_dispatch: checks what the host bound, then runs the grid one threadgroup after another.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "checks.h"
#include "failure.h"
#include "fault.h"
#include "guarded_copies.h"
#include "library.h"
#include "memory.h"
#include "scheduler.h"

namespace mfa::sim {
namespace {

using Info = mfa_sim_dispatch_info;

unsigned long long number(uint64_t value) { return value; }

bool check_grid(const Info& info, const mfa_sim_kernel& kernel) {
  const uint32_t* grid = info.threadgroups;
  const uint32_t* group = info.threads_per_threadgroup;
  uint64_t groups = 1, threads = 1;
  for (int i = 0; i < 3; ++i) {
    groups *= grid[i];
    threads = std::min<uint64_t>(threads * group[i], UINT32_MAX);
    if (groups > UINT32_MAX) break;
  }
  if (groups == 0 || groups > UINT32_MAX) {
    failure.add("the grid of (%u, %u, %u) threadgroups is %s", grid[0], grid[1], grid[2],
                groups == 0 ? "empty" : "too large");
  } else if (threads == 0) {
    failure.add("the threadgroup of (%u, %u, %u) threads is empty", group[0], group[1], group[2]);
  } else if (threads > MFA_SIM_MAX_THREADS) {
    failure.add("%llu threads per threadgroup exceed the limit of %d", number(threads), MFA_SIM_MAX_THREADS);
  } else if (kernel.max_total_threads > 0 && threads > static_cast<uint64_t>(kernel.max_total_threads)) {
    failure.add("%llu threads per threadgroup exceed the kernel's max_total_threads_per_threadgroup of %d",
                number(threads), kernel.max_total_threads);
  }
  return !failure.happened();
}

bool set_constants(const Info& info) {
  const auto& constants = info.library->every_constant;
  for (const auto& constant : constants) {
    memset(constant.address, 0, constant.size);
    if (constant.is_set != nullptr) *constant.is_set = 0;
  }
  for (int i = 0; i < info.constant_count; ++i) {
    const mfa_sim_constant_value& given = info.constants[i];
    const mfa_sim_function_constant* known = nullptr;
    bool set = false;
    for (const auto& constant : constants) {
      if (constant.index != given.index) continue;
      known = &constant;
      if (constant.size != given.size) continue;
      memcpy(constant.address, given.value, given.size);
      if (constant.is_set != nullptr) *constant.is_set = 1;
      set = true;
    }
    if (known == nullptr) failure.add("there is no function constant with index %d", given.index);
    if (known != nullptr && !set) {
      failure.add("function constant '%s' (index %d) is a %s of %zu bytes, but the value given has %zu", known->name,
                  known->index, known->type, known->size, given.size);
    }
    if (!set) return false;
  }
  return true;
}

// Whether the constant that guards a parameter, if there is one, is true. False with a failure when it is unknown.
bool is_present(const mfa_sim_library& library, const mfa_sim_parameter& parameter) {
  if (parameter.function_constant == nullptr) return true;
  const mfa_sim_function_constant* constant = library.find_constant(parameter.function_constant);
  if (constant == nullptr) {
    failure.add("parameter '%s' is guarded by '%s', which is not a function constant", parameter.name,
                parameter.function_constant);
    return false;
  }
  const auto* bytes = static_cast<const uint8_t*>(constant->address);
  return std::any_of(bytes, bytes + constant->size, [](uint8_t byte) { return byte != 0; });
}

void bind_buffer(const Info& info, const mfa_sim_parameter& parameter, int i, Launch& launch) {
  const mfa_sim_argument& argument = info.arguments[parameter.index];
  if (argument.address == nullptr) {
    failure.add("nothing is bound to buffer %d, parameter '%s'", parameter.index, parameter.name);
  } else if (parameter.is_reference && argument.size < parameter.element_size) {
    failure.add("buffer %d, parameter '%s', holds %llu bytes, but '%s' needs %zu", parameter.index, parameter.name,
                number(argument.size), parameter.type, parameter.element_size);
  } else {
    launch.arguments[i] = argument.address;
    regions.add(i, argument, parameter.writable != 0, strstr(parameter.type, "constant") == nullptr);
  }
}

void bind_threadgroup(const Info& info, const mfa_sim_parameter& parameter, int i, Launch& launch) {
  const uint64_t size = info.threadgroup_memory[parameter.index];
  if (size == 0 || size % 16 != 0) {
    failure.add("threadgroup memory %d, parameter '%s', has %llu bytes; it must be a multiple of 16 and not 0",
                parameter.index, parameter.name, number(size));
  } else {
    launch.arguments[i] = arena.place(&info.threadgroup_memory[parameter.index], size, 16, parameter.name);
  }
}

bool bind(const Info& info, const mfa_sim_kernel& kernel, Launch& launch) {
  arena.clear();
  regions.clear(&kernel);
  if (kernel.parameter_count > kMaxParameters) failure.add("more than %d parameters", kMaxParameters);
  for (int i = 0; i < kernel.parameter_count && !failure.happened(); ++i) {
    const mfa_sim_parameter& parameter = kernel.parameters[i];
    launch.arguments[i] = nullptr;
    if (parameter.kind == MFA_SIM_BUILTIN || !is_present(*info.library, parameter)) continue;
    if (parameter.index < 0 || parameter.index >= MFA_SIM_BUFFERS) {
      failure.add("parameter '%s' has index %d", parameter.name, parameter.index);
    } else if (parameter.kind == MFA_SIM_BUFFER) {
      bind_buffer(info, parameter, i, launch);
    } else {
      bind_threadgroup(info, parameter, i, launch);
    }
  }
  regions.merge();
  return !failure.happened();
}

bool run_grid(const Launch& launch) {
  const auto [x, y, z] = launch.groups;
  std::vector<uint32_t> order(x * y * z);
  std::iota(order.begin(), order.end(), 0u);
  if (launch.seed != 0) {
    for (uint32_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[scheduler.random(i + 1)]);
  }
  for (uint32_t i : order) {
    arena.poison();
    if (!scheduler.run({i % x, i / x % y, i / x / y})) return false;
  }
  return true;
}

// Returns the static threadgroup memory used.
uint32_t dispatch(const Info& info) {
  const mfa_sim_kernel* kernel = info.library->find_kernel(info.kernel);
  if (kernel == nullptr) {
    failure.add("no such kernel in %s", base_name(info.library->path.c_str()));
    return 0;
  }
  if (info.checks != 0 && !info.library->instrumented) {
    failure.add("checks need a library built in count mode, with -fsanitize=thread; %s is not",
                base_name(info.library->path.c_str()));
    return 0;
  }
  Launch launch{};
  launch.entry = kernel->entry;
  launch.argument_count = kernel->parameter_count;
  launch.groups = {info.threadgroups[0], info.threadgroups[1], info.threadgroups[2]};
  launch.threads = {info.threads_per_threadgroup[0], info.threads_per_threadgroup[1], info.threads_per_threadgroup[2]};
  launch.seed = info.seed;
  launch.allow_divergence = info.allow_divergence != 0;
  if (!check_grid(info, *kernel) || !set_constants(info) || !bind(info, *kernel, launch)) return 0;
  GuardedCopies copies;
  if ((info.checks & MFA_SIM_CHECK_BOUNDS) != 0 && !copies.make(regions, launch)) return 0;
  const uint32_t dynamic_memory = arena.used();
  if (!scheduler.begin(launch)) {
    failure.add("no address space for the threads' stacks");
    return 0;
  }
  if (checks.begin(info.library, info.checks)) {
    FaultGuard guard;
    run_grid(launch);
  }
  checks.end();
  return arena.used() - dynamic_memory;
}

}  // namespace
}  // namespace mfa::sim

using namespace mfa::sim;

void* mfa_sim_threadgroup_variable(const void* id, size_t size, size_t align, const char* name, const char* file,
                                   int line) {
  void* storage = arena.find(id);
  if (storage == nullptr) storage = arena.place(id, size, align, name);
  if (storage == nullptr) {
    failure.at(file, line);
    fail();
  }
  return storage;
}

int mfa_sim_dispatch(const mfa_sim_dispatch_info* info, mfa_sim_counters* out, uint64_t* threadgroup_memory_used,
                     char* error, size_t error_size) {
  std::lock_guard guard(engine_lock);
  failure.clear();
  counters = {};
  const uint32_t static_memory = dispatch(*info);
  if (out != nullptr) *out = counters;
  if (threadgroup_memory_used != nullptr) *threadgroup_memory_used = static_memory;
  if (error != nullptr && error_size > 0) error[0] = 0;
  if (failure.happened()) failure.message(info->kernel, error, error_size);
  return failure.happened() ? 1 : 0;
}
