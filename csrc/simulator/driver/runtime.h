// Classes, selectors and methods. A method is an ordinary function `Result f(T* self, arguments...)`; the same calling
// convention holds on Linux and macOS, so its address, behind a wrapper that drops self and selector, is the
// implementation.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "object.h"

namespace mfa::driver {

using Imp = void (*)();

struct Selector {
  std::string name;
  unsigned id;
};

const Selector* selector_named(const char* name);

struct Method {
  Imp imp = nullptr;
  std::string signature;  // "B:pQ": result, then arguments; for tests
};

// Where the running message comes from and whom it is for. Set by objc_msgSend, read by the method's wrapper.
struct Call {
  Object* receiver;
  const void* caller;
};
extern thread_local Call call;

template <typename T>
std::string type_code() {
  if constexpr (std::is_void_v<T>)
    return "v";
  else if constexpr (std::is_pointer_v<T>)
    return "p";
  else if constexpr (std::is_same_v<T, bool>)
    return "B";
  else if constexpr (std::is_same_v<T, double>)
    return "d";
  else if constexpr (std::is_same_v<T, float>)
    return "f";
  else if constexpr (std::is_integral_v<T>)
    return (std::is_signed_v<T> ? "i" : "u") + std::to_string(8 * sizeof(T));
  else
    return "{" + std::to_string(sizeof(T)) + "}";
}

template <auto Function>
struct Wrapper;

template <typename Result, typename T, typename... Args, Result (*Function)(T*, Args...)>
struct Wrapper<Function> {
  static Result imp(void*, const Selector*, Args... args) { return Function(static_cast<T*>(call.receiver), args...); }
  static std::string signature() {
    std::string text = type_code<Result>() + ":";
    ((text += type_code<Args>() + ","), ...);
    return text;
  }
};

class Class : public Object {
 public:
  using Make = Object* (*)();

  Class(const char* name, Class* super, Make make_instance);

  // What +alloc makes; null: instances come from elsewhere.
  Object* instance() const { return make_ == nullptr ? nullptr : make_(); }
  const char* name() const { return name_; }

  template <auto Function>
  Class& method(const char* selector) {
    return add(methods_, selector, {reinterpret_cast<Imp>(&Wrapper<Function>::imp), Wrapper<Function>::signature()});
  }
  template <auto Function>
  Class& class_method(const char* selector) {
    return add(class_methods_, selector,
               {reinterpret_cast<Imp>(&Wrapper<Function>::imp), Wrapper<Function>::signature()});
  }

  const Method* find_method(const Selector* selector, bool of_class) const;
  // "-[MTLBuffer length] u64:", a line each.
  std::string list() const;

 private:
  Class& add(std::vector<Method>& table, const char* selector, Method method);

  const char* name_;
  Class* super_;
  Make make_;
  std::vector<Method> methods_, class_methods_;  // by selector id
};

// The classes come into being with the first look-up: metal-cpp asks from static initialisers.
Class* class_named(const char* name);
Class& define(const char* name, Class::Make make_instance = nullptr, const char* super = "NSObject");
Class& extend(const char* name);  // one that another file has defined
std::string list_methods();
std::uint64_t message_count();  // sent so far by clients

struct NSException {};
void raise_at(const char* selector);  // the next such message raises an NSException

template <typename T>
Object* make_object() {
  return make<T>();
}

// An argument that must be a live T; null with a finding otherwise. `what` names it: "setBuffer:offset:atIndex:".
template <typename T>
T* expect(const void* handle, const char* class_name, const char* what);

Object* expect_object(const void* handle, const char* class_name, const char* what);

template <typename T>
T* expect(const void* handle, const char* class_name, const char* what) {
  Object* object = expect_object(handle, class_name, what);
  T* result = dynamic_cast<T*>(object);
  if (object != nullptr && result == nullptr) expect_object(nullptr, class_name, what);
  return result;
}

// Each file of classes has one of these; called once, by class_named().
void define_foundation();
void define_dispatch();
void define_device();
void define_buffer();
void define_library();
void define_pipeline();
void define_archive();
void define_queue();
void define_encoder();

}  // namespace mfa::driver
