// A plan on the GPU: bind, dispatch on torch's own encoder. No commit, no wait, no copy.
#pragma once

#include <algorithm>
#include <filesystem>

#include "metal/archive.h"
#include "metal/device.h"
#include "metal/library.h"
#include "metal/notes.h"
#include "metal/pipeline.h"
#include "metal/torch_queue.h"
#include "plan/launcher.h"

namespace mfa {

class MetalLauncher final : public Launcher {
 public:
  // Metallibs are looked for in `library_directory`, the pipeline archive is in `cache_directory`.
  // Throws std::runtime_error with the reason why the kernels can't run here.
  MetalLauncher(metal::TorchQueue& queue, const std::filesystem::path& library_directory,
                const std::filesystem::path& cache_directory);

  // Of the kernels that there are: M5's are in a library of their own, and without it M5 runs M3's.
  Family family() const override {
    return library_.why_no_unit().empty() ? device_.family : std::min(device_.family, Family::apple9);
  }
  void run(const Plan& plan, const Arguments& arguments) override;

  void precompile(const Launch& launch) { pipelines_.get(launch); }
  void clear_cache();  // in memory and on disk

  const metal::Library& library() const { return library_; }
  const metal::Archive& archive() const { return archive_; }
  const metal::Pipelines& pipelines() const { return pipelines_; }
  const metal::Notes& notes() const { return notes_; }

 private:
  metal::Notes notes_;
  metal::Device device_;
  metal::TorchQueue& queue_;
  metal::Library library_;
  metal::Archive archive_;
  metal::Pipelines pipelines_;
};

}  // namespace mfa
