#include "dispatch.h"

#include <cstdlib>

#include "findings.h"
#include "runtime.h"

namespace mfa::driver {
namespace {

Block free_marker{};  // only its address counts

}  // namespace

Data::Data(const void* bytes, std::size_t length, const void* destructor)
    : Object("OS_dispatch_data"), start(bytes), size(length) {
  if (destructor == nullptr) {
    copy_.assign(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + length);
    start = copy_.data();
  } else if (destructor == &free_marker) {
    owns_malloc_ = true;
  } else {
    destructor_ = HeldBlock(destructor);
  }
}

void Data::dispose() {
  if (owns_malloc_) free(const_cast<void*>(start));
  if (destructor_) destructor_();
  destructor_ = HeldBlock();
  copy_ = {};
}

void Queue::sync(void* context, void (*work)(void*)) {
  if (is_current()) {
    report("queue-deadlock",
           "dispatch_sync to the serial queue '%s' from a block that runs on it: on a Mac this never returns",
           label.c_str());
    work(context);
    return;
  }
  const std::lock_guard guard(mutex_);
  owner_ = std::this_thread::get_id();
  struct Reset {
    std::atomic<std::thread::id>& owner;
    ~Reset() { owner = std::thread::id(); }
  } reset{owner_};
  work(context);
}

void define_dispatch() {
  define("OS_dispatch_data");
  define("OS_dispatch_queue");
}

}  // namespace mfa::driver

using namespace mfa::driver;

extern "C" {
#pragma GCC visibility push(default)

extern const void* const _dispatch_data_destructor_free;
const void* const _dispatch_data_destructor_free = &free_marker;

void* dispatch_queue_create(const char* label, void*) { return give(make<Queue>(label == nullptr ? "" : label)); }

void* dispatch_get_main_queue() {
  static Queue* const queue = [] {
    auto* q = make<Queue>("com.apple.main-thread");
    q->constant = true;
    return q;
  }();
  return queue->handle();
}

void dispatch_sync_f(void* queue, void* context, void (*work)(void*)) {
  if (auto* q = expect<Queue>(queue, "dispatch_queue", "dispatch_sync_f")) q->sync(context, work);
}

void dispatch_sync(void* queue, void* block) {
  dispatch_sync_f(queue, block, [](void* context) { call_block(static_cast<Block*>(context)); });
}

void* dispatch_data_create(const void* bytes, std::size_t size, void*, void* destructor) {
  return give(make<Data>(bytes, size, destructor));
}

std::size_t dispatch_data_get_size(void* data) {
  const auto* d = expect<Data>(data, "dispatch_data", "dispatch_data_get_size");
  return d == nullptr ? 0 : d->size;
}

void dispatch_retain(void* object) {
  if (Object* o = expect_object(object, "dispatch object", "dispatch_retain")) client_retain(*o);
}
void dispatch_release(void* object) {
  Object* o = object == nullptr ? nullptr : find(object);
  if (o == nullptr || !usable(*o)) {
    note("over-release", "dispatch_release of %s",
         o == nullptr ? "something that is no object" : o->describe().c_str());
  } else {
    client_release(*o);
  }
}

#pragma GCC visibility pop
}
