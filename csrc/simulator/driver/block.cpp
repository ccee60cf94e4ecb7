// The blocks runtime: clang calls these for blocks that outlive their scope, and for __block variables.
#include "block.h"

#include <cstdlib>
#include <cstring>

namespace mfa::driver {
namespace {

enum : int { kHasHelpers = 1 << 25, kNeedsFree = 1 << 24, kIsGlobal = 1 << 28, kCountOne = 2, kCountMask = 0xfffe };
enum : int { kFieldBlock = 7, kFieldByref = 8 };

struct Descriptor {
  unsigned long reserved, size;
  void (*copy)(void* to, const void* from);  // these two only with kHasHelpers
  void (*dispose)(const void* block);
};

struct Byref {
  void* isa;
  Byref* forwarding;
  int flags;
  unsigned size;
  void (*keep)(Byref* to, Byref* from);  // these two only with kHasHelpers
  void (*destroy)(Byref* variable);
};

Byref* copy_byref(Byref* variable) {
  Byref* shared = variable->forwarding;
  if (shared->flags & kNeedsFree) {
    shared->flags += kCountOne;
    return shared;
  }
  auto* copy = static_cast<Byref*>(malloc(shared->size));
  memcpy(copy, shared, shared->size);
  copy->flags = (shared->flags & ~kCountMask) | kNeedsFree | (2 * kCountOne);  // the scope's own and the block's
  copy->forwarding = shared->forwarding = copy;
  if (shared->flags & kHasHelpers) shared->keep(copy, shared);
  return copy;
}

void release_byref(Byref* variable) {
  Byref* shared = variable->forwarding;
  if (!(shared->flags & kNeedsFree)) return;
  shared->flags -= kCountOne;
  if ((shared->flags & kCountMask) > 0) return;
  if (shared->flags & kHasHelpers) shared->destroy(shared);
  free(shared);
}

}  // namespace

Block* copy_block(const void* source) {
  auto* block = static_cast<Block*>(const_cast<void*>(source));
  if (block == nullptr || (block->flags & kIsGlobal)) return block;
  if (block->flags & kNeedsFree) {
    block->flags += kCountOne;
    return block;
  }
  const auto* descriptor = static_cast<const Descriptor*>(block->descriptor);
  auto* copy = static_cast<Block*>(malloc(descriptor->size));
  memcpy(copy, block, descriptor->size);
  copy->flags = (block->flags & ~kCountMask) | kNeedsFree | kCountOne;
  if (block->flags & kHasHelpers) descriptor->copy(copy, block);
  return copy;
}

void release_block(Block* block) {
  if (block == nullptr || !(block->flags & kNeedsFree)) return;
  block->flags -= kCountOne;
  if ((block->flags & kCountMask) > 0) return;
  if (block->flags & kHasHelpers) static_cast<const Descriptor*>(block->descriptor)->dispose(block);
  free(block);
}

}  // namespace mfa::driver

using namespace mfa::driver;

extern "C" {
#pragma GCC visibility push(default)

void* _NSConcreteStackBlock[32] = {};
void* _NSConcreteGlobalBlock[32] = {};

void* _Block_copy(const void* block) { return copy_block(block); }
void _Block_release(const void* block) { release_block(static_cast<Block*>(const_cast<void*>(block))); }

void _Block_object_assign(void* to, const void* object, int flags) {
  const void* kept = object;  // objects are not retained: C++ has no such captures
  if ((flags & 15) == kFieldByref) kept = copy_byref(static_cast<Byref*>(const_cast<void*>(object)));
  if ((flags & 15) == kFieldBlock) kept = copy_block(object);
  *static_cast<const void**>(to) = kept;
}

void _Block_object_dispose(const void* object, int flags) {
  if ((flags & 15) == kFieldByref) release_byref(static_cast<Byref*>(const_cast<void*>(object)));
  if ((flags & 15) == kFieldBlock) _Block_release(object);
}

#pragma GCC visibility pop
}
