// Compiled pipelines on disk, so that only the first process on a machine waits for Metal's compiler.
#pragma once

#include <cstdint>
#include <filesystem>
#include <mutex>

#include "metal/device.h"
#include "metal/notes.h"

namespace mfa::metal {

// $MFA_CACHE_DIR, or the user's cache directory; empty (no archive) if there is neither.
std::filesystem::path default_cache_directory();

class Archive {
 public:
  // The file's name says which kernels, GPU and operating system it is for, so a foreign one is never opened.
  // An empty directory turns the archive off. Nothing here throws: without an archive, pipelines are compiled.
  Archive(const Device& device, std::uint64_t library_hash, const std::filesystem::path& directory, Notes& notes);

  const std::filesystem::path& file() const { return file_; }

  // Lets the compilation of `descriptor` look into the archive.
  void use_for(MTL::ComputePipelineDescriptor& descriptor) const;

  // Stores what `descriptor` compiles to, and writes the file anew.
  void add(const MTL::ComputePipelineDescriptor& descriptor);

  // Deletes every archive of the directory.
  void clear();

 private:
  NS::SharedPtr<MTL::BinaryArchive> open(const NS::URL* url, NS::Error** error) const;
  void load();
  bool write(std::string& why_not);

  MTL::Device* device_;
  Notes& notes_;
  std::filesystem::path file_;
  mutable std::mutex mutex_;
  // Two objects of one file: several threads look into the first, which therefore never changes, while one adds to the
  // second.
  NS::SharedPtr<MTL::BinaryArchive> known_, growing_;
};

}  // namespace mfa::metal
