#include "memory.h"

#include <algorithm>
#include <cstring>

#include "asan.h"
#include "failure.h"

namespace mfa::sim {

Arena arena;
Regions regions;

void Arena::clear() {
  memset(owner_, 0, extent_);
  asan_unpoison(bytes_, kBytes);
  asan_poison(bytes_, kRedZone);
  count_ = 0;
  extent_ = kRedZone;
  used_ = 0;
}

void* Arena::find(const void* id) const {
  for (int i = 0; i < count_; ++i) {
    if (variables_[i].id == id) return const_cast<uint8_t*>(bytes_) + variables_[i].offset;
  }
  return nullptr;
}

void* Arena::place(const void* id, size_t size, size_t align, const char* name) {
  const auto round_up = [](size_t value, size_t to) { return (value + to - 1) / to * to; };
  const size_t used = round_up(used_, align) + size;
  const size_t offset = round_up(extent_, std::max<size_t>(align, 16));
  if (used > MFA_SIM_THREADGROUP_LIMIT) {
    failure.add("threadgroup memory: %zu bytes exceed the limit of %d:", used, MFA_SIM_THREADGROUP_LIMIT);
    for (int i = 0; i < count_; ++i) failure.add(" '%s' %u,", variables_[i].name, variables_[i].size);
    failure.add(" '%s' %zu", name, size);
    return nullptr;
  }
  if (count_ == kMaxVariables || offset + size + kRedZone > kBytes) {
    failure.add("threadgroup memory: more variables than the simulator has room for");
    return nullptr;
  }
  variables_[count_++] = {id, name, static_cast<uint32_t>(offset), static_cast<uint32_t>(size)};
  used_ = used;
  memset(bytes_ + offset, 0xff, size);
  memset(owner_ + offset, count_, size);
  asan_poison(bytes_ + extent_, offset - extent_);
  asan_poison(bytes_ + offset + size, kRedZone);
  extent_ = offset + size + kRedZone;
  return bytes_ + offset;
}

void Arena::poison() {
  for (int i = 0; i < count_; ++i) memset(bytes_ + variables_[i].offset, 0xff, variables_[i].size);
}

const Variable& Arena::variable_near(uint32_t offset) const {
  const auto distance = [offset](const Variable& v) {
    return offset < v.offset ? v.offset - offset : offset - std::min(offset, v.offset + v.size);
  };
  return *std::min_element(variables_, variables_ + count_,
                           [&](const Variable& a, const Variable& b) { return distance(a) < distance(b); });
}

void Regions::clear(const mfa_sim_kernel* kernel) {
  kernel_ = kernel;
  regions_.clear();
}

void Regions::add(int parameter, const mfa_sim_argument& argument, bool writable, bool counted) {
  regions_.push_back({reinterpret_cast<uintptr_t>(argument.address), argument.size, writable, counted, nullptr,
                      uint64_t{1} << parameter});
}

void Regions::merge() {
  std::sort(regions_.begin(), regions_.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (size_t i = 1; i < regions_.size(); ++i) {
    Region& last = regions_[kept];
    const Region& next = regions_[i];
    if (next.begin < last.begin + last.size) {
      last.size = std::max(last.begin + last.size, next.begin + next.size) - last.begin;
      last.writable |= next.writable;
      last.counted |= next.counted;
      last.parameters |= next.parameters;
    } else {
      regions_[++kept] = next;
    }
  }
  if (!regions_.empty()) regions_.resize(kept + 1);
}

const Region* Regions::find(uintptr_t address) const {
  const Region* found = nullptr;
  for (const Region& region : regions_) {
    if (region.begin > address) break;
    found = &region;
  }
  return found;
}

void Regions::describe(const Region& region, uintptr_t address) const {
  failure.add("byte %lld of buffer", static_cast<long long>(address - region.begin));
  const char* separator = " ";
  for (int i = 0; i < kernel_->parameter_count; ++i) {
    if ((region.parameters >> i & 1) == 0) continue;
    failure.add("%s'%s' (index %d)", separator, kernel_->parameters[i].name, kernel_->parameters[i].index);
    separator = " or ";
  }
  failure.add(", %llu bytes", static_cast<unsigned long long>(region.size));
}

bool Regions::describe_nearest(uintptr_t address) const {
  const Region* nearest = nullptr;
  uint64_t best = ~uint64_t{0};
  for (const Region& region : regions_) {
    const uint64_t end = region.begin + region.size;
    const uint64_t distance =
        address < region.begin ? region.begin - address : address - std::min<uint64_t>(address, end);
    if (distance < best) {
      best = distance;
      nearest = &region;
    }
  }
  if (nearest != nullptr) describe(*nearest, address);
  return nearest != nullptr;
}

}  // namespace mfa::sim
