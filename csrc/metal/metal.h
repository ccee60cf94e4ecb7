// metal-cpp, and the few lines that every file of this directory needs on top of it.
#pragma once

// Another library of the process may carry its own copy of metal-cpp.
#ifndef METALCPP_SYMBOL_VISIBILITY_HIDDEN
#define METALCPP_SYMBOL_VISIBILITY_HIDDEN
#endif
#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>
#include <exception>
#include <string>

namespace mfa::metal {

// Metal hands out autoreleased strings and errors. Torch's pool covers its queue block only, so everything else opens
// one.
class Pool {
 public:
  Pool() : pool_(NS::TransferPtr(NS::AutoreleasePool::alloc()->init())) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

 private:
  NS::SharedPtr<NS::AutoreleasePool> pool_;
};

// What is wrong, in words: only in a catch block. What Foundation raises is no std::exception, and torch and Python
// know nothing else.
inline std::string text_of_current_exception() {
  try {
    throw;
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "Metal raised an exception of Objective-C";
  }
}

// Autoreleased: valid while the current Pool lives. Null for what is not UTF-8.
inline NS::String* ns_string(const std::string& text) {
  return NS::String::string(text.c_str(), NS::UTF8StringEncoding);
}

inline NS::URL* file_url(const std::string& path) { return NS::URL::fileURLWithPath(ns_string(path)); }

inline std::string text_of(const NS::String* string) {
  const char* text = string ? string->utf8String() : nullptr;
  return text ? text : "";
}

inline std::string text_of(const NS::Error* error) {
  return error ? text_of(error->localizedDescription()) : "no reason given";
}

}  // namespace mfa::metal
