#include "object.h"

#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "findings.h"
#include "runtime.h"

namespace mfa::driver {
namespace {

constexpr std::size_t kZombies = 4096;  // of the dead, this many are remembered

struct Registry {
  std::mutex lock;
  std::unordered_map<const void*, Object*> by_handle;
  std::map<const void*, Object*> wide;  // objects whose extent is more than their handle
  std::deque<Object*> zombies;
};

Registry& registry() {  // leaked: statics of the client release their objects after ours would be gone
  static auto* instance = new Registry;
  return *instance;
}

thread_local std::vector<std::vector<Object*>> pools;
std::atomic<std::uint64_t> serials{0};

bool held(const Object& object) {
  return object.client + object.pooled + object.driver > 0 || object.immortal || object.constant;
}

// The caller has dropped a reference under the lock; this ends the object's life outside of it.
void reap(Object& object) {
  object.dispose();
  Object* forgotten = nullptr;
  {
    auto& r = registry();
    const std::lock_guard guard(r.lock);
    r.zombies.push_back(&object);
    if (r.zombies.size() > kZombies) {
      forgotten = r.zombies.front();
      r.zombies.pop_front();
      const auto known = r.by_handle.find(forgotten->handle());
      if (known != r.by_handle.end() && known->second == forgotten) r.by_handle.erase(known);
      r.wide.erase(forgotten->handle());
    }
  }
  delete forgotten;
}

// Drops one reference of `count`; true when the object is to be reaped.
bool drop(Object& object, int& count) {
  --count;
  if (object.client + object.pooled == 0) object.lent = false;  // whoever released it may not use it again
  if (held(object) || object.dead) return false;
  object.dead = true;
  return true;
}

// Whether the client may use it.
bool has_right(const Object& object) {
  return object.immortal || object.constant || (!object.dead && (object.client + object.pooled > 0 || object.lent));
}

// Whether the client is answerable for it.
bool leakable(const Object& object) {
  return !object.immortal && !object.constant && !object.dead && object.client + object.pooled > 0;
}

}  // namespace

Object::Object(const char* class_name) : isa(class_named(class_name)), serial(++serials), creator(call.caller) {}

std::string Object::describe() const {
  return format("%s #%llu", isa->name(), static_cast<unsigned long long>(serial));
}

void enroll(Object& object) {
  auto& r = registry();
  const std::lock_guard guard(r.lock);
  r.by_handle[object.handle()] = &object;
  if (object.extent() > 1) r.wide[object.handle()] = &object;
}

Object* find(const void* handle, bool* usable) {
  auto& r = registry();
  const std::lock_guard guard(r.lock);
  const auto known = r.by_handle.find(handle);
  if (known == r.by_handle.end()) return nullptr;
  if (usable != nullptr) *usable = has_right(*known->second);
  return known->second;
}

Object* find_around(const void* address, std::uint64_t* offset) {
  auto& r = registry();
  const std::lock_guard guard(r.lock);
  auto next = r.wide.upper_bound(address);
  if (next == r.wide.begin()) return nullptr;
  Object* object = std::prev(next)->second;
  *offset = static_cast<std::uint64_t>(static_cast<const char*>(address) - static_cast<const char*>(object->handle()));
  return *offset < object->extent() ? object : nullptr;
}

void* give(Object* object) {
  if (object == nullptr) return nullptr;
  client_retain(*object);
  return object->handle();
}

void* give_autoreleased(Object* object) {
  if (object == nullptr) return nullptr;
  client_retain(*object);
  client_autorelease(*object);
  return object->handle();
}

void* lend(Object* object) {
  if (object == nullptr) return nullptr;
  const std::lock_guard guard(registry().lock);
  object->lent = true;
  return object->handle();
}

void client_retain(Object& object) {
  const std::lock_guard guard(registry().lock);
  ++object.client;
}

void client_release(Object& object) {
  bool last = false;
  {
    const std::lock_guard guard(registry().lock);
    if (object.constant) return;
    if (object.client > 0)
      last = drop(object, object.client);
    else
      last = true;
  }
  if (!last) return;
  if (object.dead) return reap(object);
  note("over-release", "%s is released, but the client holds no reference of it%s", object.describe().c_str(),
       object.pooled > 0 ? ": it was autoreleased" : "");
}

void client_autorelease(Object& object) {
  bool owned;
  {
    const std::lock_guard guard(registry().lock);
    if (object.constant) return;
    owned = object.client > 0;
    if (owned) {
      --object.client;
      ++object.pooled;
      if (!pools.empty()) pools.back().push_back(&object);
    }
  }
  if (!owned) {
    note("over-release", "%s is autoreleased, but the client holds no reference of it", object.describe().c_str());
  } else if (pools.empty()) {
    note("no-pool", "%s is autoreleased with no pool in place: it leaks", object.describe().c_str());
  }
}

bool usable(const Object& object) {
  const std::lock_guard guard(registry().lock);
  return has_right(object);
}

void* push_pool() {
  pools.emplace_back();
  return reinterpret_cast<void*>(pools.size());
}

void pop_pool(void* pool) {
  const auto depth = reinterpret_cast<std::uintptr_t>(pool);
  if (depth == 0 || depth > pools.size()) {
    note("pool", "an autorelease pool is popped that is not on this thread's stack");
    return;
  }
  while (pools.size() >= depth) {
    const auto objects = std::move(pools.back());
    pools.pop_back();
    for (Object* object : objects) {
      bool last;
      {
        const std::lock_guard guard(registry().lock);
        last = drop(*object, object->pooled);
      }
      if (last) reap(*object);
    }
  }
}

void retain(Object* object) {
  if (object == nullptr) return;
  const std::lock_guard guard(registry().lock);
  ++object->driver;
}

void release(Object* object) {
  if (object == nullptr) return;
  bool last;
  {
    const std::lock_guard guard(registry().lock);
    last = drop(*object, object->driver);
  }
  if (last) reap(*object);
}

std::string live_objects() {
  std::vector<std::pair<std::uint64_t, std::string>> rows;
  auto& r = registry();
  {
    const std::lock_guard guard(r.lock);
    for (const auto& [handle, object] : r.by_handle) {
      if (!leakable(*object)) continue;
      std::string row = format("%s (%d reference%s", object->describe().c_str(), object->client + object->pooled,
                               object->client + object->pooled == 1 ? ")" : "s)");
      Dl_info info;
      if (object->creator != nullptr && dladdr(object->creator, &info) != 0 && info.dli_fname != nullptr) {
        const char* file = info.dli_fname;
        for (const char* p = file; *p != 0; ++p)
          if (*p == '/') file = p + 1;
        row += format(" from %s+0x%zx", file,
                      static_cast<std::size_t>(static_cast<const char*>(object->creator) -
                                               static_cast<const char*>(info.dli_fbase)));
        if (info.dli_sname != nullptr) row += format(" in %s", info.dli_sname);
      }
      rows.emplace_back(object->serial, row);
    }
  }
  std::sort(rows.begin(), rows.end());
  std::string text;
  for (const auto& [serial, row] : rows) text += row + "\n";
  return text;
}

std::uint64_t live_count() {
  auto& r = registry();
  const std::lock_guard guard(r.lock);
  std::uint64_t count = 0;
  for (const auto& [handle, object] : r.by_handle) count += leakable(*object);
  return count;
}

}  // namespace mfa::driver
