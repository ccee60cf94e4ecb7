// The memory that a dispatch may touch: bound buffers, and threadgroup variables in an arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine.h"

namespace mfa::sim {

// Bound buffers that overlap are one region: nothing tells through which of them an address was formed.
struct Region {
  uintptr_t begin;
  uint64_t size;
  bool writable;        // a parameter of it is device T*
  bool counted;         // device rather than constant
  uint32_t* cells;      // race shadow: three arrays of `size` stamps (checks.h), or null
  uint64_t parameters;  // mask over the kernel's parameters

  bool holds(uintptr_t address, size_t bytes) const {
    return address - begin < size && bytes <= size - (address - begin);
  }
};

struct Variable {
  const void* id;
  const char* name;
  uint32_t offset;
  uint32_t size;
};

class Arena {
 public:
  static constexpr uint32_t kBytes = 128 << 10;
  static constexpr uint32_t kRedZone = 64;
  static constexpr int kMaxVariables = 255;

  void clear();
  // Null, with the reason in `failure`, when the limit is exceeded.
  void* place(const void* id, size_t size, size_t align, const char* name);
  void* find(const void* id) const;
  // Fills every variable with ones: NaN in every float format.
  void poison();

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(bytes_); }
  uint32_t extent() const { return extent_; }
  uint32_t used() const { return used_; }  // what Metal would count: no red zones
  bool holds(uint32_t offset, size_t size) const {
    return owner_[offset] != 0 && offset + size <= kBytes && owner_[offset] == owner_[offset + size - 1];
  }
  const Variable& variable_near(uint32_t offset) const;
  int count() const { return count_; }

 private:
  alignas(256) uint8_t bytes_[kBytes];
  uint8_t owner_[kBytes] = {};  // 1 + variable, 0 in a red zone
  Variable variables_[kMaxVariables] = {};
  int count_ = 0;
  uint32_t extent_ = 0;  // up to the last red zone
  uint32_t used_ = 0;
};

extern Arena arena;

class Regions {
 public:
  void clear(const mfa_sim_kernel* kernel);
  void add(int parameter, const mfa_sim_argument& argument, bool writable, bool counted);
  void merge();  // call once, after the last add()

  const Region* find(uintptr_t address) const;  // the one that begins at or before it; null when there is none
  std::vector<Region>& all() { return regions_; }
  // Adds "byte 16 of buffer 'K' (index 1, 4096 bytes)" to `failure`, for the nearest buffer.
  bool describe_nearest(uintptr_t address) const;
  void describe(const Region& region, uintptr_t address) const;

 private:
  const mfa_sim_kernel* kernel_ = nullptr;
  std::vector<Region> regions_;  // by address, disjoint
};

extern Regions regions;

}  // namespace mfa::sim
