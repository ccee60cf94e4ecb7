// What translate.py writes calls to: an entry point per instantiated kernel, function constants, threadgroup variables.
#pragma once

#pragma clang force_cuda_host_device end

// By value, so that the launch carries them: an address by buffer index.
struct mfa_sim_arguments {
  void* buffers[31];
};

// Function constants by index, set by the host before a launch.
extern "C" __attribute__((__constant__)) uint8_t mfa_function_constants[64] = {};

namespace mfa_sim {

template <typename T, int kIndex>
struct FunctionConstant {
  static_assert(kIndex >= 0 && kIndex < 64, "function constant index out of range");
  MFA_SIM_DEVICE MFA_SIM_INLINE operator T() const { return T(mfa_function_constants[kIndex]); }
};

namespace builtin {
#define MFA_SIM_POSITION(name, x, y, z)                                                                \
  struct name {                                                                                       \
    MFA_SIM_DEVICE MFA_SIM_INLINE static uint3 of() { return uint3{uint(x), uint(y), uint(z)}; }       \
  };
#define MFA_SIM_AXIS(prefix, axis) __nvvm_read_ptx_sreg_##prefix##_##axis()
#define MFA_SIM_XYZ(prefix) MFA_SIM_AXIS(prefix, x), MFA_SIM_AXIS(prefix, y), MFA_SIM_AXIS(prefix, z)
#define MFA_SIM_POSITIONS(name, ...) MFA_SIM_POSITION(name, __VA_ARGS__)
MFA_SIM_POSITIONS(thread_position_in_threadgroup, MFA_SIM_XYZ(tid))
MFA_SIM_POSITIONS(threads_per_threadgroup, MFA_SIM_XYZ(ntid))
MFA_SIM_POSITIONS(threadgroup_position_in_grid, MFA_SIM_XYZ(ctaid))
MFA_SIM_POSITIONS(threadgroups_per_grid, MFA_SIM_XYZ(nctaid))
// Threadgroups are one-dimensional here.
MFA_SIM_POSITION(thread_position_in_grid,
                 MFA_SIM_AXIS(ctaid, x) * MFA_SIM_AXIS(ntid, x) + MFA_SIM_AXIS(tid, x), 0, 0)
MFA_SIM_POSITION(thread_index_in_threadgroup, MFA_SIM_AXIS(tid, x), 0, 0)
MFA_SIM_POSITION(thread_index_in_simdgroup, MFA_SIM_AXIS(tid, x) % 32, 0, 0)
MFA_SIM_POSITION(simdgroup_index_in_threadgroup, MFA_SIM_AXIS(tid, x) / 32, 0, 0)
MFA_SIM_POSITION(simdgroups_per_threadgroup, MFA_SIM_AXIS(ntid, x) / 32, 0, 0)
MFA_SIM_POSITION(threads_per_simdgroup, 32, 0, 0)
#undef MFA_SIM_POSITION
#undef MFA_SIM_POSITIONS
#undef MFA_SIM_AXIS
#undef MFA_SIM_XYZ
}  // namespace builtin

constexpr int kNextBuffer = -2;

template <int kIndex>
struct BufferSlot {
  template <typename P>
  MFA_SIM_DEVICE MFA_SIM_INLINE static P get(const mfa_sim_arguments& arguments) {
    if constexpr (__is_pointer(P)) {
      return (P)arguments.buffers[kIndex];
    } else {
      return *(__remove_reference_t(P)*)arguments.buffers[kIndex];
    }
  }
};
template <typename Builtin>
struct BuiltinSlot {
  template <typename P>
  MFA_SIM_DEVICE MFA_SIM_INLINE static P get(const mfa_sim_arguments&) {
    const uint3 x = Builtin::of();
    if constexpr (size_of<P> == 3) {
      return P{element_of<P>(x.x), element_of<P>(x.y), element_of<P>(x.z)};
    } else {
      return P(x.x);
    }
  }
};

template <auto kFunction, typename... S>
struct Entry;
template <typename... P, void (*kFunction)(P...), typename... S>
struct Entry<kFunction, S...> {
  MFA_SIM_DEVICE MFA_SIM_INLINE static void run(const mfa_sim_arguments& arguments) {
    kFunction(S::template get<P>(arguments)...);
  }
};

}  // namespace mfa_sim
