// Objects, and who holds them. The client's references are counted apart from the driver's own, so that a reference too
// many or too few is found at the call and not in some later crash.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

namespace mfa::driver {

class Class;

class Object {
 public:
  explicit Object(const char* class_name);
  virtual ~Object() = default;
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  // What the client holds instead of a pointer to this. Nothing that the client may read lies there.
  virtual void* handle() { return this; }
  virtual std::uint64_t extent() const { return 1; }  // bytes from handle() that belong to this object
  virtual void dispose() {}                           // the last reference is gone; a zombie remains
  std::string describe() const;                       // "MTLBuffer #12"

  Class* const isa;  // null for a class
  const std::uint64_t serial;
  const void* creator = nullptr;  // return address of the call that made it
  // Guarded by one lock, in object.cpp.
  int client = 0;     // the client's: new, alloc, copy, retain
  int pooled = 0;     // held by autorelease pools
  int driver = 0;     // held by other objects
  bool lent = false;  // returned by a getter, without a reference
  bool dead = false;
  bool immortal = false;  // classes, devices
  bool constant = false;  // a string literal: nobody counts
};

// Puts a new object under its handle.
void enroll(Object& object);

template <typename T, typename... Args>
T* make(Args&&... args) {
  T* object = new T(std::forward<Args>(args)...);
  enroll(*object);
  return object;
}

Object* find(const void* handle, bool* usable = nullptr);         // dead or alive; null when it is no object
Object* find_around(const void* address, std::uint64_t* offset);  // whose extent holds the address

// How objects reach the client. All return the handle, or null for null.
void* give(Object* object);  // +1, the caller must release: new, alloc, copy
void* give_autoreleased(Object* object);
void* lend(Object* object);

// The client's side.
void client_retain(Object& object);
void client_release(Object& object);
void client_autorelease(Object& object);
bool usable(const Object& object);  // alive, and the client has a right to it

void* push_pool();
void pop_pool(void* pool);

void retain(Object* object);
void release(Object* object);

// A reference of the driver's own.
template <typename T>
class Ref {
 public:
  Ref() = default;
  Ref(T* object) : object_(object) { retain(object_); }
  Ref(const Ref& other) : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  ~Ref() { release(object_); }
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  T* get() const { return object_; }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  T* object_ = nullptr;
};

// "MTLFunction #7 (1 reference) from libmfa.so+0x1234", a line each; objects that only the driver holds are not listed.
std::string live_objects();
std::uint64_t live_count();

}  // namespace mfa::driver
