#include "library.h"

#include <sys/stat.h>

#include <fstream>
#include <iterator>
#include <mutex>

#include "constants.h"
#include "dispatch.h"
#include "findings.h"
#include "foundation.h"
#include "runtime.h"
#include "settings.h"

namespace mfa::driver {
namespace {

constexpr const char* kDomain = "MTLLibraryErrorDomain";
enum : std::int64_t { kUnsupported = 1, kInternal = 2, kCompileFailure = 3, kFunctionNotFound = 5 };

// A Linux "metallib" is a text: this line, then the name of a shared library, relative to the file; without one, the
// library of the settings; with a name that begins with +, the one beside it whose name ends so.
constexpr const char* kMagic = "mfa-simulator-metallib\n";

void* load(Device* device, const std::string& path, void** error) {
  char text[1024] = {};
  const mfa_sim_library* engine = mfa_sim_open(path.c_str(), text, sizeof text);
  if (engine != nullptr) return give(make<Library>(device, engine, path));
  set_error(error, kDomain, kInternal, text);
  return nullptr;
}

// "x/libkernels.so", "_metal4" -> "x/libkernels_metal4.so".
std::string beside(std::string path, const std::string& ending) {
  return path.insert(std::min(path.rfind('.'), path.size()), ending);
}

void* load_metallib(Device* device, const std::string& text, const std::string& directory, void** error) {
  if (!text.starts_with(kMagic)) {
    set_error(error, kDomain, kUnsupported, "Invalid library file");
    return nullptr;
  }
  std::string name = text.substr(std::string(kMagic).size());
  name.erase(std::min(name.find('\n'), name.size()));
  if (name.empty()) return load(device, settings().kernel_library, error);
  if (name[0] == '+') return load(device, beside(settings().kernel_library, name.substr(1)), error);
  return load(device, name[0] == '/' ? name : directory + name, error);
}

std::mutex lock;
std::vector<std::string> sources;

std::string directory_of(const std::string& path) { return path.substr(0, path.rfind('/') + 1); }

void* library_with_file(Device* device, const std::string& path, void** error) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    set_error(error, kDomain, kUnsupported, "library not found: " + path);
    return nullptr;
  }
  return load_metallib(device, std::string(std::istreambuf_iterator(file), {}), directory_of(path), error);
}

void* library_with_data(Device* self, const void* data, void** error) {
  const auto* d = expect<Data>(data, "dispatch_data", "newLibraryWithData:error:");
  return d == nullptr ? nullptr : load_metallib(self, d->bytes(), directory_of(settings().kernel_library), error);
}
void* library_with_url(Device* self, const void* url, void** error) {
  const auto* u = expect<Url>(url, "NSURL", "newLibraryWithURL:error:");
  return u == nullptr ? nullptr : library_with_file(self, u->path, error);
}
void* library_with_path(Device* self, const void* path, void** error) {
  return library_with_file(self, text_of(path, "newLibraryWithFile:error:"), error);
}
// There is no MSL compiler here: every source is taken for that of the settings' library, unless it says #error.
void* library_with_source(Device* self, const void* source, const void*, void** error) {
  const std::string text = text_of(source, "newLibraryWithSource:options:error:");
  if (text.empty() || text.find("#error") != std::string::npos) {
    set_error(error, kDomain, kCompileFailure, "program_source: error: " + (text.empty() ? "empty source" : text));
    return nullptr;
  }
  {
    const std::lock_guard guard(lock);
    sources.push_back(text.substr(0, text.find('\n')));
  }
  return load(self, settings().kernel_library, error);
}

void* function_names(Library* self) {
  auto* names = make<Array>();
  for (int i = 0; i < mfa_sim_kernel_count(self->engine); ++i) {
    names->items.emplace_back(make<String>(mfa_sim_kernel_at(self->engine, i)->name));
  }
  return give_autoreleased(names);
}

void* new_function(Library* self, const void* name) {
  const std::string text = text_of(name, "newFunctionWithName:");
  const mfa_sim_kernel* kernel = mfa_sim_find_kernel(self->engine, text.c_str());
  return kernel == nullptr ? nullptr : give(make<Function>(self, kernel));
}

void* new_function_with(Library* self, const std::string& name, const void* values, void** error) {
  const mfa_sim_kernel* kernel = mfa_sim_find_kernel(self->engine, name.c_str());
  if (kernel == nullptr) {
    set_error(error, kDomain, kFunctionNotFound, "Function " + name + " was not found in the library");
    return nullptr;
  }
  const Ref<Function> function(make<Function>(self, kernel));
  if (values != nullptr) {
    const auto* v =
        expect<ConstantValues>(values, "MTLFunctionConstantValues", "newFunctionWithName:constantValues:error:");
    if (v == nullptr) return nullptr;
    if (const auto reason = specialise(*function, *v)) {
      set_error(error, kDomain, kCompileFailure, *reason);
      return nullptr;
    }
  }
  return give(function.get());
}
void* new_function_constants(Library* self, const void* name, const void* values, void** error) {
  return new_function_with(self, text_of(name, "newFunctionWithName:constantValues:error:"), values, error);
}

void* device(Library* self) { return lend(self->device); }
void* get_label(Library* self) { return give_autoreleased(make<String>(self->label)); }
void set_label(Library* self, const void* label) { self->label = text_of(label, "setLabel:"); }
std::int64_t library_type(Library*) { return 0; }  // executable

void* function_device(Function* self) { return lend(self->library->device); }
void* function_name(Function* self) { return give_autoreleased(make<String>(self->kernel->name)); }
void* function_label(Function* self) { return give_autoreleased(make<String>(self->label)); }
void set_function_label(Function* self, const void* label) { self->label = text_of(label, "setLabel:"); }
std::uint64_t function_type(Function*) { return 3; }  // kernel

class FunctionDescriptor final : public Object {
 public:
  FunctionDescriptor() : Object("MTLFunctionDescriptor") {}
  std::string name;
  Ref<ConstantValues> values;
};
void* function_descriptor(Class*) { return give_autoreleased(make<FunctionDescriptor>()); }
void set_descriptor_name(FunctionDescriptor* self, const void* name) { self->name = text_of(name, "setName:"); }
void set_descriptor_values(FunctionDescriptor* self, const void* values) {
  self->values = expect<ConstantValues>(values, "MTLFunctionConstantValues", "setConstantValues:");
}
void* new_function_descriptor(Library* self, const void* descriptor, void** error) {
  auto* d = expect<FunctionDescriptor>(descriptor, "MTLFunctionDescriptor", "newFunctionWithDescriptor:error:");
  if (d == nullptr) return nullptr;
  return new_function_with(self, d->name, d->values ? d->values->handle() : nullptr, error);
}

// What a source is compiled with makes no difference here; the selectors must exist all the same.
class CompileOptions final : public Object {
 public:
  CompileOptions() : Object("MTLCompileOptions") {}
  std::uint64_t language_version = 0;
};
void ignore_flag(CompileOptions*, bool) {}
void ignore_mode(CompileOptions*, std::int64_t) {}
void set_language_version(CompileOptions* self, std::uint64_t version) { self->language_version = version; }
std::uint64_t language_version(CompileOptions* self) { return self->language_version; }

}  // namespace

std::string Function::key() const {
  struct stat status{};
  stat(library->path.c_str(), &status);
  std::string text =
      library->path + ":" + std::to_string(status.st_size) + ":" + std::to_string(status.st_mtime) + "|" + kernel->name;
  for (const auto& [index, bytes] : constants) {
    text += "|" + std::to_string(index) + "=";
    for (const std::uint8_t byte : bytes) text += format("%02x", byte);
  }
  return text;
}

std::vector<std::string> compiled_sources() {
  const std::lock_guard guard(lock);
  return sources;
}

void define_library() {
  define_constants();
  extend("MTLDevice")
      .method<&library_with_data>("newLibraryWithData:error:")
      .method<&library_with_url>("newLibraryWithURL:error:")
      .method<&library_with_path>("newLibraryWithFile:error:")
      .method<&library_with_source>("newLibraryWithSource:options:error:");
  define("MTLLibrary")
      .method<&function_names>("functionNames")
      .method<&new_function>("newFunctionWithName:")
      .method<&new_function_constants>("newFunctionWithName:constantValues:error:")
      .method<&new_function_descriptor>("newFunctionWithDescriptor:error:")
      .method<&device>("device")
      .method<&get_label>("label")
      .method<&set_label>("setLabel:")
      .method<&library_type>("type");
  define("MTLFunction")
      .method<&function_name>("name")
      .method<&function_label>("label")
      .method<&set_function_label>("setLabel:")
      .method<&function_type>("functionType")
      .method<&function_device>("device");
  define("MTLFunctionDescriptor", &make_object<FunctionDescriptor>)
      .class_method<&function_descriptor>("functionDescriptor")
      .method<&set_descriptor_name>("setName:")
      .method<&set_descriptor_values>("setConstantValues:");
  define("MTLCompileOptions", &make_object<CompileOptions>)
      .method<&set_language_version>("setLanguageVersion:")
      .method<&language_version>("languageVersion")
      .method<&ignore_flag>("setFastMathEnabled:")
      .method<&ignore_flag>("setPreserveInvariance:")
      .method<&ignore_mode>("setMathMode:")
      .method<&ignore_mode>("setMathFloatingPointFunctions:")
      .method<&ignore_mode>("setOptimizationLevel:");
}

}  // namespace mfa::driver
