#include "runtime.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "findings.h"
#include "foundation.h"

extern "C" void mfa_driver_zero();

namespace mfa::driver {

thread_local Call call{};

namespace {

thread_local std::string pending;
std::atomic<std::uint64_t> messages = 0;

struct Tables {
  std::mutex lock;
  std::unordered_map<std::string, std::unique_ptr<Selector>> selectors;
  std::unordered_map<std::string, Class*> classes;  // complete before anyone else sees it
  std::vector<Class*> order;
};

Tables& tables() {
  static auto* instance = new Tables;
  return *instance;
}

std::atomic<const Selector*> raising = nullptr;

// Foundation raises an NSException, which to C++ is none of its own.
void raise_foreign() { throw NSException{}; }

void raise_pending() { throw std::runtime_error(std::exchange(pending, {})); }

// The method that a wrong message runs instead.
Imp refuse(std::string text) {
  if (!raises()) return &mfa_driver_zero;
  pending = std::move(text);
  return &raise_pending;
}

void* alloc(Class* self) {
  Object* object = self->instance();
  if (object == nullptr) report("alloc", "%s cannot be allocated by the client", self->name());
  return give(object);
}

void* init(Object* self) { return self->handle(); }
void* retain_object(Object* self) {
  client_retain(*self);
  return self->handle();
}
void release_object(Object* self) { client_release(*self); }
void* autorelease_object(Object* self) {
  client_autorelease(*self);
  return self->handle();
}
std::uint64_t retain_count(Object* self) { return static_cast<std::uint64_t>(self->client + self->pooled); }
std::uint64_t hash(Object* self) { return self->serial; }
bool is_equal(Object* self, const void* other) { return self->handle() == other; }
bool responds(Object* self, const Selector* selector) { return self->isa->find_method(selector, false) != nullptr; }
void* description(Object* self) { return give_autoreleased(make<String>(self->describe())); }

void define_all() {
  define("NSObject", nullptr, nullptr)
      .class_method<&alloc>("alloc")
      .method<&init>("init")
      .method<&retain_object>("retain")
      .method<&release_object>("release")
      .method<&autorelease_object>("autorelease")
      .method<&retain_count>("retainCount")
      .method<&hash>("hash")
      .method<&is_equal>("isEqual:")
      .method<&responds>("respondsToSelector:")
      .method<&description>("description")
      .method<&description>("debugDescription");
  define_foundation();
  define_dispatch();
  define_device();
  define_buffer();
  define_library();
  define_pipeline();
  define_archive();
  define_queue();
  define_encoder();
}

// A compile-time constant string lies in the client's own data; its isa is the symbol that clang refers to.
Object* constant_string(const void* address) {
  struct Layout {
    const void* isa;
    int flags;
    const char* text;
    long length;
  } layout{};
  int pipe_ends[2];  // the kernel reads the address, and fails where it can't be read
  if (pipe(pipe_ends) != 0) return nullptr;
  const bool readable = write(pipe_ends[1], address, sizeof layout) == sizeof layout &&
                        read(pipe_ends[0], &layout, sizeof layout) == sizeof layout;
  close(pipe_ends[0]);
  close(pipe_ends[1]);
  if (!readable) return nullptr;
  return is_constant_string_class(layout.isa)
             ? make<ConstantString>(address, std::string(layout.text, static_cast<std::size_t>(layout.length)))
             : nullptr;
}

}  // namespace

const Selector* selector_named(const char* name) {
  auto& t = tables();
  const std::lock_guard guard(t.lock);
  auto& selector = t.selectors[name];
  if (!selector) selector.reset(new Selector{name, static_cast<unsigned>(t.selectors.size() - 1)});
  return selector.get();
}

Class::Class(const char* name, Class* super, Make make_instance)
    : Object(nullptr), name_(name), super_(super), make_(make_instance) {
  constant = true;
}

Class& Class::add(std::vector<Method>& table, const char* selector, Method method) {
  const unsigned id = selector_named(selector)->id;
  if (table.size() <= id) table.resize(id + 1);
  table[id] = std::move(method);
  return *this;
}

const Method* Class::find_method(const Selector* selector, bool of_class) const {
  for (const Class* c = this; c != nullptr; c = c->super_) {
    const auto& table = of_class ? c->class_methods_ : c->methods_;
    if (selector->id < table.size() && table[selector->id].imp != nullptr) return &table[selector->id];
  }
  return nullptr;
}

std::string Class::list() const {
  std::string text;
  auto& t = tables();
  const std::lock_guard guard(t.lock);
  for (const auto& [name, selector] : t.selectors) {
    for (bool of_class : {true, false}) {
      const auto& table = of_class ? class_methods_ : methods_;
      if (selector->id >= table.size() || table[selector->id].imp == nullptr) continue;
      text +=
          format("%c[%s %s] %s\n", of_class ? '+' : '-', name_, name.c_str(), table[selector->id].signature.c_str());
    }
  }
  return text;
}

Class& define(const char* name, Class::Make make_instance, const char* super) {
  auto& t = tables();
  auto* c = new Class(name, super == nullptr ? nullptr : t.classes.at(super), make_instance);
  t.classes[name] = c;
  t.order.push_back(c);
  enroll(*c);
  return *c;
}

Class& extend(const char* name) { return *tables().classes.at(name); }

Class* class_named(const char* name) {
  if (name == nullptr) return nullptr;  // a class's own class
  static std::once_flag once;
  std::call_once(once, define_all);
  const auto& classes = tables().classes;
  const auto known = classes.find(name);
  return known == classes.end() ? nullptr : known->second;
}

std::string list_methods() {
  std::string text;
  class_named("NSObject");
  for (const Class* c : tables().order) text += c->list();
  return text;
}

Object* expect_object(const void* handle, const char* class_name, const char* what) {
  bool usable = true;
  Object* object = handle == nullptr ? nullptr : find(handle, &usable);
  if (object == nullptr && handle != nullptr) object = constant_string(handle);
  if (object != nullptr && usable) return object;
  std::uint64_t offset = 0;
  if (handle == nullptr) {
    report("not-an-object", "%s: the argument must be a live %s", what, class_name);
  } else if (object != nullptr) {
    report("use-after-release", "%s: %s has been released", what, object->describe().c_str());
  } else if (Object* around = find_around(handle, &offset); around != nullptr) {
    report("not-a-buffer",
           "%s: %p is %llu bytes behind the start of %s: the storage offset was not subtracted from data_ptr()", what,
           handle, static_cast<unsigned long long>(offset), around->describe().c_str());
  } else {
    report("not-an-object", "%s: %p is not a live %s", what, handle, class_name);
  }
  return nullptr;
}

std::uint64_t message_count() { return messages; }

void raise_at(const char* selector) { raising = selector_named(selector); }

}  // namespace mfa::driver

using namespace mfa::driver;

extern "C" {

// Called by send.S, and by it alone.
__attribute__((visibility("hidden"))) Imp mfa_driver_resolve(void* self, const Selector* selector, const void* caller) {
  static const Selector* const counting[] = {selector_named("release"), selector_named("autorelease"),
                                             selector_named("retain")};
  const bool counts = selector == counting[0] || selector == counting[1] || selector == counting[2];
  call.caller = caller;
  ++messages;
  if (const Selector* wanted = selector; raising == selector && raising.compare_exchange_strong(wanted, nullptr))
    return &raise_foreign;
  const char* name = selector->name.c_str();
  if (self == nullptr && counts) return &mfa_driver_zero;  // NS::SharedPtr does so
  if (self == nullptr) return refuse(note("nil", "'%s' is sent to nil", name));
  bool usable = true;
  Object* object = find(self, &usable);
  if (object == nullptr) object = constant_string(self);
  if (object == nullptr) return refuse(note("not-an-object", "'%s' is sent to %p, which is no object", name, self));

  if (!usable) {
    if (counts && selector != counting[2]) {  // comes from destructors: never thrown
      note("over-release", "%s is released more often than it was retained", object->describe().c_str());
      return &mfa_driver_zero;
    }
    return refuse(
        note("use-after-release", "'%s' is sent to %s after its last release", name, object->describe().c_str()));
  }
  const bool is_class = object->isa == nullptr;
  const Class* c = is_class ? static_cast<const Class*>(object) : object->isa;
  const Method* method = c->find_method(selector, is_class);
  if (method == nullptr) {
    const std::string who = is_class ? c->name() : object->describe();
    return refuse(note("unrecognised-selector", "%s does not answer '%s'", who.c_str(), name));
  }
  call.receiver = object;
  return method->imp;
}

#pragma GCC visibility push(default)

void* objc_lookUpClass(const char* name) {
  Class* c = class_named(name);
  return c == nullptr ? nullptr : c->handle();
}
void* objc_getClass(const char* name) { return objc_lookUpClass(name); }
void* objc_getProtocol(const char*) { return nullptr; }
const Selector* sel_registerName(const char* name) { return selector_named(name); }
const char* sel_getName(const Selector* selector) { return selector->name.c_str(); }

void* objc_autoreleasePoolPush() { return push_pool(); }
void objc_autoreleasePoolPop(void* pool) { pop_pool(pool); }

void* objc_retain(void* handle) {
  if (Object* object = handle == nullptr ? nullptr : find(handle)) client_retain(*object);
  return handle;
}
void objc_release(void* handle) {
  if (Object* object = handle == nullptr ? nullptr : find(handle)) client_release(*object);
}
void* objc_autorelease(void* handle) {
  if (Object* object = handle == nullptr ? nullptr : find(handle)) client_autorelease(*object);
  return handle;
}

#pragma GCC visibility pop
}
