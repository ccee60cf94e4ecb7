// What must work, and what must not, through metal-cpp. test_driver.py runs each scenario by name and looks at the
// findings.
#define METALCPP_SYMBOL_VISIBILITY_HIDDEN
#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#include "client.h"

#include <dispatch/dispatch.h>

#include <cmath>
#include <cstring>

static std::string last_error;

extern "C" __attribute__((visibility("default"))) const char* client_run(const char* name) {
  const auto scenario = Scenario::all().find(name);
  if (scenario == Scenario::all().end()) return "no such scenario";
  try {
    scenario->second();
    return nullptr;
  } catch (const std::exception& e) {
    last_error = e.what();
    return last_error.c_str();
  }
}

// ---- what works -----------------------------------------------------------------------------------------------------

SCENARIO(device) {
  const Rig rig;
  CHECK(std::strcmp(rig.device->name()->utf8String(), "Apple M1 (software driver)") == 0);
  CHECK(rig.device->supportsFamily(MTL::GPUFamilyApple7) && !rig.device->supportsFamily(MTL::GPUFamilyApple8));
  CHECK(rig.device->maxThreadsPerThreadgroup().height == 1024);  // comes back through objc_msgSend_stret on x86-64
  CHECK(rig.device->maxThreadgroupMemoryLength() == 32768);
  const NS::OperatingSystemVersion version = NS::ProcessInfo::processInfo()->operatingSystemVersion();
  CHECK(version.majorVersion == 15);
  CHECK(NS::ProcessInfo::processInfo()->isOperatingSystemAtLeastVersion({14, 7, 2}));  // goes on the stack
  CHECK(!NS::ProcessInfo::processInfo()->isOperatingSystemAtLeastVersion({26, 0, 0}));
}

SCENARIO(strings) {
  const Pool pool;
  NS::String* a = text("attention");
  CHECK(a->length() == 9 && a->isEqualToString((MTLSTR("attention"))));
  CHECK(std::strcmp(a->stringByAppendingString(text("!"))->utf8String(), "attention!") == 0);
  const NS::Object* both[] = {a, MTLSTR("b")};
  NS::Array* array = NS::Array::array(both, 2);
  CHECK(array->count() == 2 && array->object<NS::String>(0) == a);
}

SCENARIO(runs) {
  Rig rig;
  const auto state = rig.pipeline();
  CHECK(state && state->threadExecutionWidth() == 32 && state->maxTotalThreadsPerThreadgroup() == 64);
  rig.run([&](auto* encoder) {
    rig.bind(encoder, state.get());
    encoder->dispatchThreads(MTL::Size(kCount, 1, 1), MTL::Size(32, 1, 1));
  });
  for (int i = 0; i < kCount; ++i) CHECK(rig.result(i) == 3.0f * static_cast<float>(i));
}

SCENARIO(constants_and_offsets) {
  Rig rig;
  const auto state = rig.pipeline("scale", true, true, 2);
  const auto extra = rig.buffer(2 * kCount * sizeof(float));
  rig.run([&](auto* encoder) {
    rig.bind(encoder, state.get());
    encoder->setBuffer(extra.get(), 0, 3);
    encoder->setBufferOffset(kCount * sizeof(float), 3);
    encoder->dispatchThreadgroups(kGroups, kThreads);
  });
  CHECK(rig.result(5) == 2 * 3 * 25 + kCount + 5);
}

SCENARIO(two_dispatches) {
  Rig rig;
  const auto state = rig.pipeline();
  rig.run([&](auto* encoder) {
    rig.bind(encoder, state.get());
    encoder->dispatchThreadgroups(kGroups, kThreads);
    encoder->memoryBarrier(MTL::BarrierScopeBuffers);
    const NS::UInteger offsets[] = {0, 0};
    const MTL::Buffer* swapped[] = {rig.output.get(), rig.input.get()};
    encoder->setBuffers(swapped, offsets, NS::Range(0, 2));
    encoder->dispatchThreadgroups(kGroups, kThreads);
  });
  CHECK(static_cast<float*>(rig.input->contents())[7] == 63);
}

SCENARIO(reverses) {
  Rig rig;
  const auto state = rig.pipeline("reverse");
  rig.run([&](auto* encoder) {
    rig.bind(encoder, state.get());
    encoder->setThreadgroupMemoryLength(128, 0);
    encoder->dispatchThreadgroups(MTL::Size(2, 1, 1), MTL::Size(32, 1, 1));
  });
  CHECK(rig.result(0) == 31 && rig.result(32) == 63);
}

SCENARIO(completion_handler) {
  const Rig rig;
  int calls = 0;
  std::string captured = "a capture that must be copied to the heap";
  MTL::CommandBuffer* commands = rig.queue->commandBuffer();
  commands->addCompletedHandler([&calls, captured](MTL::CommandBuffer* done) {
    calls += done->status() == MTL::CommandBufferStatusCompleted && captured.size() == 41;
  });
  commands->commit();
  commands->waitUntilCompleted();
  CHECK(calls == 1 && commands->GPUEndTime() == 0);
}

SCENARIO(lazy_waits) {
  Rig rig;
  const auto state = rig.pipeline();
  MTL::CommandBuffer* commands = rig.queue->commandBuffer();
  MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
  rig.bind(encoder, state.get());
  encoder->dispatchThreadgroups(kGroups, kThreads);
  encoder->endEncoding();
  commands->commit();
  CHECK(rig.result(5) == 5);  // nobody has waited
  commands->waitUntilCompleted();
  CHECK(rig.result(5) == 15);
}

SCENARIO(fresh_memory_is_nan) {
  const Rig rig;
  const auto fresh = NS::TransferPtr(rig.device->newBuffer(100, MTL::ResourceStorageModeShared));
  CHECK(std::isnan(static_cast<const float*>(fresh->contents())[24]));
  CHECK(NS::TransferPtr(rig.device->newBuffer(100, MTL::ResourceStorageModePrivate))->contents() == nullptr);
}

// ---- libraries, constants, archives ---------------------------------------------------------------------------------

SCENARIO(library_from_data) {
  const Rig rig;
  const std::string metallib = "mfa-simulator-metallib\n";
  dispatch_data_t data =
      dispatch_data_create(metallib.data(), metallib.size(), nullptr, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  NS::Error* error = nullptr;
  const auto library = NS::TransferPtr(rig.device->newLibrary(data, &error));
  dispatch_release(data);
  CHECK(library && library->functionNames()->count() == 2);
  const std::string junk = "MTLB";
  data = dispatch_data_create(junk.data(), junk.size(), nullptr, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
  CHECK(rig.device->newLibrary(data, &error) == nullptr && error && error->code() == 1);
  dispatch_release(data);
}

SCENARIO(library_from_url) {
  const Rig rig;
  NS::Error* error = nullptr;
  CHECK(rig.device->newLibrary(NS::URL::fileURLWithPath(text("/nonexistent.metallib")), &error) == nullptr && error);
}

SCENARIO(source_with_error) {
  const Rig rig;
  NS::Error* error = nullptr;
  CHECK(rig.device->newLibrary(text("#error no\n"), nullptr, &error) == nullptr);
  CHECK(std::strstr(error->localizedDescription()->utf8String(), "#error no"));
}

SCENARIO(missing_constant) {
  Rig rig;
  const auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  const bool yes = true;
  values->setConstantValue(&yes, MTL::DataTypeBool, NS::UInteger(0));
  CHECK(!rig.function("scale", values.get()));
  CHECK(rig.error == "function 'scale': the function constant 'has_extra' (index 1, bool) has no value");
}

SCENARIO(wrong_constant_type) {
  Rig rig;
  const auto values = rig.constants();
  const int one = 1;
  values->setConstantValue(&one, MTL::DataTypeInt, NS::UInteger(1));
  CHECK(!rig.function("scale", values.get()));
  CHECK(rig.error ==
        "function 'scale': the function constant 'has_extra' (index 1) is a bool, but its value is given as a int");
}

SCENARIO(no_constants) {
  const Rig rig;
  const auto function = NS::TransferPtr(rig.library->newFunction(text("scale")));
  NS::Error* error = nullptr;
  CHECK(function && rig.device->newComputePipelineState(function.get(), &error) == nullptr && error);
}

SCENARIO(unknown_function) {
  Rig rig;
  CHECK(rig.library->newFunction(text("nothing")) == nullptr);
  CHECK(!rig.function("nothing", rig.constants().get()) &&
        rig.error == "Function nothing was not found in the library");
}

SCENARIO(archive) {
  Rig rig;
  NS::Error* error = nullptr;
  const std::string path = std::string(getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp") + "/mfa-driver-test.metalarchive";
  NS::URL* url = NS::URL::fileURLWithPath(text(path));
  const auto descriptor = NS::TransferPtr(MTL::BinaryArchiveDescriptor::alloc()->init());
  auto archive = NS::TransferPtr(rig.device->newBinaryArchive(descriptor.get(), &error));
  const auto function = rig.function("scale", rig.constants().get());
  const auto pipeline = NS::TransferPtr(MTL::ComputePipelineDescriptor::alloc()->init());
  pipeline->setComputeFunction(function.get());
  const NS::Object* archives[] = {archive.get()};
  pipeline->setBinaryArchives(NS::Array::array(archives, 1));
  const auto compile = [&] {
    return NS::TransferPtr(rig.device->newComputePipelineState(
        pipeline.get(), MTL::PipelineOptionFailOnBinaryArchiveMiss, nullptr, &error));
  };
  CHECK(!compile() && error);
  CHECK(archive->addComputePipelineFunctions(pipeline.get(), &error) && archive->serializeToURL(url, &error));
  CHECK(compile());

  descriptor->setUrl(url);
  const auto again = NS::TransferPtr(rig.device->newBinaryArchive(descriptor.get(), &error));
  archives[0] = again.get();
  pipeline->setBinaryArchives(NS::Array::array(archives, 1));
  CHECK(again && compile());

  FILE* file = fopen(path.c_str(), "r+");
  fseek(file, -30, SEEK_END);
  fputc('~', file);
  fclose(file);
  CHECK(!NS::TransferPtr(rig.device->newBinaryArchive(descriptor.get(), &error)) &&
        error->code() == MTL::BinaryArchiveErrorInvalidFile);
  remove(path.c_str());
}

// ---- what is wrong: each must leave exactly one finding, of the rule that test_driver.py names
// --------------------------

#define DISPATCH_SCENARIO(name, ...)                   \
  SCENARIO(name) {                                     \
    Rig rig;                                           \
    const auto state = rig.pipeline();                 \
    rig.run([&](MTL::ComputeCommandEncoder* encoder) { \
      rig.bind(encoder, state.get());                  \
      __VA_ARGS__;                                     \
    });                                                \
  }

DISPATCH_SCENARIO(unbound_buffer, encoder->setBuffer(nullptr, 0, 1); encoder->dispatchThreadgroups(kGroups, kThreads))
DISPATCH_SCENARIO(offset_beyond, encoder->setBuffer(rig.input.get(), kCount * sizeof(float), 0))
DISPATCH_SCENARIO(short_bytes, encoder->setBytes(&kCount, 4, 2); encoder->dispatchThreadgroups(kGroups, kThreads))
DISPATCH_SCENARIO(offset_not_subtracted, encoder->setBuffer((MTL::Buffer*)((char*)rig.input.get() + 64), 64, 0))
DISPATCH_SCENARIO(not_an_object, encoder->setBuffer((MTL::Buffer*)&rig, 0, 0))
DISPATCH_SCENARIO(not_a_buffer, encoder->setBuffer((MTL::Buffer*)state.get(), 0, 0))
DISPATCH_SCENARIO(index_too_large, encoder->setBuffer(rig.input.get(), 0, 31))
DISPATCH_SCENARIO(long_bytes, const std::vector<char> bytes(4097); encoder->setBytes(bytes.data(), bytes.size(), 2))
DISPATCH_SCENARIO(too_much_threadgroup_memory, encoder->setThreadgroupMemoryLength(32784, 0))
DISPATCH_SCENARIO(odd_threadgroup_memory, encoder->setThreadgroupMemoryLength(20, 0))
DISPATCH_SCENARIO(too_many_threads, encoder->dispatchThreadgroups(kGroups, MTL::Size(96, 1, 1)))
DISPATCH_SCENARIO(empty_grid, encoder->dispatchThreadgroups(MTL::Size(1, 0, 1), kThreads))
DISPATCH_SCENARIO(partial_threadgroup, encoder->dispatchThreads(MTL::Size(50, 1, 1), MTL::Size(32, 1, 1)))
DISPATCH_SCENARIO(unbalanced_group, encoder->popDebugGroup())
DISPATCH_SCENARIO(out_of_bounds, const Params p{kCount + 64, 1}; encoder->setBytes(&p, sizeof p, 2);
                  encoder->dispatchThreadgroups(MTL::Size(2, 1, 1), kThreads))

SCENARIO(no_pipeline) {
  const Rig rig;
  Rig other;
  other.run([&](auto* encoder) { encoder->dispatchThreadgroups(kGroups, kThreads); });
}

SCENARIO(static_and_dynamic) {
  Rig rig;
  const auto state = rig.pipeline("reverse");
  rig.run([&](auto* encoder) {
    rig.bind(encoder, state.get());
    encoder->setThreadgroupMemoryLength(16384, 0);
    encoder->dispatchThreadgroups(MTL::Size(2, 1, 1), MTL::Size(32, 1, 1));
  });
}

SCENARIO(use_after_end) {
  Rig rig;
  MTL::CommandBuffer* commands = rig.queue->commandBuffer();
  MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
  encoder->endEncoding();
  encoder->setBuffer(rig.input.get(), 0, 0);
}

SCENARIO(never_ended) {
  const Rig rig;
  const Pool pool;
  rig.queue->commandBuffer()->computeCommandEncoder();
}

SCENARIO(commit_while_open) {
  const Rig rig;
  MTL::CommandBuffer* commands = rig.queue->commandBuffer();
  MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
  struct End {
    MTL::ComputeCommandEncoder* e;
    ~End() { e->endEncoding(); }
  } end{encoder};
  commands->commit();
}

SCENARIO(two_encoders) {
  const Rig rig;
  MTL::CommandBuffer* commands = rig.queue->commandBuffer();
  MTL::ComputeCommandEncoder* encoder = commands->computeCommandEncoder();
  struct End {
    MTL::ComputeCommandEncoder* e;
    ~End() { e->endEncoding(); }
  } end{encoder};
  commands->computeCommandEncoder();
}

SCENARIO(commit_twice) {
  const Rig rig;
  MTL::CommandBuffer* commands = rig.queue->commandBuffer();
  commands->commit();
  commands->commit();
}

SCENARIO(wait_without_commit) {
  const Rig rig;
  rig.queue->commandBuffer()->waitUntilCompleted();
}

SCENARIO(nil) {
  const Pool pool;
  MTL::Device* device = nullptr;
  CHECK(device->name() == nullptr);
}

SCENARIO(unrecognised_selector) {
  const Rig rig;
  CHECK(rig.device->newFence() == nullptr);
}

SCENARIO(empty_buffer) {
  const Rig rig;
  CHECK(rig.device->newBuffer(NS::UInteger(0), MTL::ResourceStorageModeShared) == nullptr);
}

SCENARIO(unaligned_no_copy) {
  const Rig rig;
  char memory[64];
  CHECK(rig.device->newBuffer(memory, sizeof memory, MTL::ResourceStorageModeShared, nullptr) == nullptr);
}

// ---- reference counts -----------------------------------------------------------------------------------------------

SCENARIO(over_release) {
  Rig rig;
  MTL::Function* function = rig.library->newFunction(text("scale"));
  function->release();
  function->release();
}

SCENARIO(over_release_while_held) {  // the pipeline still holds the function, so on a Mac this crashes much later
  Rig rig;
  const auto function = rig.function("scale", rig.constants().get());
  NS::Error* error = nullptr;
  const auto state = NS::TransferPtr(rig.device->newComputePipelineState(function.get(), &error));
  function->release();
}

SCENARIO(release_of_autoreleased) {
  const Rig rig;
  text("x")->release();
}

SCENARIO(use_after_release) {
  Rig rig;
  MTL::Buffer* buffer = rig.buffer().get();
  buffer->length();
}

SCENARIO(dead_buffer_bound) {
  Rig rig;
  MTL::Buffer* buffer = rig.buffer().get();
  rig.run([&](auto* encoder) { encoder->setBuffer(buffer, 0, 0); });
}

SCENARIO(leak) {
  const Rig rig;
  rig.library->newFunction(text("scale"));
}

SCENARIO(no_pool) { text("nobody releases this"); }

SCENARIO(data_leak) {
  const Pool pool;
  dispatch_data_create("x", 1, nullptr, DISPATCH_DATA_DESTRUCTOR_DEFAULT);
}

// ---- torch's stream -------------------------------------------------------------------------------------------------

namespace {

void on_stream(const std::function<void()>& work) {
  char* error = nullptr;
  void* context = const_cast<std::function<void()>*>(&work);
  if (mfa_driver_stream_run(
          mfa_driver_stream(), [](void* c) { (*static_cast<const std::function<void()>*>(c))(); }, context, &error) ==
      0)
    return;
  const std::string message = error;
  mfa_driver_free(error);
  throw std::runtime_error(message);
}

MTL::ComputeCommandEncoder* torch_encoder() {
  return static_cast<MTL::ComputeCommandEncoder*>(mfa_driver_stream_encoder(mfa_driver_stream()));
}

void synchronize() {
  char* error = nullptr;
  if (mfa_driver_stream_synchronize(mfa_driver_stream(), &error) == 0) return;
  const std::string message = error;
  mfa_driver_free(error);
  throw std::runtime_error(message);
}

}  // namespace

SCENARIO(stream_runs) {
  Rig rig;
  const auto state = rig.pipeline();
  on_stream([&] {
    rig.bind(torch_encoder(), state.get());
    torch_encoder()->dispatchThreadgroups(kGroups, kThreads);
  });
  synchronize();
  CHECK(rig.result(9) == 27);
}

SCENARIO(left_over_argument) {
  Rig rig;
  const auto state = rig.pipeline();
  on_stream([&] {
    rig.bind(torch_encoder(), state.get());
    torch_encoder()->dispatchThreadgroups(kGroups, kThreads);
  });
  on_stream([&] {
    const Params params{kCount, 5};
    torch_encoder()->setComputePipelineState(state.get());
    torch_encoder()->setBuffer(rig.input.get(), 0, 0);
    torch_encoder()->setBytes(&params, sizeof params, 2);
    torch_encoder()->dispatchThreadgroups(kGroups, kThreads);
  });
}

SCENARIO(torch_encoder_ended) {
  on_stream([] { torch_encoder()->endEncoding(); });
}

SCENARIO(off_queue) { torch_encoder(); }

SCENARIO(nested_queue) {
  on_stream([] { on_stream([] {}); });
}

// A second GPU beside the system's default.
struct TwoGpus {
  TwoGpus() { mfa_driver_set_device_count(2); }
  ~TwoGpus() { mfa_driver_set_device_count(1); }
  MTL::Device* second() const {
    static const auto all = NS::TransferPtr(MTL::CopyAllDevices());
    return all->object<MTL::Device>(1);
  }
};

SCENARIO(pipeline_of_another_gpu) {
  const TwoGpus gpus;
  Rig rig;
  const auto queue = NS::TransferPtr(gpus.second()->newCommandQueue());
  CHECK(gpus.second()->registryID() != rig.device->registryID() && queue->device() == gpus.second());
  const auto state = rig.pipeline();
  rig.queue = queue;
  rig.run([&](auto* encoder) { encoder->setComputePipelineState(state.get()); });
}

SCENARIO(buffer_of_another_gpu) {
  const TwoGpus gpus;
  Rig rig;
  const auto state = rig.pipeline();
  const auto foreign = NS::TransferPtr(gpus.second()->newBuffer(256, MTL::ResourceStorageModeShared));
  rig.run([&](auto* encoder) {
    encoder->setComputePipelineState(state.get());
    encoder->setBuffer(foreign.get(), 0, 0);
  });
}

SCENARIO(library_of_another_gpu) {
  const TwoGpus gpus;
  Rig rig;
  const auto function = rig.function("scale", rig.constants().get());
  NS::Error* error = nullptr;
  const auto state = NS::TransferPtr(gpus.second()->newComputePipelineState(function.get(), &error));
  CHECK(!state);
}

SCENARIO(exception_passes) {
  bool caught = false;
  try {
    on_stream([] { throw std::runtime_error("from the block"); });
  } catch (const std::runtime_error& e) {
    caught = std::strcmp(e.what(), "from the block") == 0;
  }
  CHECK(caught);
}

SCENARIO(foundation_raises) {
  const Rig rig;
  mfa_driver_raise_at("length");
  bool caught = false;
  try {
    rig.input->length();
  } catch (const std::exception&) {
  } catch (...) {
    caught = true;
  }
  CHECK(caught && rig.input->length() == kCount * sizeof(float));
}

SCENARIO(text_that_is_not_utf8) {
  const Pool pool;
  for (const char* bad : {"\xff", "a\x80", "\xc3", "\xe2\x82", "\xf8\x88\x80\x80\x80"}) CHECK(text(bad) == nullptr);
  CHECK(text("\xc3\xa9 \xe2\x82\xac \xf0\x9f\x8d\x8f")->length() > 0);
}

// ---- crashes, for a process of their own
// --------------------------------------------------------------------------------

SCENARIO(dereference_handle) {
  Rig rig;
  *reinterpret_cast<volatile float*>(reinterpret_cast<char*>(rig.input.get()) + 64) = 1;
}

SCENARIO(write_behind_contents) {
  Rig rig;
  static_cast<volatile float*>(rig.input->contents())[kCount] = 1;
}

// ---- the price of a message
// ---------------------------------------------------------------------------------------------

SCENARIO(million_messages) {
  Rig rig;
  NS::UInteger sum = 0;
  for (int i = 0; i < 1000000; ++i) sum += rig.input->length();
  CHECK(sum == 256000000);
}
