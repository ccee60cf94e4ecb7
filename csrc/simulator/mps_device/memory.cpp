#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../driver/control.h"

namespace mfa::stand_in {
namespace {

std::atomic<std::size_t> allocated{0}, allocations{0};

struct Block {
  void* buffer;
  std::size_t size;
};

// Torch's allocator keeps freed buffers too: a block that is freed while a dispatch waits is used again in the queue's
// order. By exact size, so that the guard page stays at the end.
class Cache {
 public:
  Block* take(std::size_t size) {
    const std::lock_guard guard(mutex_);
    auto& blocks = free_[size];
    if (blocks.empty()) return nullptr;
    Block* block = blocks.back();
    blocks.pop_back();
    bytes_ -= size;
    return block;
  }
  bool keep(Block* block) {
    const std::lock_guard guard(mutex_);
    if (bytes_ + block->size > kMost) return false;
    free_[block->size].push_back(block);
    bytes_ += block->size;
    return true;
  }
  void clear() {
    const std::lock_guard guard(mutex_);
    for (auto& [size, blocks] : free_) {
      for (Block* block : blocks) {
        mfa_driver_release(block->buffer);
        delete block;
      }
    }
    free_.clear();
    bytes_ = 0;
  }

 private:
  static constexpr std::size_t kMost = 64 << 20;
  std::mutex mutex_;
  std::unordered_map<std::size_t, std::vector<Block*>> free_;
  std::size_t bytes_ = 0;
};

Cache& cache() {  // leaked: tensors outlive statics
  static auto* instance = new Cache;
  return *instance;
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->size;
  if (cache().keep(block)) return;
  mfa_driver_release(block->buffer);
  delete block;
}

class BufferAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t size) override {
    if (size == 0) return {nullptr, kDevice};
    Block* block = cache().take(size);
    if (block == nullptr) {
      block = new Block{mfa_driver_new_buffer(size, nullptr), size};
    } else if (!mfa_driver_stream_is_lazy()) {
      std::memset(mfa_driver_contents(block->buffer), 0xFF, size);
    }
    allocated += size;
    ++allocations;
    return {block->buffer, block, &free_block, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    settle();
    std::memcpy(mfa_driver_contents(to), mfa_driver_contents(const_cast<void*>(from)), size);
  }
};

void on_stream(int (*function)(void*, char**)) {
  char* error = nullptr;
  if (function(mfa_driver_stream(), &error) == 0) return;
  const std::string message = error;
  mfa_driver_free(error);
  throw std::runtime_error(message);
}

}  // namespace

c10::Allocator& allocator() {
  static auto* instance = new BufferAllocator;
  return *instance;
}

std::size_t allocated_bytes() { return allocated; }
std::size_t allocation_count() { return allocations; }
void empty_cache() { cache().clear(); }

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  TORCH_INTERNAL_ASSERT(tensor.device().is_mps());
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  settle();
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  auto* contents = static_cast<char*>(mfa_driver_contents(tensor.storage().mutable_data()));
  TORCH_CHECK(contents != nullptr, "the storage of an mps tensor is no live MTLBuffer");
  const auto offset = static_cast<std::size_t>(tensor.storage_offset()) * tensor.element_size();
  at::Tensor host = at::from_blob(contents + offset, tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  return host;
}

void grow(const c10::Storage& storage, std::size_t bytes) {
  if (storage.nbytes() >= bytes) return;
  c10::DataPtr larger = allocator().allocate(bytes);
  if (storage.nbytes() > 0) allocator().copy_data(larger.mutable_get(), storage.data(), storage.nbytes());
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

void settle() { on_stream(&mfa_driver_stream_settle); }

void synchronize() { on_stream(&mfa_driver_stream_synchronize); }

}  // namespace mfa::stand_in
