// Where kernels come from: metallibs beside libmfa, or, without one, the embedded source, compiled at run time.
#pragma once

#include <cstdint>
#include <deque>
#include <filesystem>
#include <mutex>
#include <set>
#include <span>
#include <string>

#include "metal/device.h"
#include "metal/notes.h"

namespace mfa::metal {

// A .metal file with its own headers inlined, so that it compiles from a string (cmake/embed_kernels.py).
struct KernelSource {
  const char* name;  // of the file, without its suffix
  const char* text;
  std::span<const char* const> kernels;  // host names
};

std::span<const KernelSource> kernel_sources();

class Library {
 public:
  // Looks for the metallibs in `directory`.
  Library(const Device& device, const std::filesystem::path& directory, Notes& notes);

  // A kernel specialised by its constants. Throws std::runtime_error.
  NS::SharedPtr<MTL::Function> function(const Launch& launch);

  // Why no kernels for the matrix unit are here; empty if they are.
  const std::string& why_no_unit() const { return why_no_unit_; }
  std::uint64_t hash() const { return hash_; }                     // of everything that can be compiled
  const std::string& description() const { return description_; }  // paths, or where the source came from

 private:
  // One metallib, or one source that is compiled when one of its kernels is asked for.
  struct Unit {
    std::string name;              // of the source
    const char* source = nullptr;  // null for a metallib
    std::mutex mutex;
    NS::SharedPtr<MTL::Library> library;
    std::set<std::string> kernels;
  };

  NS::SharedPtr<MTL::Library> open(const std::filesystem::path& file) const;  // throws std::runtime_error
  void add(const std::filesystem::path& file, const NS::SharedPtr<MTL::Library>& library);
  void embed();
  void compile(Unit& unit);
  MTL::Library& of(const std::string& kernel);  // compiles one source at most

  MTL::Device* device_;
  std::deque<Unit> units_;  // in order of preference
  std::uint64_t hash_;
  std::string description_;
  std::string why_no_unit_;
};

}  // namespace mfa::metal
