#include "foundation.h"

#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "findings.h"
#include "runtime.h"
#include "settings.h"

// What clang makes a constant string's isa; only its address matters.
extern "C" {
__attribute__((visibility("default"))) int __CFConstantStringClassReference[24] = {};
}

namespace mfa::driver {
namespace {

constexpr std::uint64_t kUtf8 = 4, kAscii = 1;

bool encodable(std::uint64_t encoding) {
  if (encoding == kUtf8 || encoding == kAscii) return true;
  report("string", "string encoding %llu is not modelled", static_cast<unsigned long long>(encoding));
  return false;
}

// As far as an ordinary defect goes: bytes that begin no character, or lack what they announce.
bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const int ones = std::countl_one(static_cast<unsigned char>(text[i++]));
    if (ones == 1 || ones > 4) return false;
    for (int rest = ones; rest > 1; --rest, ++i)
      if (i == text.size() || std::countl_one(static_cast<unsigned char>(text[i])) != 1) return false;
  }
  return true;
}

void* string_empty(Class*) { return give_autoreleased(make<String>()); }
void* string_with_string(Class*, const void* other) {
  return give_autoreleased(make<String>(text_of(other, "stringWithString:")));
}
void* string_with_cstring(Class*, const char* text, std::uint64_t encoding) {
  if (text == nullptr) {
    report("string", "stringWithCString:encoding: is given a null pointer");
    return nullptr;
  }
  return encodable(encoding) && is_utf8(text) ? give_autoreleased(make<String>(text)) : nullptr;
}
void* string_init_string(String* self, const void* other) {
  self->text = text_of(other, "initWithString:");
  return self->handle();
}
void* string_init_cstring(String* self, const char* text, std::uint64_t encoding) {
  if (encodable(encoding)) self->text = text;
  return self->handle();
}
void* string_init_bytes(String* self, void* bytes, std::uint64_t length, std::uint64_t encoding, bool free_when_done) {
  if (encodable(encoding)) self->text.assign(static_cast<const char*>(bytes), length);
  if (free_when_done) free(bytes);
  return self->handle();
}
const char* utf8(String* self) { return self->text.c_str(); }
const char* cstring(String* self, std::uint64_t encoding) { return encodable(encoding) ? self->text.c_str() : nullptr; }
std::uint64_t string_length(String* self) {  // in UTF-16 units; exact up to U+FFFF
  std::uint64_t count = 0;
  for (unsigned char c : self->text) count += (c & 0xC0) != 0x80;
  return count;
}
std::uint64_t byte_length(String* self, std::uint64_t) { return self->text.size(); }
std::uint16_t character(String* self, std::uint64_t i) { return static_cast<unsigned char>(self->text.at(i)); }
bool string_equals(String* self, const void* other) { return self->text == text_of(other, "isEqualToString:"); }
void* appending(String* self, const void* other) {
  return give_autoreleased(make<String>(self->text + text_of(other, "stringByAppendingString:")));
}
void* string_copy(String* self) { return give(make<String>(self->text)); }
void* string_description(String* self) { return lend(self); }

std::int64_t error_code(Error* self) { return self->code; }
void* error_domain(Error* self) { return give_autoreleased(make<String>(self->domain)); }
void* error_text(Error* self) { return give_autoreleased(make<String>(self->text)); }
void* error_user_info(Error*) { return nullptr; }

void* url_file(Class*, const void* path) {
  if (path == nullptr) throw NSException{};  // as Foundation does
  return give_autoreleased(make<Url>(text_of(path, "fileURLWithPath:")));
}
void* url_init_file(Url* self, const void* path) {
  self->path = text_of(path, "initFileURLWithPath:");
  return self->handle();
}
void* url_init(Url* self, const void* string) {
  self->path = text_of(string, "initWithString:");
  if (self->path.starts_with("file://")) self->path.erase(0, 7);
  return self->handle();
}
const char* url_path(Url* self) { return self->path.c_str(); }

void fill(Array& array, const void* const* objects, std::uint64_t count, const char* what) {
  for (std::uint64_t i = 0; i < count; ++i) {
    if (Object* item = expect_object(objects[i], "NSObject", what)) array.items.emplace_back(item);
  }
}
void* array_empty(Class*) { return give_autoreleased(make<Array>()); }
void* array_of(Class*, const void* const* objects, std::uint64_t count) {
  Array* array = make<Array>();
  fill(*array, objects, count, "arrayWithObjects:count:");
  return give_autoreleased(array);
}
void* array_of_one(Class* self, const void* object) { return array_of(self, &object, 1); }
void* array_init(Array* self, const void* const* objects, std::uint64_t count) {
  fill(*self, objects, count, "initWithObjects:count:");
  return self->handle();
}
std::uint64_t array_count(Array* self) { return self->items.size(); }
void* array_at(Array* self, std::uint64_t i) {
  if (i < self->items.size()) return lend(self->items[i].get());
  report("range", "objectAtIndex: %llu of %zu objects", static_cast<unsigned long long>(i), self->items.size());
  return nullptr;
}

class Pool final : public Object {
 public:
  Pool() : Object("NSAutoreleasePool") {}
  void dispose() override { drain(); }
  void drain() {
    if (pool != nullptr) pop_pool(std::exchange(pool, nullptr));
  }
  void* pool = nullptr;
};
void* pool_init(Pool* self) {
  if (self->pool == nullptr) self->pool = push_pool();
  return self->handle();
}
void pool_drain(Pool* self) { client_release(*self); }  // in a reference-counted world drain is release
void pool_add(Pool*, const void* object) {
  if (Object* item = expect_object(object, "NSObject", "addObject:")) client_autorelease(*item);
}

class ProcessInfo final : public Object {
 public:
  ProcessInfo() : Object("NSProcessInfo") { immortal = true; }
};
struct Version {
  std::int64_t major, minor, patch;
};
void* process_info(Class*) {
  static auto* instance = make<ProcessInfo>();
  return instance->handle();
}
Version os_version(ProcessInfo*) {
  const Settings s = settings();
  return {s.os_major, s.os_minor, 0};
}
void* os_version_text(ProcessInfo*) {
  const Settings s = settings();
  return give_autoreleased(
      make<String>(format("Version %d.%d (Build MFA%d%d)", s.os_major, s.os_minor, s.os_major, s.os_minor)));
}
bool os_at_least(ProcessInfo*, Version version) {
  const Settings s = settings();
  return std::pair<std::int64_t, std::int64_t>(s.os_major, s.os_minor) >= std::pair(version.major, version.minor) &&
         (s.os_major != version.major || s.os_minor != version.minor || version.patch <= 0);
}
std::uint64_t processors(ProcessInfo*) { return std::thread::hardware_concurrency(); }
unsigned long long physical_memory(ProcessInfo*) {
  return static_cast<unsigned long long>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<unsigned long long>(sysconf(_SC_PAGESIZE));
}

}  // namespace

ConstantString::ConstantString(const void* address, std::string value) : String(std::move(value)), address_(address) {
  constant = true;
}

bool is_constant_string_class(const void* isa) { return isa == &__CFConstantStringClassReference; }

Error::Error(std::string domain_name, std::int64_t error_code, std::string error_text)
    : Object("NSError"), domain(std::move(domain_name)), text(std::move(error_text)), code(error_code) {}

std::string text_of(const void* string, const char* what) {
  const String* object = expect<String>(string, "NSString", what);
  return object == nullptr ? std::string() : object->text;
}

void set_error(void** error, const char* domain, std::int64_t code, const std::string& text) {
  if (error != nullptr) *error = give_autoreleased(make<Error>(domain, code, text));
}

void define_foundation() {
  define("NSString", &make_object<String>)
      .class_method<&string_empty>("string")
      .class_method<&string_with_string>("stringWithString:")
      .class_method<&string_with_cstring>("stringWithCString:encoding:")
      .method<&string_init_string>("initWithString:")
      .method<&string_init_cstring>("initWithCString:encoding:")
      .method<&string_init_bytes>("initWithBytesNoCopy:length:encoding:freeWhenDone:")
      .method<&utf8>("UTF8String")
      .method<&utf8>("fileSystemRepresentation")
      .method<&cstring>("cStringUsingEncoding:")
      .method<&string_length>("length")
      .method<&byte_length>("lengthOfBytesUsingEncoding:")
      .method<&byte_length>("maximumLengthOfBytesUsingEncoding:")
      .method<&character>("characterAtIndex:")
      .method<&string_equals>("isEqualToString:")
      .method<&appending>("stringByAppendingString:")
      .method<&string_copy>("copy")
      .method<&string_description>("description");
  define("NSError")
      .method<&error_code>("code")
      .method<&error_domain>("domain")
      .method<&error_text>("localizedDescription")
      .method<&error_text>("description")
      .method<&error_user_info>("userInfo");
  define("NSURL", &make_object<Url>)
      .class_method<&url_file>("fileURLWithPath:")
      .method<&url_init_file>("initFileURLWithPath:")
      .method<&url_init>("initWithString:")
      .method<&url_path>("fileSystemRepresentation");
  define("NSArray", &make_object<Array>)
      .class_method<&array_empty>("array")
      .class_method<&array_of_one>("arrayWithObject:")
      .class_method<&array_of>("arrayWithObjects:count:")
      .method<&array_init>("initWithObjects:count:")
      .method<&array_count>("count")
      .method<&array_at>("objectAtIndex:");
  define("NSAutoreleasePool", &make_object<Pool>)
      .method<&pool_init>("init")
      .method<&pool_drain>("drain")
      .method<&pool_add>("addObject:");
  define("NSProcessInfo")
      .class_method<&process_info>("processInfo")
      .method<&os_version>("operatingSystemVersion")
      .method<&os_version_text>("operatingSystemVersionString")
      .method<&os_at_least>("isOperatingSystemAtLeastVersion:")
      .method<&processors>("processorCount")
      .method<&processors>("activeProcessorCount")
      .method<&physical_memory>("physicalMemory");
}

}  // namespace mfa::driver
