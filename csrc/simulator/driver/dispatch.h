// libdispatch objects, as far as Metal needs them.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block.h"
#include "object.h"

namespace mfa::driver {

class Data final : public Object {
 public:
  Data(const void* bytes, std::size_t length, const void* destructor);
  void dispose() override;
  std::string bytes() const { return {static_cast<const char*>(start), size}; }

  const void* start;
  std::size_t size;

 private:
  std::vector<char> copy_;
  HeldBlock destructor_;
  bool owns_malloc_ = false;
};

// Serial; a block runs on the thread that waits for it, as libdispatch prefers too.
class Queue final : public Object {
 public:
  explicit Queue(std::string name) : Object("OS_dispatch_queue"), label(std::move(name)) {}
  void sync(void* context, void (*work)(void*));
  bool is_current() const { return owner_ == std::this_thread::get_id(); }
  std::string label;

 private:
  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{};
};

}  // namespace mfa::driver
