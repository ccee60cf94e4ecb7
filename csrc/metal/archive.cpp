#include "metal/archive.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <system_error>

#include "metal/hash.h"

namespace mfa::metal {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".metalarchive";

std::string file_name(const Device& device, std::uint64_t library_hash) {
  // The compiler is part of the operating system: its build is in the version's text.
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx",
                static_cast<unsigned long long>(hash_of(device.system, hash_of(device.name, library_hash))));
  return digits + std::string(kSuffix);
}

}  // namespace

fs::path default_cache_directory() {
  if (const char* chosen = std::getenv("MFA_CACHE_DIR")) return chosen;
  const char* home = std::getenv("HOME");
  if (!home || !*home) return {};
#ifdef __APPLE__
  return fs::path(home) / "Library" / "Caches" / "mfa";
#else
  return fs::path(home) / ".cache" / "mfa";
#endif
}

Archive::Archive(const Device& device, std::uint64_t library_hash, const fs::path& directory, Notes& notes)
    : device_(device.handle.get()), notes_(notes) {
  if (directory.empty()) return;
  file_ = directory / file_name(device, library_hash);
  load();
}

NS::SharedPtr<MTL::BinaryArchive> Archive::open(const NS::URL* url, NS::Error** error) const {
  auto descriptor = NS::TransferPtr(MTL::BinaryArchiveDescriptor::alloc()->init());
  if (url) descriptor->setUrl(url);
  return NS::TransferPtr(device_->newBinaryArchive(descriptor.get(), error));
}

void Archive::load() {
  const Pool pool;
  if (!ns_string(file_.string())) {
    notes_.add("there is no archive of pipelines: the path of the cache, see MFA_CACHE_DIR, is not UTF-8");
    file_.clear();
    return;
  }
  NS::Error* error = nullptr;
  std::error_code ignored;
  if (fs::exists(file_, ignored)) {
    known_ = open(file_url(file_.string()), &error);
    if (known_) growing_ = open(file_url(file_.string()), &error);
    if (!growing_) {
      known_ = {};
      notes_.add("the pipeline archive " + file_.string() + " is unusable, and is built anew: " + text_of(error));
      fs::remove(file_, ignored);
    }
  }
  if (!growing_) growing_ = open(nullptr, &error);
  if (!growing_) notes_.add("Metal can't make a pipeline archive: " + text_of(error));
}

void Archive::use_for(MTL::ComputePipelineDescriptor& descriptor) const {
  const std::lock_guard lock(mutex_);
  if (!known_) return;
  const NS::Object* archives[] = {known_.get()};
  descriptor.setBinaryArchives(NS::Array::array(archives, 1));
}

void Archive::add(const MTL::ComputePipelineDescriptor& descriptor) {
  const std::lock_guard lock(mutex_);
  if (!growing_) return;
  NS::Error* error = nullptr;
  std::string why_not;
  if (!growing_->addComputePipelineFunctions(&descriptor, &error))
    notes_.add("a pipeline is not archived: " + text_of(error));
  else if (!write(why_not))
    notes_.add("the pipeline archive " + file_.string() + " can't be written: " + why_not);
}

// Under a name of this process first: whoever opens the archive, now or after we are killed, finds the old one or the
// new one whole. Of two processes that add at the same time one wins, and the other's pipelines are compiled once more.
bool Archive::write(std::string& why_not) {
  std::error_code failure;
  fs::create_directories(file_.parent_path(), failure);
  const fs::path temporary = file_.string() + "." + std::to_string(getpid());
  NS::Error* error = nullptr;
  if (!growing_->serializeToURL(file_url(temporary.string()), &error)) {
    why_not = text_of(error);
  } else {
    fs::rename(temporary, file_, failure);
    if (!failure) return true;
    why_not = failure.message();
  }
  fs::remove(temporary, failure);
  return false;
}

void Archive::clear() {
  if (file_.empty()) return;
  const Pool pool;
  const std::lock_guard lock(mutex_);
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(file_.parent_path(), ignored))
    if (entry.path().filename().string().find(kSuffix) != std::string::npos) fs::remove(entry.path(), ignored);
  NS::Error* error = nullptr;
  known_ = {};
  growing_ = open(nullptr, &error);
}

}  // namespace mfa::metal
