// The stand-in `mps` device's memory. As on macOS, a storage's data pointer is the id<MTLBuffer>, and never an address.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace mfa::stand_in {

inline const c10::Device kDevice(c10::kMPS, 0);

c10::Allocator& allocator();
std::size_t allocated_bytes();
std::size_t allocation_count();  // ever
void empty_cache();

// The same elements as a CPU tensor; a CPU tensor itself. Waits for the stream.
at::Tensor on_host(const at::Tensor& tensor);

// Makes the storage hold at least `bytes`, keeping its contents.
void grow(const c10::Storage& storage, std::size_t bytes);

// Before the host touches what ops may have written: nothing to do while dispatches run at once, but a Mac's op goes
// through the stream's queue even so, and deadlocks when it is called from a block on it.
void settle();
void synchronize();

}  // namespace mfa::stand_in
