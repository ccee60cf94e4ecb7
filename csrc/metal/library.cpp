#include "metal/library.h"

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "metal/hash.h"
#include "metal/unit_layout.h"

namespace mfa::metal {
namespace {

constexpr const char* kUnitLibrary = "mfa_metal4.metallib";
constexpr const char* kLibrary = "mfa.metallib";

// Why a GPU can't run the kernels for the matrix unit (metal/unit/); empty if it may.
std::string why_not_on(const Device& device) {
  if (device.generation < 17) return "this GPU has none";
  // As MLX has it: of M5's generation, phones' chips don't gain from it.
  if (device.generation == 17 && device.architecture.ends_with('p')) return "this GPU is a phone's";
  // Before, Metal's tensor operations have another data layout.
  if (!device.is_system_at_least(26, 2)) return "it needs macOS 26.2 or later, and this is " + device.system;
  return "";
}

std::set<std::string> names_of(MTL::Library& library) {
  std::set<std::string> names;
  NS::Array* array = library.functionNames();
  for (NS::UInteger i = 0; i < array->count(); ++i) names.insert(text_of(array->object<NS::String>(i)));
  return names;
}

}  // namespace

Library::Library(const Device& device, const std::filesystem::path& directory, Notes& notes)
    : device_(device.handle.get()), hash_(kHashStart), why_no_unit_(why_not_on(device)) {
  const Pool pool;
  if (why_no_unit_.empty()) {
    try {
      const NS::SharedPtr<MTL::Library> library = open(directory / kUnitLibrary);
      why_no_unit_ = test_unit_layout(*device_, *library.get());
      if (why_no_unit_.empty()) add(directory / kUnitLibrary, library);
    } catch (const std::runtime_error& error) {
      why_no_unit_ = error.what();
    }
    if (!why_no_unit_.empty()) notes.add("the matrix unit is not used: " + why_no_unit_);
  }
  try {
    add(directory / kLibrary, open(directory / kLibrary));
  } catch (const std::runtime_error& error) {
    notes.add(error.what());
    embed();
    notes.add("no usable " + std::string(kLibrary) +
              ": kernels are compiled from source when they are first used, which "
              "takes seconds; a wheel, or a build with Xcode's Metal toolchain, has them compiled");
  }
}

NS::SharedPtr<MTL::Library> Library::open(const std::filesystem::path& file) const {
  if (!std::filesystem::exists(file)) throw std::runtime_error("there is no " + file.string());
  NS::Error* error = nullptr;
  auto library = NS::TransferPtr(device_->newLibrary(file_url(file.string()), &error));
  if (!library) throw std::runtime_error(file.string() + " can't be loaded: " + text_of(error));
  return library;
}

void Library::add(const std::filesystem::path& file, const NS::SharedPtr<MTL::Library>& library) {
  std::ifstream stream(file, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator(stream), {}};
  hash_ = hash_of(bytes, hash_);
  description_ += (description_.empty() ? "" : ", ") + file.string();
  Unit& unit = units_.emplace_back();
  unit.kernels = names_of(*library.get());
  unit.library = library;
}

void Library::embed() {
  for (const KernelSource& source : kernel_sources()) {
    hash_ = hash_of(source.text, hash_);
    Unit& unit = units_.emplace_back();
    unit.name = source.name;
    unit.source = source.text;
    unit.kernels.insert(source.kernels.begin(), source.kernels.end());
  }
  description_ += (description_.empty() ? "" : ", ") + std::string("compiled from source at run time");
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
      (units_.back().source ? " is in none of the sources that mfa carries" : " is missing from " + description_));
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
