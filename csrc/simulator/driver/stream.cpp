#include "stream.h"

#include <stdexcept>

#include "findings.h"
#include "runtime.h"
#include "settings.h"

namespace mfa::driver {
namespace {

class Pool {
 public:
  Pool() : pool_(push_pool()) {}
  ~Pool() { pop_pool(pool_); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

 private:
  void* pool_;
};

template <typename Work>
void sync(Queue& queue, Work& work) {
  queue.sync(&work, [](void* context) { (*static_cast<Work*>(context))(); });
}

}  // namespace

Stream::Stream() : queue_(make<Queue>("metal gpu stream")), commands_(make<CommandQueue>(torch_device())) {}

void Stream::run(void* context, void (*work)(void*)) {
  auto block = [&] {
    const Pool pool;
    ++op_;
    if (encoder_) encoder_->op = op_;
    work(context);
    if (!encoder_ || encoder_->debug_groups == 0) return;
    note("debug-group", "an op leaves %d debug groups open on torch's encoder", encoder_->debug_groups);
    encoder_->debug_groups = 0;
  };
  sync(*queue_, block);
}

void* Stream::encoder() {
  if (!queue_->is_current()) {
    report("off-queue", "commandEncoder() is called off the stream's queue: other threads encode at the same time");
    return nullptr;
  }
  if (!encoder_) {
    buffer_ = make<CommandBuffer>(commands_.get());
    encoder_ = make<Encoder>(buffer_.get());
    buffer_->open = encoder_.get();
    encoder_->shared = true;
    encoder_->op = op_;
  }
  return lend(encoder_.get());
}

void Stream::synchronize() {
  auto block = [&] {
    if (!encoder_) return;
    encoder_->end();
    encoder_ = {};
    const Ref<CommandBuffer> buffer = std::move(buffer_);
    buffer->status = CommandBuffer::committed;
    buffer->run();
    if (buffer->status == CommandBuffer::failed && raises()) throw std::runtime_error(buffer->error);
  };
  sync(*queue_, block);
}

void Stream::settle() {
  if (execution() == Execution::lazy) return synchronize();
  auto nothing = [] {};
  sync(*queue_, nothing);
}

Stream& default_stream() {
  static auto* const stream = [] {
    class_named("NSObject");
    call.caller = nullptr;
    return new Stream;
  }();
  return *stream;
}

}  // namespace mfa::driver
