// (kernel, constants) -> pipeline state, compiled once.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "metal/archive.h"
#include "metal/library.h"

namespace mfa::metal {

struct Pipeline {
  NS::SharedPtr<MTL::ComputePipelineState> state;
  NS::SharedPtr<NS::String> label;  // the kernel's name, for debug groups
};

class Pipelines {
 public:
  Pipelines(const Device& device, Library& library, Archive& archive);

  // Callers that want the same pipeline wait for the first of them; others are not held up. Never null; throws
  // std::runtime_error.
  std::shared_ptr<const Pipeline> get(const Launch& launch);

  // Forgets all. Work that is under way keeps its own references.
  void clear();

  std::uint64_t compiled() const;  // how many get() has compiled, not found

 private:
  struct Key {
    std::string kernel;
    std::uint64_t present = 0, values = 0;  // bit i: constant i
    auto operator<=>(const Key&) const = default;
  };
  struct Entry {
    std::mutex mutex;
    Pipeline pipeline;
  };

  static Key key_of(const Launch& launch);
  Pipeline compile(const Launch& launch);

  MTL::Device* device_;
  Library& library_;
  Archive& archive_;
  mutable std::mutex mutex_;
  std::map<Key, std::shared_ptr<Entry>> entries_;
  std::uint64_t compiled_ = 0;
};

}  // namespace mfa::metal
