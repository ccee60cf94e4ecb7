#include "library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include "failure.h"
#include "scheduler.h"
#ifdef __linux__
#include <link.h>
#else
#include <mach-o/loader.h>
#endif

namespace mfa::sim {
namespace {

std::vector<std::unique_ptr<mfa_sim_library>> libraries;
mfa_sim_library* opening = nullptr;  // whose constructors are running; guarded by engine_lock

void add_segment(mfa_sim_library& library, uintptr_t begin, size_t size) {
  library.begin = library.begin == 0 ? begin : std::min(library.begin, begin);
  library.end = std::max(library.end, begin + size);
}

#ifdef __linux__
void find_extent(mfa_sim_library& library) {
  link_map* map = nullptr;
  if (dlinfo(library.handle, RTLD_DI_LINKMAP, &map) != 0) return;
  library.load_bias = map->l_addr;
  auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& library = *static_cast<mfa_sim_library*>(data);
    if (info->dlpi_addr != library.load_bias) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type == PT_LOAD) add_segment(library, info->dlpi_addr + header.p_vaddr, header.p_memsz);
    }
    return 1;
  };
  dl_iterate_phdr(visit, &library);
}
#else
void find_extent(mfa_sim_library& library) {  // Mach-O
  Dl_info info;
  if (library.kernels.empty() || dladdr(reinterpret_cast<void*>(library.kernels[0].entry), &info) == 0) return;
  library.load_bias = reinterpret_cast<uintptr_t>(info.dli_fbase);  // a library's __TEXT is linked at zero
  const auto* header = static_cast<const mach_header_64*>(info.dli_fbase);
  auto* command = reinterpret_cast<const segment_command_64*>(header + 1);
  for (uint32_t i = 0; i < header->ncmds; ++i) {
    if (command->cmd == LC_SEGMENT_64) add_segment(library, library.load_bias + command->vmaddr, command->vmsize);
    command = reinterpret_cast<const segment_command_64*>(reinterpret_cast<const char*>(command) + command->cmdsize);
  }
}
#endif

// The frames of an inlined call, innermost first, as "file:line".
std::vector<std::string> frames_at(const char* tool, const std::string& path, uintptr_t offset) {
  std::string quoted = "'";
  for (char c : path) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  char command[4096];
  snprintf(command, sizeof command, "%s -i -e %s' 0x%zx 2>/dev/null", tool, quoted.c_str(),
           static_cast<size_t>(offset));
  std::vector<std::string> frames;
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return frames;
  char line[4096];
  while (fgets(line, sizeof line, pipe) != nullptr) {
    line[strcspn(line, " \n")] = 0;  // "file:12 (discriminator 3)"
    if (strchr(line, ':') != nullptr && line[0] != '?' && strstr(line, ":?") == nullptr) frames.emplace_back(line);
  }
  pclose(pipe);
  return frames;
}

bool is_shim(const std::string& frame) {
  return frame.rfind("msl/", 0) == 0 || frame.find("/msl/") != std::string::npos;
}

}  // namespace

void library_is_instrumented() {
  if (opening != nullptr) opening->instrumented = true;
}

std::string source_location(const void* pc) {
  const auto address = reinterpret_cast<uintptr_t>(pc);
  Dl_info info;
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "an unknown instruction";
  uintptr_t bias = reinterpret_cast<uintptr_t>(info.dli_fbase);
  for (const auto& library : libraries) {
    if (library->contains(address)) bias = library->load_bias;
  }
  for (const char* tool : {"addr2line", "llvm-addr2line"}) {
    const auto frames = frames_at(tool, info.dli_fname, address - bias);
    if (frames.empty()) continue;
    std::string location;
    for (const auto& frame : frames) {
      if (is_shim(frame)) continue;  // never the kernel's fault: name the lines that called it
      location += location.empty() ? "" : " from ";
      location += base_name(frame.c_str());
    }
    return location.empty() ? base_name(frames.back().c_str()) : location;
  }
  char text[64];
  snprintf(text, sizeof text, "+0x%zx", static_cast<size_t>(address - bias));
  return base_name(info.dli_fname) + std::string(text);
}

}  // namespace mfa::sim

using namespace mfa::sim;

const mfa_sim_kernel* mfa_sim_library::find_kernel(const char* name) const {
  for (const auto& kernel : kernels) {
    if (strcmp(kernel.name, name) == 0) return &kernel;
  }
  return nullptr;
}

const mfa_sim_function_constant* mfa_sim_library::find_constant(const char* name) const {
  for (const auto& constant : constants) {
    if (strcmp(constant.name, name) == 0) return &constant;
  }
  return nullptr;
}

void mfa_sim_register_kernel(const mfa_sim_kernel* kernel) {
  if (opening != nullptr) opening->kernels.push_back(*kernel);
}

void mfa_sim_register_function_constant(const mfa_sim_function_constant* constant) {
  if (opening == nullptr) return;
  opening->every_constant.push_back(*constant);
  for (const auto& known : opening->constants) {
    if (known.index == constant->index && strcmp(known.name, constant->name) == 0) return;
  }
  opening->constants.push_back(*constant);
}

mfa_sim_library* mfa_sim_open(const char* path, char* error, size_t error_size) {
  std::lock_guard guard(engine_lock);
  auto library = std::make_unique<mfa_sim_library>();
  opening = library.get();
  library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  opening = nullptr;
  if (library->handle == nullptr) {
    if (error != nullptr && error_size > 0) snprintf(error, error_size, "%s", dlerror());
    return nullptr;
  }
  for (const auto& known : libraries) {  // its constructors ran when it was opened first
    if (known->handle == library->handle) return known.get();
  }
  library->path = path;
  find_extent(*library);
  libraries.push_back(std::move(library));
  return libraries.back().get();
}

int mfa_sim_kernel_count(const mfa_sim_library* library) { return static_cast<int>(library->kernels.size()); }

const mfa_sim_kernel* mfa_sim_kernel_at(const mfa_sim_library* library, int i) {
  return i >= 0 && i < mfa_sim_kernel_count(library) ? &library->kernels[i] : nullptr;
}

const mfa_sim_kernel* mfa_sim_find_kernel(const mfa_sim_library* library, const char* name) {
  return library->find_kernel(name);
}

int mfa_sim_function_constant_count(const mfa_sim_library* library) {
  return static_cast<int>(library->constants.size());
}

const mfa_sim_function_constant* mfa_sim_function_constant_at(const mfa_sim_library* library, int i) {
  return i >= 0 && i < mfa_sim_function_constant_count(library) ? &library->constants[i] : nullptr;
}

int mfa_sim_is_instrumented(const mfa_sim_library* library) { return library->instrumented; }
