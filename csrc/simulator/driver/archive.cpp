// MTLBinaryArchive: the keys of compiled functions, in a file that names device and system and ends with a checksum.
#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <sstream>

#include "constants.h"
#include "device.h"
#include "findings.h"
#include "pipeline.h"
#include "runtime.h"
#include "settings.h"

namespace mfa::driver {
namespace {

constexpr const char* kDomain = "MTLBinaryArchiveDomain";
enum : std::int64_t { kInvalidFile = 1, kCompilationFailure = 3, kInternal = 4 };

std::string header() {
  const Settings s = settings();
  return format("mfa-simulator-archive\nfamily %d\nsystem %d.%d\n", s.family, s.os_major, s.os_minor);
}

std::string checksum(const std::string& text) { return format("%016zx\n", std::hash<std::string>{}(text)); }

std::string text_of_archive(const Archive& archive) {
  std::string text = header();
  for (const std::string& key : archive.keys) text += key + "\n";
  return text + checksum(text);
}

bool read(Archive& archive, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator(file), {}};
  const std::size_t tail = checksum({}).size();
  if (!text.starts_with(header()) || text.size() < header().size() + tail) return false;
  const std::string body = text.substr(0, text.size() - tail);
  if (text.substr(body.size()) != checksum(body)) return false;
  std::istringstream lines(body.substr(header().size()));
  for (std::string key; std::getline(lines, key);) archive.keys.insert(key);
  return true;
}

class ArchiveDescriptor final : public Object {
 public:
  ArchiveDescriptor() : Object("MTLBinaryArchiveDescriptor") {}
  Ref<Url> url;
};
void set_url(ArchiveDescriptor* self, const void* url) {
  self->url = url == nullptr ? nullptr : expect<Url>(url, "NSURL", "setUrl:");
}
void* get_url(ArchiveDescriptor* self) { return lend(self->url.get()); }

void* new_archive(Device* self, const void* descriptor, void** error) {
  const auto* d =
      expect<ArchiveDescriptor>(descriptor, "MTLBinaryArchiveDescriptor", "newBinaryArchiveWithDescriptor:error:");
  if (d == nullptr) return nullptr;
  const Ref<Archive> archive(make<Archive>(self));
  if (d->url && !read(*archive, d->url->path)) {
    set_error(error, kDomain, kInvalidFile,
              "the binary archive " + d->url->path + " is missing, damaged or for another device");
    return nullptr;
  }
  return give(archive.get());
}

bool add(Archive* self, const void* descriptor, void** error) {
  const auto* d = expect<PipelineDescriptor>(descriptor, "MTLComputePipelineDescriptor",
                                             "addComputePipelineFunctionsWithDescriptor:error:");
  if (d == nullptr) return false;
  const std::optional<std::string> reason = d->function ? unspecialised(*d->function) : "computeFunction is nil";
  if (reason) {
    set_error(error, kDomain, kCompilationFailure, *reason);
    return false;
  }
  self->keys.insert(d->function->key());
  return true;
}

// In two steps and in place: a client that is killed in between must not be hurt by half a file.
bool serialize(Archive* self, const void* url, void** error) {
  const auto* u = expect<Url>(url, "NSURL", "serializeToURL:error:");
  if (u == nullptr) return false;
  const std::string text = text_of_archive(*self);
  std::ofstream file(u->path, std::ios::binary | std::ios::trunc);
  file << text.substr(0, text.size() / 2) << std::flush << text.substr(text.size() / 2) << std::flush;
  if (file) return true;
  set_error(error, kDomain, kInternal, "cannot write " + u->path);
  return false;
}

void* device(Archive* self) { return lend(self->device); }
void* get_label(Archive* self) { return give_autoreleased(make<String>(self->label)); }
void set_label(Archive* self, const void* label) { self->label = text_of(label, "setLabel:"); }

}  // namespace

void define_archive() {
  extend("MTLDevice").method<&new_archive>("newBinaryArchiveWithDescriptor:error:");
  define("MTLBinaryArchiveDescriptor", &make_object<ArchiveDescriptor>)
      .method<&set_url>("setUrl:")
      .method<&get_url>("url");
  define("MTLBinaryArchive")
      .method<&add>("addComputePipelineFunctionsWithDescriptor:error:")
      .method<&serialize>("serializeToURL:error:")
      .method<&device>("device")
      .method<&get_label>("label")
      .method<&set_label>("setLabel:");
}

}  // namespace mfa::driver
