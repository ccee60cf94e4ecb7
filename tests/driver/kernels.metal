// Kernels for the driver's own tests: an argument of each kind, constants of several types, both kinds of threadgroup
// memory.
#include <metal_stdlib>
using namespace metal;

constant bool doubled [[function_constant(0)]];
constant bool has_extra [[function_constant(1)]];
constant uint power [[function_constant(2)]];

struct Params {
  uint count;
  float scale;
};

// output[i] = (2) input[i]^power * scale (+ extra[i])
[[max_total_threads_per_threadgroup(64)]] kernel void scale(
    const device float* input [[buffer(0)]], device float* output [[buffer(1)]], constant Params& params [[buffer(2)]],
    const device float* extra [[buffer(3), function_constant(has_extra)]], uint i [[thread_position_in_grid]]) {
  if (i >= params.count) return;
  float value = params.scale;
  for (uint k = 0; k < power; ++k) value *= input[i];
  if (doubled) value *= 2.0f;
  if (has_extra) value += extra[i];
  output[i] = value;
}

// Reverses each threadgroup's 32 values through threadgroup memory: 24 KiB static, and what the host adds.
kernel void reverse(const device float* input [[buffer(0)]], device float* output [[buffer(1)]],
                    threadgroup float* dynamic [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                    uint lane [[thread_index_in_threadgroup]]) {
  threadgroup float fixed[6144];
  fixed[lane] = input[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  dynamic[lane] = fixed[31 - lane];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  output[i] = dynamic[lane];
}
