#include "guarded_copies.h"

#include <sys/mman.h>

#include <cstring>

#include "failure.h"

namespace mfa::sim {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGap = 1 << 20;  // address space alone: nobody touches it

// Where a copy begins behind `offset`: as aligned as the original, so that misaligned accesses stay so.
size_t place(size_t offset, uintptr_t original) {
  return (offset + kGap + kPage - 1) / kPage * kPage + original % kPage;
}

}  // namespace

bool GuardedCopies::make(Regions& regions, Launch& launch) {
  size_ = 0;
  for (const Region& region : regions.all()) size_ = place(size_, region.begin) + region.size;
  size_ += kGap;
  pages_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages_ == MAP_FAILED) {
    pages_ = nullptr;
    failure.add("no memory for copies of the buffers, %zu bytes", size_);
    return false;
  }
  size_t offset = 0;
  for (Region& region : regions.all()) {
    offset = place(offset, region.begin);
    auto* copy = static_cast<char*>(pages_) + offset;
    auto* original = reinterpret_cast<char*>(region.begin);
    memcpy(copy, original, region.size);
    copies_.push_back({original, copy, region.size, region.writable});
    for (int i = 0; i < launch.argument_count; ++i) {
      if ((region.parameters >> i & 1) == 0) continue;
      launch.arguments[i] = copy + (static_cast<char*>(launch.arguments[i]) - original);
    }
    region.begin = reinterpret_cast<uintptr_t>(copy);
    offset += region.size;
  }
  return true;
}

GuardedCopies::~GuardedCopies() {
  for (const Copy& copy : copies_) {
    if (copy.writable) memcpy(copy.original, copy.copy, copy.size);
  }
  if (pages_ != nullptr) munmap(pages_, size_);
}

}  // namespace mfa::sim
