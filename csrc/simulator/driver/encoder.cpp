#include "encoder.h"

#include "findings.h"
#include "runtime.h"

namespace mfa::driver {
namespace {

constexpr std::uint64_t kMaxBytes = 4096;

unsigned long long number(std::uint64_t value) { return value; }

// " (kernel 'forward_f16_d64')": for messages about an encoder's state.
std::string who(const Encoder& e) {
  return e.bindings.pipeline ? std::string(" (kernel '") + e.bindings.pipeline->label + "')" : std::string();
}

bool encoding(Encoder* self, const char* what) {
  if (!self->ended) return true;
  report("after-end", "%s on %s%s after endEncoding", what, self->describe().c_str(), who(*self).c_str());
  return false;
}

Slot* slot(Encoder* self, std::uint64_t index, const char* what) {
  if (!encoding(self, what)) return nullptr;
  if (index < MFA_SIM_BUFFERS) return &self->bindings.slots[index];
  report("index", "%s: index %llu is above %d%s", what, number(index), MFA_SIM_BUFFERS - 1, who(*self).c_str());
  return nullptr;
}

bool check_device(Encoder* self, const Object& object, const Device* device, const char* what) {
  if (device == self->device()) return true;
  report("device", "%s: %s belongs to another GPU than the encoder%s", what, object.describe().c_str(),
         who(*self).c_str());
  return false;
}

void set_pipeline(Encoder* self, const void* state) {
  if (!encoding(self, "setComputePipelineState:")) return;
  constexpr const char* kWhat = "setComputePipelineState:";
  auto* pipeline = expect<Pipeline>(state, "MTLComputePipelineState", kWhat);
  if (pipeline != nullptr && !check_device(self, *pipeline, pipeline->device(), kWhat)) pipeline = nullptr;
  self->bindings.pipeline = pipeline;
  self->bindings.pipeline_op = self->op;
}

bool check_offset(Encoder* self, const Buffer& buffer, std::uint64_t offset, std::uint64_t index, const char* what) {
  if (offset < buffer.length) return true;
  report("offset", "%s: offset %llu is beyond the %llu bytes of %s, at index %llu%s", what, number(offset),
         number(buffer.length), buffer.describe().c_str(), number(index), who(*self).c_str());
  return false;
}

void set_buffer(Encoder* self, const void* handle, std::uint64_t offset, std::uint64_t index) {
  constexpr const char* kWhat = "setBuffer:offset:atIndex:";
  Slot* s = slot(self, index, kWhat);
  if (s == nullptr) return;
  s->bound = false;
  if (handle == nullptr) return;
  auto* buffer = expect<Buffer>(handle, "MTLBuffer", kWhat);
  if (buffer == nullptr || !check_device(self, *buffer, buffer->device, kWhat)) return;
  if (!check_offset(self, *buffer, offset, index, kWhat)) return;
  if (s->buffer.get() != buffer) s->buffer = buffer;
  s->offset = offset;
  s->bound = true;
  s->op = self->op;
}

void set_offset(Encoder* self, std::uint64_t offset, std::uint64_t index) {
  constexpr const char* kWhat = "setBufferOffset:atIndex:";
  Slot* s = slot(self, index, kWhat);
  if (s == nullptr) return;
  if (!s->bound || !s->buffer)
    return report("unbound-buffer", "%s: no buffer is bound to index %llu%s", kWhat, number(index), who(*self).c_str());
  if (check_offset(self, *s->buffer, offset, index, kWhat)) s->offset = offset;
}

void set_buffers(Encoder* self, const void* const* buffers, const std::uint64_t* offsets, Range range) {
  for (std::uint64_t i = 0; i < range.length; ++i) set_buffer(self, buffers[i], offsets[i], range.location + i);
}

void set_bytes(Encoder* self, const void* bytes, std::uint64_t length, std::uint64_t index) {
  constexpr const char* kWhat = "setBytes:length:atIndex:";
  Slot* s = slot(self, index, kWhat);
  if (s == nullptr) return;
  s->bound = false;
  s->buffer = {};
  if (bytes == nullptr || length == 0 || length > kMaxBytes) {
    return report("set-bytes", "%s: %s at index %llu, where 1 to %llu bytes are allowed%s", kWhat,
                  bytes == nullptr ? "a null pointer" : (std::to_string(length) + " bytes").c_str(), number(index),
                  number(kMaxBytes), who(*self).c_str());
  }
  const auto* from = static_cast<const std::uint8_t*>(bytes);
  s->bytes.assign(from, from + length);
  s->bound = true;
  s->op = self->op;
}

void set_threadgroup_memory(Encoder* self, std::uint64_t length, std::uint64_t index) {
  constexpr const char* kWhat = "setThreadgroupMemoryLength:atIndex:";
  if (slot(self, index, kWhat) == nullptr) return;
  if (length % 16 != 0)
    return report("threadgroup-memory", "%s: %llu bytes are not a multiple of 16%s", kWhat, number(length),
                  who(*self).c_str());
  if (length > MFA_SIM_THREADGROUP_LIMIT) {
    return report("threadgroup-memory", "%s: %llu bytes exceed the limit of %d%s", kWhat, number(length),
                  MFA_SIM_THREADGROUP_LIMIT, who(*self).c_str());
  }
  self->bindings.threadgroup_memory[index] = length;
}

void dispatch_groups(Encoder* self, Size groups, Size threads) {
  if (!encoding(self, "dispatchThreadgroups:threadsPerThreadgroup:")) return;
  if (validate(self->bindings, groups, threads, self->op)) self->buffer->add(self->bindings, groups, threads);
}

void dispatch_threads(Encoder* self, Size grid, Size threads) {
  if (!encoding(self, "dispatchThreads:threadsPerThreadgroup:")) return;
  Size groups{};
  for (int i = 0; i < 3; ++i) {
    const std::uint64_t n = (&grid.width)[i], t = (&threads.width)[i];
    if (t > 0 && n % t != 0) {
      return report(
          "partial-threadgroup",
          "dispatchThreads: a grid of %llu threads in groups of %llu needs a partial group, which is not modelled%s",
          number(n), number(t), who(*self).c_str());
    }
    (&groups.width)[i] = t == 0 ? 0 : n / t;
  }
  dispatch_groups(self, groups, threads);
}

void barrier_scope(Encoder* self, std::uint64_t) { encoding(self, "memoryBarrierWithScope:"); }
void barrier_resources(Encoder* self, const void* const* resources, std::uint64_t count) {
  if (!encoding(self, "memoryBarrierWithResources:count:")) return;
  for (std::uint64_t i = 0; i < count; ++i)
    expect<Buffer>(resources[i], "MTLBuffer", "memoryBarrierWithResources:count:");
}
void use_resource(Encoder* self, const void* resource, std::uint64_t) {
  if (encoding(self, "useResource:usage:")) expect<Buffer>(resource, "MTLBuffer", "useResource:usage:");
}
std::uint64_t dispatch_type(Encoder* self) { return self->concurrent ? 1 : 0; }

void end_encoding(Encoder* self) {
  if (!encoding(self, "endEncoding")) return;
  if (self->shared) {
    return report("shared-encoder", "endEncoding on torch's encoder%s: torch goes on to use it, and ends it itself",
                  who(*self).c_str());
  }
  self->end();
}

void push_group(Encoder* self, const void* name) {
  if (encoding(self, "pushDebugGroup:") && expect<String>(name, "NSString", "pushDebugGroup:")) ++self->debug_groups;
}
void pop_group(Encoder* self) {  // destructors call it: never thrown
  if (self->debug_groups > 0)
    --self->debug_groups;
  else
    note("debug-group", "popDebugGroup without a pushDebugGroup%s", who(*self).c_str());
}
void signpost(Encoder* self, const void* name) {
  if (encoding(self, "insertDebugSignpost:")) expect<String>(name, "NSString", "insertDebugSignpost:");
}
void* get_label(Encoder* self) { return give_autoreleased(make<String>(self->label)); }
void set_label(Encoder* self, const void* label) { self->label = text_of(label, "setLabel:"); }
void* device(Encoder* self) { return lend(self->device()); }

}  // namespace

void Encoder::end() {
  if (debug_groups != 0)
    note("debug-group", "%s ends with %d open debug groups%s", describe().c_str(), debug_groups, who(*this).c_str());
  ended = true;
  buffer->open = nullptr;
  bindings = Bindings();
}

void Encoder::dispose() {
  if (!ended) {
    note("encoder-open", "%s%s is destroyed, but was never ended", describe().c_str(), who(*this).c_str());
    buffer->open = nullptr;
  }
  bindings = Bindings();
  buffer = {};
}

void define_encoder() {
  define("MTLComputeCommandEncoder")
      .method<&set_pipeline>("setComputePipelineState:")
      .method<&set_buffer>("setBuffer:offset:atIndex:")
      .method<&set_offset>("setBufferOffset:atIndex:")
      .method<&set_buffers>("setBuffers:offsets:withRange:")
      .method<&set_bytes>("setBytes:length:atIndex:")
      .method<&set_threadgroup_memory>("setThreadgroupMemoryLength:atIndex:")
      .method<&dispatch_groups>("dispatchThreadgroups:threadsPerThreadgroup:")
      .method<&dispatch_threads>("dispatchThreads:threadsPerThreadgroup:")
      .method<&barrier_scope>("memoryBarrierWithScope:")
      .method<&barrier_resources>("memoryBarrierWithResources:count:")
      .method<&use_resource>("useResource:usage:")
      .method<&dispatch_type>("dispatchType")
      .method<&end_encoding>("endEncoding")
      .method<&push_group>("pushDebugGroup:")
      .method<&pop_group>("popDebugGroup")
      .method<&signpost>("insertDebugSignpost:")
      .method<&get_label>("label")
      .method<&set_label>("setLabel:")
      .method<&device>("device");
}

}  // namespace mfa::driver
