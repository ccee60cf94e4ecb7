#include "buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "findings.h"
#include "foundation.h"
#include "runtime.h"

namespace mfa::driver {
namespace {

constexpr std::uint64_t kPage = 4096, kGranularity = 16;

std::atomic<std::uint64_t> allocated{0};

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) { return (value + unit - 1) / unit * unit; }

void* contents(Buffer* self) { return self->is_private() ? nullptr : self->contents; }
std::uint64_t length(Buffer* self) { return self->length; }
std::uint64_t allocated_size(Buffer* self) { return round_up(self->length, kPage); }
std::uint64_t gpu_address(Buffer* self) { return reinterpret_cast<std::uint64_t>(self->contents); }
std::uint64_t resource_options(Buffer* self) { return self->options; }
std::uint64_t storage_mode(Buffer* self) { return self->options >> 4 & 15; }
std::uint64_t cpu_cache_mode(Buffer* self) { return self->options & 15; }
std::uint64_t hazard_tracking_mode(Buffer* self) { return self->options >> 8 & 3; }
std::uint64_t set_purgeable_state(Buffer*, std::uint64_t) { return 2; }  // non-volatile
void did_modify(Buffer* self, Range range) {
  if (range.location + range.length > self->length) {
    report("range", "didModifyRange: (%llu, %llu) lies beyond the %llu bytes of %s",
           static_cast<unsigned long long>(range.location), static_cast<unsigned long long>(range.length),
           static_cast<unsigned long long>(self->length), self->describe().c_str());
  }
}
void* device(Buffer* self) { return lend(self->device); }
void* get_label(Buffer* self) { return give_autoreleased(make<String>(self->label)); }
void set_label(Buffer* self, const void* label) { self->label = text_of(label, "setLabel:"); }

}  // namespace

Buffer::Buffer(Device* of, std::uint64_t size, std::uint64_t resource_options, void* memory, HeldBlock deallocator)
    : Object("MTLBuffer"),
      device(of),
      length(size),
      options(resource_options),
      deallocator_(std::move(deallocator)),
      owns_contents_(memory == nullptr) {
  extent_ = round_up(std::max<std::uint64_t>(length, 1), kPage);
  mapped_ = owns_contents_ ? 2 * extent_ + kPage : extent_;  // handle, contents, guard
  void* start = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  handle_ = static_cast<char*>(start);
  contents = static_cast<char*>(memory);
  if (owns_contents_) {
    mprotect(handle_ + extent_, extent_, PROT_READ | PROT_WRITE);
    memset(handle_ + extent_, 0xFF, extent_);
    contents = handle_ + 2 * extent_ - round_up(length, kGranularity);
  }
  allocated += length;
}

Buffer::~Buffer() { munmap(handle_, owns_contents_ ? extent_ : mapped_); }

// The handle stays reserved while the zombie lives, so that no other object gets its address.
void Buffer::dispose() {
  allocated -= length;
  if (deallocator_) deallocator_(static_cast<void*>(contents), length);
  deallocator_ = HeldBlock();
  if (owns_contents_) munmap(handle_ + extent_, mapped_ - extent_);
}

std::uint64_t allocated_bytes() { return allocated; }

void define_buffer() {
  define("MTLBuffer")
      .method<&contents>("contents")
      .method<&length>("length")
      .method<&allocated_size>("allocatedSize")
      .method<&gpu_address>("gpuAddress")
      .method<&resource_options>("resourceOptions")
      .method<&storage_mode>("storageMode")
      .method<&cpu_cache_mode>("cpuCacheMode")
      .method<&hazard_tracking_mode>("hazardTrackingMode")
      .method<&set_purgeable_state>("setPurgeableState:")
      .method<&did_modify>("didModifyRange:")
      .method<&device>("device")
      .method<&get_label>("label")
      .method<&set_label>("setLabel:");
}

}  // namespace mfa::driver
