// What translate.py writes calls to: kernels with their parameters, function constants, threadgroup variables.
#pragma once

namespace mfa_sim {

// ---- built-in inputs: a value of the lane's position, as the type that the kernel declares

namespace builtin {
#define MFA_SIM_BUILTIN MFA_SIM_UNCHECKED __attribute__((nodebug)) static
#define MFA_SIM_BUILTINS(_)                                          \
  _(thread_position_in_grid, thread_position_in_grid)                \
  _(threads_per_grid, threads_per_grid)                              \
  _(threadgroup_position_in_grid, threadgroup_position_in_grid)      \
  _(threadgroups_per_grid, threadgroups_per_grid)                    \
  _(thread_position_in_threadgroup, thread_position_in_threadgroup)  \
  _(threads_per_threadgroup, threads_per_threadgroup)                \
  _(dispatch_threads_per_threadgroup, threads_per_threadgroup)       \
  _(thread_index_in_threadgroup, thread_index_in_threadgroup)        \
  _(thread_index_in_simdgroup, thread_index_in_simdgroup)            \
  _(simdgroup_index_in_threadgroup, simdgroup_index_in_threadgroup)  \
  _(simdgroups_per_threadgroup, simdgroups_per_threadgroup)          \
  _(dispatch_simdgroups_per_threadgroup, simdgroups_per_threadgroup) \
  _(threads_per_simdgroup, threads_per_simdgroup)                    \
  _(thread_execution_width, threads_per_simdgroup)
#define MFA_SIM_FIELD(name, field)                                         \
  struct name {                                                            \
    MFA_SIM_BUILTIN auto of(const mfa_sim_position& p) { return p.field; } \
  };
MFA_SIM_BUILTINS(MFA_SIM_FIELD)
#undef MFA_SIM_FIELD
#undef MFA_SIM_BUILTINS
struct thread_index_in_quadgroup {
  MFA_SIM_BUILTIN uint of(const mfa_sim_position& p) { return p.thread_index_in_threadgroup % 4; }
};
struct quadgroup_index_in_threadgroup {
  MFA_SIM_BUILTIN uint of(const mfa_sim_position& p) { return p.thread_index_in_threadgroup / 4; }
};
struct quadgroups_per_threadgroup {
  MFA_SIM_BUILTIN uint of(const mfa_sim_position& p) { return p.simdgroups_per_threadgroup * 8; }
};
#undef MFA_SIM_BUILTIN
}  // namespace builtin

template <typename P>
MFA_SIM_UNCHECKED MFA_SIM_INLINE P position_as(uint x) {
  static_assert(size_of<P> == 0, "this built-in is a scalar");
  return static_cast<P>(x);
}
template <typename P>
MFA_SIM_UNCHECKED MFA_SIM_INLINE P position_as(mfa_sim_uint3 v) {
  if constexpr (size_of<P> == 0) {
    return static_cast<P>(v.x);
  } else if constexpr (size_of<P> == 2) {
    return construct<P>(v.x, v.y);
  } else {
    static_assert(size_of<P> == 3, "this built-in has one, two or three components");
    return construct<P>(v.x, v.y, v.z);
  }
}

// ---- parameters

constexpr int kNextBuffer = -2;  // a device or constant parameter without an attribute

// What a reference parameter that is switched off refers to: the compiler may read a reference early.
template <size_t kSize>
struct Absent {
  alignas(64) static constexpr char bytes[kSize] = {};
};

template <int kIndex>
struct BufferSlot {
  static_assert(kIndex == kNextBuffer || (kIndex >= 0 && kIndex < MFA_SIM_BUFFERS), "buffer index out of range");
  static constexpr int kKind = MFA_SIM_BUFFER, kAt = kIndex;
  template <typename P>
  MFA_SIM_UNCHECKED MFA_SIM_INLINE static P get(void* address, const mfa_sim_position&) {
    static_assert(__is_pointer(P) || __is_lvalue_reference(P), "a buffer is a pointer or a reference");
    if constexpr (__is_pointer(P)) {
      return (P)address;
    } else {
      using T = __remove_reference_t(P);
      return *(T*)(address == nullptr ? (void*)Absent<sizeof(T)>::bytes : address);
    }
  }
};
template <int kIndex>
struct ThreadgroupSlot {
  static_assert(kIndex >= 0 && kIndex < MFA_SIM_BUFFERS, "threadgroup index out of range");
  static constexpr int kKind = MFA_SIM_THREADGROUP, kAt = kIndex;
  template <typename P>
  MFA_SIM_UNCHECKED MFA_SIM_INLINE static P get(void* address, const mfa_sim_position&) {
    return (P)address;
  }
};
template <typename Builtin>
struct BuiltinSlot {
  static constexpr int kKind = MFA_SIM_BUILTIN, kAt = -1;
  template <typename P>
  MFA_SIM_UNCHECKED MFA_SIM_INLINE static P get(void*, const mfa_sim_position& position) {
    static_assert(metal::is_integral_v<element_of<P>>, "a built-in is declared as ushort, uint or a vector of them");
    return position_as<P>(Builtin::of(position));
  }
};

template <typename... S>
constexpr bool are_distinct() {
  const int kinds[] = {S::kKind..., 0}, indices[] = {S::kAt..., 0};
  for (unsigned i = 0; i < sizeof...(S); ++i) {
    for (unsigned j = 0; j < i; ++j) {
      if (kinds[i] == kinds[j] && indices[i] == indices[j] && indices[i] >= 0) return false;
    }
  }
  return true;
}

// A parameter as it is written in the kernel.
struct Written {
  const char* name;
  const char* type;
  const char* function_constant;
};

template <typename P>
constexpr size_t pointee_size() {
  using T = __remove_reference_t(P);
  if constexpr (__is_lvalue_reference(P)) {
    return sizeof(T);
  } else if constexpr (__is_pointer(P) && !__is_void(__remove_pointer(P))) {
    return sizeof(__remove_pointer(P));
  } else {
    return 0;
  }
}

template <typename P>
constexpr bool is_writable() {
  using T = __remove_pointer(__remove_reference_t(P));
  return (__is_pointer(P) || __is_lvalue_reference(P)) && !__is_const(T);
}

template <int... I>
struct Indices {};
template <typename, int... I>
using IndicesOf = Indices<I...>;

template <typename Function, typename... S>
struct Kernel;

template <typename... P, typename... S>
struct Kernel<void (*)(P...), S...> {
  static constexpr int kCount = sizeof...(P);
  static_assert(are_distinct<S...>(), "two parameters share a buffer or threadgroup index");

  template <void (*kFunction)(P...), int... I>
  MFA_SIM_UNCHECKED static void call(void* const* arguments, Indices<I...>) {
    const mfa_sim_position& position = *mfa_sim_current_position();
    kFunction(S::template get<P>(arguments[I], position)...);
  }
  template <void (*kFunction)(P...)>
  MFA_SIM_UNCHECKED static void enter(void* const* arguments) {
    call<kFunction>(arguments, __make_integer_seq<IndicesOf, int, kCount>{});
  }

  static void describe(mfa_sim_parameter* parameters, const Written* written) {
    int next_buffer = 0, i = 0;
    ((parameters[i] = {S::kKind, S::kAt == kNextBuffer ? next_buffer : S::kAt, written[i].name, written[i].type,
                       is_writable<P>(), pointee_size<P>(), __is_lvalue_reference(P), written[i].function_constant},
      next_buffer = S::kKind == MFA_SIM_BUFFER ? parameters[i].index + 1 : next_buffer, ++i),
     ...);
  }
};

// One instantiated kernel, registered when the library is loaded.
template <auto kFunction, typename... S>
struct Registration {
  using Described = Kernel<decltype(kFunction), S...>;

  mfa_sim_parameter parameters[sizeof...(S) + 1];
  mfa_sim_kernel kernel;

  template <int N>
  __attribute__((nodebug)) Registration(const char* name, const Written (&written)[N], int max_threads,
                                        const char* file, int line) {
    Described::describe(parameters, written);
    kernel = {name, &Described::template enter<kFunction>, parameters, sizeof...(S), max_threads, file, line};
    mfa_sim_register_kernel(&kernel);
  }
};

// ---- function constants

// One per type and index, shared by every file of a library.
template <typename T, int kIndex>
struct ConstantStorage {
  static T value;
  static uint8_t is_set;
};
template <typename T, int kIndex>
T ConstantStorage<T, kIndex>::value{};
template <typename T, int kIndex>
uint8_t ConstantStorage<T, kIndex>::is_set = 0;

// `const`: the same for a whole dispatch, so that reads leave loops and never count as memory accesses.
template <typename T, int kIndex>
inline MFA_SIM_UNCHECKED __attribute__((noinline, const)) T constant_value() {
  return *const_cast<volatile T*>(&ConstantStorage<T, kIndex>::value);
}
template <typename T, int kIndex>
inline MFA_SIM_UNCHECKED __attribute__((noinline, const)) bool constant_is_set() {
  return *const_cast<volatile uint8_t*>(&ConstantStorage<T, kIndex>::is_set) != 0;
}

// What `constant T x [[function_constant(i)]];` declares.
template <typename T, int kIndex>
struct FunctionConstant {
  MFA_SIM_INLINE operator T() const { return constant_value<T, kIndex>(); }
};

template <typename T, int kIndex>
struct ConstantRegistration {
  static_assert(kIndex >= 0 && kIndex < 65536, "function constant index out of range");
  mfa_sim_function_constant entry;
  __attribute__((nodebug)) ConstantRegistration(const char* name, const char* type) {
    using Storage = ConstantStorage<T, kIndex>;
    entry = {name, kIndex, &Storage::value, sizeof(T), type, &Storage::is_set};
    mfa_sim_register_function_constant(&entry);
  }
};

// ---- threadgroup variables: typed references into the engine's arena

template <typename T>
MFA_SIM_INLINE T& threadgroup_variable(const char* id, const char* name, MFA_SIM_SITE) {
  return *(__remove_reference_t(T)*)mfa_sim_threadgroup_variable(id, sizeof(T), alignof(T), name, MFA_SIM_HERE);
}

}  // namespace mfa_sim

namespace metal {
template <typename T, int kIndex>
MFA_SIM_INLINE bool mfa_sim_is_defined(::mfa_sim::FunctionConstant<T, kIndex>) {
  return ::mfa_sim::constant_is_set<T, kIndex>();
}
}  // namespace metal
#define is_function_constant_defined(x) (::metal::mfa_sim_is_defined(x))
