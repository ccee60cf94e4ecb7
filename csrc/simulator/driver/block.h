// Blocks (^{...}), as clang lays them out.
#pragma once

#include <utility>

namespace mfa::driver {

struct Block {
  void* isa;
  int flags;
  int reserved;
  void (*invoke)();
  void* descriptor;
};

Block* copy_block(const void* block);  // to the heap; null for null
void release_block(Block* block);

template <typename... Args>
void call_block(Block* block, Args... args) {
  reinterpret_cast<void (*)(Block*, Args...)>(block->invoke)(block, args...);
}

// Owns a copy.
class HeldBlock {
 public:
  HeldBlock() = default;
  explicit HeldBlock(const void* block) : block_(copy_block(block)) {}
  HeldBlock(HeldBlock&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  HeldBlock& operator=(HeldBlock&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~HeldBlock() { release_block(block_); }
  explicit operator bool() const { return block_ != nullptr; }
  template <typename... Args>
  void operator()(Args... args) const {
    call_block(block_, args...);
  }

 private:
  Block* block_ = nullptr;
};

}  // namespace mfa::driver
