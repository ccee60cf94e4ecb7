#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>

#include "memory.h"

namespace mfa::stand_in {
namespace {

class MpsGenerator final : public c10::GeneratorImpl {
 public:
  explicit MpsGenerator(at::Generator inner)
      : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::MPS)), inner(std::move(inner)) {}

  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }

  at::Generator inner;

 private:
  MpsGenerator* clone_impl() const override { return new MpsGenerator(inner.clone()); }
};

}  // namespace

const at::Generator& default_generator() {
  static const auto* generator =
      new at::Generator(at::make_generator<MpsGenerator>(at::detail::getDefaultCPUGenerator()));
  return *generator;
}

at::Generator new_generator() { return at::make_generator<MpsGenerator>(at::detail::createCPUGenerator()); }

at::Generator cpu_generator(const at::Generator& generator) {
  return static_cast<MpsGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

}  // namespace mfa::stand_in
