#include "queue.h"

#include <stdexcept>

#include "encoder.h"
#include "findings.h"
#include "runtime.h"
#include "settings.h"

namespace mfa::driver {
namespace {

void* command_buffer(CommandQueue* self) { return give_autoreleased(make<CommandBuffer>(self)); }
void* command_buffer_with(CommandQueue* self, const void*) { return command_buffer(self); }
void* device_of_queue(CommandQueue* self) { return lend(self->device); }
void* device_of_buffer(CommandBuffer* self) { return lend(self->queue->device); }
void* queue_label(CommandQueue* self) { return give_autoreleased(make<String>(self->label)); }
void set_queue_label(CommandQueue* self, const void* label) { self->label = text_of(label, "setLabel:"); }

void* encoder(CommandBuffer* self) {
  if (self->status >= CommandBuffer::committed) {
    report("after-commit", "an encoder is asked of %s, which was committed", self->describe().c_str());
    return nullptr;
  }
  if (self->open != nullptr) {
    report("two-encoders", "an encoder is asked of %s while %s still encodes to it", self->describe().c_str(),
           self->open->describe().c_str());
    return nullptr;
  }
  auto* e = make<Encoder>(self);
  self->open = e;
  return give_autoreleased(e);
}
void* encoder_with_type(CommandBuffer* self, std::uint64_t type) {
  void* handle = encoder(self);
  if (handle != nullptr) self->open->concurrent = type == 1;
  return handle;
}
void* encoder_with_descriptor(CommandBuffer* self, const void*) { return encoder(self); }

void commit(CommandBuffer* self) {
  if (self->status >= CommandBuffer::committed) {
    return report("after-commit", "%s is committed a second time", self->describe().c_str());
  }
  if (self->open != nullptr) {
    return report("encoder-open", "%s is committed, but %s was never ended", self->describe().c_str(),
                  self->open->describe().c_str());
  }
  self->status = CommandBuffer::committed;
  {
    const std::lock_guard guard(self->queue->mutex);
    self->queue->committed.emplace_back(self);
  }
  for (const HeldBlock& handler : self->scheduled_handlers) handler(self->handle());
  if (execution() != Execution::lazy) self->queue->run_until(self);
}
void enqueue(CommandBuffer* self) {
  if (self->status == CommandBuffer::not_enqueued) self->status = CommandBuffer::enqueued;
}
void wait(CommandBuffer* self) {
  if (self->status < CommandBuffer::committed) {
    return report("deadlock", "waitUntilCompleted on %s, which was not committed: on a Mac this never returns",
                  self->describe().c_str());
  }
  self->queue->run_until(self);
  if (self->status == CommandBuffer::failed && raises()) throw std::runtime_error(self->error);
}
void wait_scheduled(CommandBuffer* self) {
  if (self->status < CommandBuffer::committed)
    report("deadlock", "waitUntilScheduled on %s, which was not committed", self->describe().c_str());
}
std::uint64_t status(CommandBuffer* self) { return self->status; }
void* error(CommandBuffer* self) {
  return self->error.empty() ? nullptr : give_autoreleased(make<Error>("MTLCommandBufferErrorDomain", 1, self->error));
}
void add_completed(CommandBuffer* self, const void* block) {
  if (self->status >= CommandBuffer::committed)
    return report("after-commit", "addCompletedHandler: on a committed %s", self->describe().c_str());
  self->completed_handlers.emplace_back(block);
}
void add_scheduled(CommandBuffer* self, const void* block) {
  if (self->status >= CommandBuffer::committed)
    return report("after-commit", "addScheduledHandler: on a committed %s", self->describe().c_str());
  self->scheduled_handlers.emplace_back(block);
}
double no_time(CommandBuffer*) { return 0; }  // time is not modelled
void* queue_of(CommandBuffer* self) { return lend(self->queue.get()); }
void* buffer_label(CommandBuffer* self) { return give_autoreleased(make<String>(self->label)); }
void set_buffer_label(CommandBuffer* self, const void* label) { self->label = text_of(label, "setLabel:"); }
bool retained_references(CommandBuffer*) { return true; }

}  // namespace

void CommandQueue::dispose() { run_until(nullptr); }

void CommandQueue::run_until(const CommandBuffer* last) {
  while (true) {
    Ref<CommandBuffer> next;
    {
      const std::lock_guard guard(mutex);
      if (committed.empty() || (last != nullptr && last->status >= CommandBuffer::completed)) return;
      next = committed.front();
      committed.pop_front();
    }
    next->run();
  }
}

void CommandBuffer::add(const Bindings& bindings, const Size& groups, const Size& threads) {
  const Execution execution = driver::execution();
  if (execution == Execution::nothing) return;
  if (execution == Execution::lazy) {
    dispatches.push_back({bindings, groups, threads});
  } else if (const auto failure = execute(bindings, groups, threads)) {
    if (!raises()) error = *failure;
    report("execution", "%s", failure->c_str());
  }
}

void CommandBuffer::run() {
  for (const Dispatch& dispatch : dispatches) {
    const auto failure = execute(dispatch.bindings, dispatch.groups, dispatch.threads);
    if (!failure) continue;
    error = note("execution", "%s", failure->c_str());
    break;  // the GPU gives the command buffer up
  }
  dispatches.clear();
  status = error.empty() ? completed : failed;
  for (const HeldBlock& handler : completed_handlers) handler(handle());
  completed_handlers.clear();
  scheduled_handlers.clear();
}

void define_queue() {
  define("MTLCommandQueue")
      .method<&command_buffer>("commandBuffer")
      .method<&command_buffer_with>("commandBufferWithDescriptor:")
      .method<&device_of_queue>("device")
      .method<&queue_label>("label")
      .method<&set_queue_label>("setLabel:");
  define("MTLCommandBuffer")
      .method<&encoder>("computeCommandEncoder")
      .method<&encoder_with_type>("computeCommandEncoderWithDispatchType:")
      .method<&encoder_with_descriptor>("computeCommandEncoderWithDescriptor:")
      .method<&commit>("commit")
      .method<&enqueue>("enqueue")
      .method<&wait>("waitUntilCompleted")
      .method<&wait_scheduled>("waitUntilScheduled")
      .method<&status>("status")
      .method<&error>("error")
      .method<&add_completed>("addCompletedHandler:")
      .method<&add_scheduled>("addScheduledHandler:")
      .method<&no_time>("GPUStartTime")
      .method<&no_time>("GPUEndTime")
      .method<&no_time>("kernelStartTime")
      .method<&no_time>("kernelEndTime")
      .method<&queue_of>("commandQueue")
      .method<&device_of_buffer>("device")
      .method<&buffer_label>("label")
      .method<&set_buffer_label>("setLabel:")
      .method<&retained_references>("retainedReferences");
}

}  // namespace mfa::driver
