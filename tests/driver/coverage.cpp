// Which basic blocks have run, for coverage.py: clang's flags and addresses, written when the process ends.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

struct Block {
  std::uintptr_t address, is_entry;
};
const Block* first_block;
const bool *first_flag, *last_flag;

// A line for each block: its address in the library, and whether it has run.
__attribute__((destructor)) void write() {
  Dl_info self{};
  const char* folder = std::getenv("MFA_COVERAGE");
  if (!folder || !first_block || !dladdr(reinterpret_cast<void*>(&write), &self)) return;
  std::FILE* file = std::fopen((folder + ("/" + std::to_string(getpid()))).c_str(), "w");
  if (!file) return;
  const auto base = reinterpret_cast<std::uintptr_t>(self.dli_fbase);
  for (const bool* flag = first_flag; flag != last_flag; ++flag)
    std::fprintf(file, "%zx %d\n", first_block[flag - first_flag].address - base, *flag);
  std::fclose(file);
}

}  // namespace

extern "C" void __sanitizer_cov_bool_flag_init(const bool* begin, const bool* end) {
  first_flag = begin;
  last_flag = end;
}
extern "C" void __sanitizer_cov_pcs_init(const std::uintptr_t* begin, const std::uintptr_t*) {
  first_block = reinterpret_cast<const Block*>(begin);
}
