// What translate_cuda.py writes: an entry point per kernel, function constants, threadgroup variables.
#pragma once

// By value, so that the launch carries them: an address by buffer index.
struct mfa_sim_arguments {
  void* buffers[31];
};

namespace mfa_sim {

// Indices of the function constants that are true in this pipeline; all of them are bools.
constexpr int kTrueConstants[] = {-1 MFA_SIM_TRUE_CONSTANTS};

constexpr bool is_true(int index) {
  for (int each : kTrueConstants) {
    if (each == index) return true;
  }
  return false;
}

template <typename T, int kIndex>
struct FunctionConstant {
  static_assert(__is_same(T, bool), "function constants are bools here");
  MFA_SIM_INLINE constexpr operator T() const { return is_true(kIndex); }
};

namespace builtin {
#define MFA_SIM_POSITION(name, x, y, z)                                           \
  struct name {                                                                   \
    MFA_SIM_INLINE static uint3 of() { return uint3{uint(x), uint(y), uint(z)}; } \
  };
#define MFA_SIM_XYZ(of) of(x), of(y), of(z)
#define MFA_SIM_POSITIONS(name, ...) MFA_SIM_POSITION(name, __VA_ARGS__)
MFA_SIM_POSITIONS(thread_position_in_threadgroup, MFA_SIM_XYZ(MFA_SIM_THREAD))
MFA_SIM_POSITIONS(threads_per_threadgroup, MFA_SIM_XYZ(MFA_SIM_THREADS))
MFA_SIM_POSITIONS(threadgroup_position_in_grid, MFA_SIM_XYZ(MFA_SIM_THREADGROUP))
MFA_SIM_POSITIONS(threadgroups_per_grid, MFA_SIM_XYZ(MFA_SIM_THREADGROUPS))
// Threadgroups are launched one-dimensional.
MFA_SIM_POSITION(thread_position_in_grid, MFA_SIM_THREADGROUP(x) * MFA_SIM_THREADS(x) + MFA_SIM_THREAD(x), 0, 0)
MFA_SIM_POSITION(thread_index_in_threadgroup, MFA_SIM_THREAD(x), 0, 0)
MFA_SIM_POSITION(thread_index_in_simdgroup, hardware::lane(), 0, 0)
MFA_SIM_POSITION(simdgroup_index_in_threadgroup, hardware::simdgroup(), 0, 0)
MFA_SIM_POSITION(simdgroups_per_threadgroup, MFA_SIM_THREADS(x) / 32, 0, 0)
MFA_SIM_POSITION(threads_per_simdgroup, 32, 0, 0)
#undef MFA_SIM_POSITION
#undef MFA_SIM_POSITIONS
#undef MFA_SIM_XYZ
}  // namespace builtin

constexpr int kNextBuffer = -2;

template <int kIndex>
struct BufferSlot {
  template <typename P>
  MFA_SIM_INLINE static P get(const mfa_sim_arguments& arguments) {
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
  MFA_SIM_INLINE static P get(const mfa_sim_arguments&) {
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
  MFA_SIM_INLINE static void run(const mfa_sim_arguments& arguments) { kFunction(S::template get<P>(arguments)...); }
};

// A threadgroup variable as the kernel knows it, of the storage that the translation declares.
template <typename T, typename Storage>
MFA_SIM_INLINE T& threadgroup_variable(Storage& storage) {
  return *(__remove_reference_t(T)*)&storage;
}

}  // namespace mfa_sim
