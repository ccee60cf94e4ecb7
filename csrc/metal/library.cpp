#include "metal/library.h"

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "metal/hash.h"

namespace mfa::metal {
namespace {

// Kernels for Metal 4's tensor operations. Below macOS 26.2 their data layout is another one; before generation 17 (M5)
// no hardware gains from them.
constexpr const char* kMetal4Library = "mfa_metal4.metallib";
constexpr const char* kLibrary = "mfa.metallib";

bool runs_metal4(const Device& device) { return device.generation >= 17 && device.is_system_at_least(26, 2); }

std::set<std::string> names_of(MTL::Library& library) {
  std::set<std::string> names;
  NS::Array* array = library.functionNames();
  for (NS::UInteger i = 0; i < array->count(); ++i) names.insert(text_of(array->object<NS::String>(i)));
  return names;
}

}  // namespace

Library::Library(const Device& device, const std::filesystem::path& directory, Notes& notes)
    : device_(device.handle.get()), hash_(kHashStart) {
  const Pool pool;
  if (runs_metal4(device) && std::filesystem::exists(directory / kMetal4Library))
    load(directory / kMetal4Library, notes);
  load(directory / kLibrary, notes);
  if (!units_.empty()) return;
  embed();
  notes.add("no usable " + std::string(kLibrary) +
            ": kernels are compiled from source when they are first used, which "
            "takes seconds; a wheel, or a build with Xcode's Metal toolchain, has them compiled");
}

void Library::load(const std::filesystem::path& file, Notes& notes) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) return notes.add("there is no " + file.string());
  NS::Error* error = nullptr;
  NS::SharedPtr<MTL::Library> library = NS::TransferPtr(device_->newLibrary(file_url(file.string()), &error));
  if (!library) return notes.add(file.string() + " can't be loaded: " + text_of(error));

  const std::string bytes{std::istreambuf_iterator(stream), {}};
  hash_ = hash_of(bytes, hash_);
  description_ += (description_.empty() ? "" : ", ") + file.string();
  Unit& unit = units_.emplace_back();
  unit.kernels = names_of(*library.get());
  unit.library = std::move(library);
}

void Library::embed() {
  for (const KernelSource& source : kernel_sources()) {
    hash_ = hash_of(source.text, hash_);
    Unit& unit = units_.emplace_back();
    unit.name = source.name;
    unit.source = source.text;
    unit.kernels.insert(source.kernels.begin(), source.kernels.end());
  }
  description_ = "compiled from source at run time";
}

void Library::compile(Unit& unit) {
  auto options = NS::TransferPtr(MTL::CompileOptions::alloc()->init());
  options->setLanguageVersion(MTL::LanguageVersion3_1);
  options->setFastMathEnabled(false);  // as in the metallib: kernels name the fast functions that they want
  NS::Error* error = nullptr;
  unit.library = NS::TransferPtr(device_->newLibrary(ns_string(unit.source), options.get(), &error));
  if (!unit.library) throw std::runtime_error("Metal can't compile " + unit.name + ".metal: " + text_of(error));
}

MTL::Library& Library::of(const std::string& kernel) {
  for (Unit& unit : units_) {
    if (!unit.kernels.contains(kernel)) continue;
    const std::lock_guard lock(unit.mutex);
    if (!unit.library) compile(unit);
    return *unit.library.get();
  }
  throw std::runtime_error(
      "kernel " + kernel +
      (units_.front().source ? " is in none of the sources that mfa carries" : " is missing from " + description_));
}

NS::SharedPtr<MTL::Function> Library::function(const Launch& launch) {
  MTL::Library& library = of(launch.kernel);
  auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  for (const Constant& constant : launch.constants)
    values->setConstantValue(&constant.value, MTL::DataTypeBool, NS::UInteger{constant.index});
  NS::Error* error = nullptr;
  auto function = NS::TransferPtr(library.newFunction(ns_string(launch.kernel), values.get(), &error));
  if (!function)
    throw std::runtime_error("Metal can't specialise " + std::string(launch.kernel) + ": " + text_of(error));
  return function;
}

}  // namespace mfa::metal
