// MTLComputePipelineState and its descriptor.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "foundation.h"
#include "library.h"

namespace mfa::driver {

class PipelineDescriptor final : public Object {
 public:
  PipelineDescriptor() : Object("MTLComputePipelineDescriptor") {}
  std::string label;
  Ref<Function> function;
  Ref<Array> archives;
  std::uint64_t max_threads = 0;
  bool whole_simdgroups = false;
};

class Pipeline final : public Object {
 public:
  Pipeline(Function* of, std::string name, std::uint64_t threads);
  const char* kernel() const { return function->kernel->name; }
  Device* device() const { return function->library->device; }

  Ref<Function> function;
  std::string label;  // the descriptor's, or the function's name
  std::uint64_t max_threads;
  bool whole_simdgroups = false;
  std::vector<const mfa_sim_parameter*> parameters;  // without built-ins and those that a function constant removes
  std::uint64_t static_threadgroup_memory = 0;       // known after the first dispatch only
};

class Archive final : public Object {
 public:
  explicit Archive(Device* of) : Object("MTLBinaryArchive"), device(of) {}
  Device* const device;
  std::set<std::string> keys;  // Function::key()
  std::string label;
};

// How often each Function::key() was compiled, archive hits not counted.
std::map<std::string, int> compilations();
void forget_compilations();

}  // namespace mfa::driver
