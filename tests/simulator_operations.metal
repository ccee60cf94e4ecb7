// Kernels of test_simulator_msl.py that need more than one thread-wise expression.
#include <metal_stdlib>
using namespace metal;

constant int scale [[function_constant(7)]];
constant float offset [[function_constant(8)]];
constant bool has_extra [[function_constant(9)]];
constant int doubled = is_function_constant_defined(scale) ? 2 * scale : -1;

struct Parameters { int stride; uint x, y; int transpose; float value; };

template <typename T>
kernel void copy(const device T* source [[buffer(0)]], device T* target [[buffer(1)]], constant Parameters& p [[buffer(2)]]) {
  simdgroup_matrix<T, 8, 8> m;
  simdgroup_load(m, source, p.stride, ulong2(p.x, p.y), p.transpose != 0);
  simdgroup_store(m, target);
}
template <typename T>
kernel void scatter(const device T* source [[buffer(0)]], device T* target [[buffer(1)]], constant Parameters& p [[buffer(2)]]) {
  threadgroup T tile[512];
  simdgroup_matrix<T, 8, 8> m;
  simdgroup_load(m, source, 8);
  simdgroup_store(m, tile, p.stride, ulong2(p.x, p.y), p.transpose != 0);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(m, (const threadgroup T*)tile, p.stride, ulong2(p.x, p.y), false);
  simdgroup_store(m, target, 8);
}
template <typename T>
kernel void fill(device T* target [[buffer(0)]], constant Parameters& p [[buffer(1)]]) {
  simdgroup_store(make_filled_simdgroup_matrix<T, 8, 8>(T(p.value)), target, 8);
  simdgroup_store(simdgroup_matrix<T, 8, 8>(T(p.value)), target + 64, 8);
}
template <typename A, typename B, typename C, typename D>
kernel void multiply(const device A* a [[buffer(0)]], const device B* b [[buffer(1)]], const device C* c [[buffer(2)]],
                     device D* d [[buffer(3)]]) {
  simdgroup_matrix<A, 8, 8> ma;
  simdgroup_matrix<B, 8, 8> mb;
  simdgroup_matrix<C, 8, 8> mc;
  simdgroup_matrix<D, 8, 8> md;
  simdgroup_load(ma, a);
  simdgroup_load(mb, b);
  simdgroup_load(mc, c);
  simdgroup_multiply_accumulate(md, ma, mb, mc);
  simdgroup_store(md, d);
  simdgroup_multiply(md, ma, mb);
  simdgroup_store(md, d + 64);
}
#define INSTANTIATE(name, function, ...) template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;
#define MATRICES(suffix, T) INSTANTIATE("copy_" suffix, copy, T) INSTANTIATE("scatter_" suffix, scatter, T) INSTANTIATE("fill_" suffix, fill, T)
MATRICES("f32", float)
MATRICES("f16", half)
MATRICES("bf16", bfloat)
INSTANTIATE("multiply_f16_f16_f32_f32", multiply, half, half, float, float)
INSTANTIATE("multiply_f32_f16_f32_f32", multiply, float, half, float, float)
INSTANTIATE("multiply_bf16_bf16_f32_f32", multiply, bfloat, bfloat, float, float)
INSTANTIATE("multiply_f32_f32_f32_f32", multiply, float, float, float, float)
INSTANTIATE("multiply_f16_f16_f16_f16", multiply, half, half, half, half)
INSTANTIATE("multiply_bf16_f16_f32_bf16", multiply, bfloat, half, float, bfloat)

kernel void layout(device int* y [[buffer(0)]], const device float* x [[buffer(1)]], uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_float8x8 m;
  simdgroup_load(m, x);
  y[2 * lane] = int(reinterpret_cast<thread float2&>(m.thread_elements()).x);
  y[2 * lane + 1] = int(reinterpret_cast<thread float2&>(m.thread_elements()).y);
}
kernel void uninitialised(device float* y [[buffer(0)]]) {
  simdgroup_float8x8 m;
  simdgroup_store(m, y, 8);
}
kernel void atomics(device atomic_int* y [[buffer(0)]], device atomic_float* f [[buffer(1)]], device uint* w [[buffer(2)]],
                    uint i [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint count;
  if (i == 0) { atomic_store_explicit(&count, 0u, memory_order_relaxed); }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int k = i;
  atomic_fetch_add_explicit(&y[0], k, memory_order_relaxed);
  atomic_fetch_sub_explicit(&y[1], k, memory_order_relaxed);
  atomic_fetch_min_explicit(&y[2], k - 5, memory_order_relaxed);
  atomic_fetch_max_explicit(&y[3], k, memory_order_relaxed);
  atomic_fetch_or_explicit(&y[4], 1 << (k % 30), memory_order_relaxed);
  atomic_fetch_and_explicit(&y[5], ~(1 << (k % 30)), memory_order_relaxed);
  atomic_fetch_xor_explicit(&y[6], k, memory_order_relaxed);
  int expected = 0;
  if (atomic_compare_exchange_weak_explicit(&y[7], &expected, 1, memory_order_relaxed, memory_order_relaxed)) {
    atomic_fetch_add_explicit(&y[8], 1, memory_order_relaxed);
  }
  if (i == 9) { atomic_exchange_explicit(&y[9], 77, memory_order_relaxed); }
  atomic_fetch_add_explicit(&f[0], 0.5f, memory_order_relaxed);
  uint ticket = atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
  w[ticket] = 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 3) { w[64] = atomic_load_explicit(&count, memory_order_relaxed); }
}
kernel void positions(device uint* y, uint3 gid [[thread_position_in_grid]], ushort3 tid [[thread_position_in_threadgroup]],
                      uint2 group [[threadgroup_position_in_grid]], uint flat [[thread_index_in_threadgroup]],
                      ushort lane [[thread_index_in_simdgroup]], ushort simd [[simdgroup_index_in_threadgroup]],
                      uint3 groups [[threadgroups_per_grid]], uint3 size [[threads_per_threadgroup]],
                      uint3 grid [[threads_per_grid]], uint simds [[simdgroups_per_threadgroup]],
                      uint width [[threads_per_simdgroup]]) {
  uint index = (gid.z * grid.y + gid.y) * grid.x + gid.x;
  bool ok = gid.x == group.x * size.x + tid.x && gid.y == group.y * size.y + tid.y && width == 32;
  ok = ok && flat == (tid.z * size.y + tid.y) * size.x + tid.x && flat == simd * 32u + lane && grid.x == groups.x * size.x;
  y[index] = ok ? flat + 1000 * simds : 0;
}
kernel void constants(device float* y [[buffer(0)]], const device float* extra [[buffer(1), function_constant(has_extra)]],
                      uint i [[thread_index_in_threadgroup]]) {
  float v = scale * offset + doubled;
  if (has_extra) { v += extra[i]; }
  y[i] = v;
}
kernel void dynamic(device float* y [[buffer(0)]], threadgroup float* a [[threadgroup(0)]], threadgroup float4* b [[threadgroup(1)]],
                    uint i [[thread_index_in_threadgroup]]) {
  a[i] = i;
  b[i] = float4(i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[63 - i] + b[i ^ 1].w;
}
