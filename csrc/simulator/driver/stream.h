// What torch's MPSStream is to an op: a serial queue, and one encoder on it that stays open from op to op.
#pragma once

#include "dispatch.h"
#include "encoder.h"

namespace mfa::driver {

class Stream {
 public:
  Stream();

  // Runs `work` on the stream's queue, in an autorelease pool, as one op.
  void run(void* context, void (*work)(void*));
  void* encoder();     // on the queue only; the client's handle, or null
  void synchronize();  // ends, commits and waits
  void settle();       // the same if anything waits to be run; always through the queue

 private:
  Ref<Queue> queue_;
  Ref<CommandQueue> commands_;
  Ref<CommandBuffer> buffer_;
  Ref<Encoder> encoder_;
  std::uint64_t op_ = 0;
};

Stream& default_stream();

}  // namespace mfa::driver
