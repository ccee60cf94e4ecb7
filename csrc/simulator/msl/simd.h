// <metal_compute>, <metal_simdgroup>, <metal_quadgroup>: barriers and everything that lanes do together.
#pragma once

namespace metal {
enum class mem_flags : uint {
  mem_none = MFA_SIM_MEM_NONE,
  mem_device = MFA_SIM_MEM_DEVICE,
  mem_threadgroup = MFA_SIM_MEM_THREADGROUP,
  mem_texture = MFA_SIM_MEM_TEXTURE,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) & static_cast<uint>(b));
}
}  // namespace metal

namespace mfa_sim {

constexpr int kLanes = MFA_SIM_LANES;

// What a lane brings to a collective and takes away.
template <typename T>
struct Exchange {
  T value, fill, result;
  int operand;
};

template <typename T>
MFA_SIM_UNCHECKED inline T poison() {
  T x;
  __builtin_memset(&x, 0xff, sizeof x);
  return x;
}

// ---- shuffles: Source::of(lane, operand) is the lane whose value `lane` gets, or -1.

template <typename T, typename Source>
MFA_SIM_UNCHECKED void shuffle_lanes(void* const* arguments) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] == nullptr) continue;
    auto& mine = *static_cast<Exchange<T>*>(arguments[lane]);
    const int source = Source::of(lane, mine.operand);
    const bool is_there = source >= 0 && source < kLanes && arguments[source] != nullptr;
    mine.result = is_there ? static_cast<Exchange<T>*>(arguments[source])->value : poison<T>();
  }
}

// shuffle_and_fill takes the lanes beyond the end from `fill`, counted within blocks of `operand >> 8` lanes.
template <typename T, bool kUp>
MFA_SIM_UNCHECKED void fill_lanes(void* const* arguments) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] == nullptr) continue;
    auto& mine = *static_cast<Exchange<T>*>(arguments[lane]);
    const int delta = mine.operand & 0xff, modulo = mine.operand >> 8, base = lane - lane % modulo;
    const int shifted = lane % modulo + (kUp ? -delta : delta);
    const bool is_filled = shifted < 0 || shifted >= modulo;
    const int source = base + (shifted + modulo) % modulo;
    if (arguments[source] == nullptr) {
      mine.result = poison<T>();
    } else {
      const auto& theirs = *static_cast<Exchange<T>*>(arguments[source]);
      mine.result = is_filled ? theirs.fill : theirs.value;
    }
  }
}

template <typename T>
MFA_SIM_OUTLINED T exchange(mfa_sim_operation operation, T value, T fill, int operand, int cls, uint64_t key,
                            const char* name, const char* file, int line) {
#ifdef MFA_SIM_STATIC
  T result;
  if (cls == MFA_SIM_SHUFFLE) {
    __asm__("shuffle %0" : "=x"(result) : "x"(value));
  } else {
    __asm__("reduce %0" : "=x"(result) : "x"(value));
  }
  return result;
#else
  Exchange<T> e;
  e.value = value;
  e.fill = fill;
  e.operand = operand;
  mfa_sim_collective(operation, &e, cls, key, name, file, line);
  return e.result;
#endif
}

template <int kGroupSize>
struct Direct {
  static constexpr int kGroup = kGroupSize;
  MFA_SIM_UNCHECKED static int of(int lane, int operand) {
    return operand < 0 || operand >= kGroup ? -1 : lane - lane % kGroup + operand;
  }
};
template <int kGroupSize>
struct Xor {
  static constexpr int kGroup = kGroupSize;
  MFA_SIM_UNCHECKED static int of(int lane, int operand) { return operand < kGroup ? lane ^ operand : -1; }
};
template <int kGroupSize, int kSign>
struct Shift {
  static constexpr int kGroup = kGroupSize;
  MFA_SIM_UNCHECKED static int of(int lane, int operand) {
    const int inside = lane % kGroup + kSign * operand;
    return inside < 0 || inside >= kGroup ? -1 : lane - lane % kGroup + inside;
  }
};
template <int kGroupSize, int kSign>
struct Rotate {
  static constexpr int kGroup = kGroupSize;
  MFA_SIM_UNCHECKED static int of(int lane, int operand) {
    return lane - lane % kGroup + (lane % kGroup + kSign * (operand % kGroup) + kGroup) % kGroup;
  }
};

// ---- reductions and scans over groups of kGroup lanes; a missing lane is skipped.

struct Sum {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Product {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return static_cast<T>(a * b);
  }
};
struct Minimum {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return metal::min(a, b);
  }
};
struct Maximum {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return metal::max(a, b);
  }
};
struct And {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct ExclusiveOr {
  template <typename T>
  MFA_SIM_UNCHECKED static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

// The order of a butterfly (xor 1, 2, 4, 8, 16), of which every lane gets the same bits.
template <typename T, typename Operation, int kGroup>
MFA_SIM_UNCHECKED void reduce_lanes(void* const* arguments) {
  T values[kLanes];
  bool has[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    has[lane] = arguments[lane] != nullptr;
    if (has[lane]) values[lane] = static_cast<Exchange<T>*>(arguments[lane])->value;
  }
  for (int step = 1; step < kGroup; step *= 2) {
    for (int lane = 0; lane < kLanes; lane += 2 * step) {
      const int other = lane + step;
      if (!has[other]) continue;
      values[lane] = has[lane] ? Operation::apply(values[lane], values[other]) : values[other];
      has[lane] = true;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] != nullptr) static_cast<Exchange<T>*>(arguments[lane])->result = values[lane - lane % kGroup];
  }
}

// `fill` is the operation's identity.
template <typename T, typename Operation, bool kInclusive, int kGroup>
MFA_SIM_UNCHECKED void scan_lanes(void* const* arguments) {
  T sum;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] == nullptr) continue;
    auto& mine = *static_cast<Exchange<T>*>(arguments[lane]);
    bool is_first = true;
    for (int other = lane - lane % kGroup; other < lane; ++other) is_first &= arguments[other] == nullptr;
    if (is_first) sum = mine.fill;
    const T with_mine = Operation::apply(sum, mine.value);
    mine.result = kInclusive ? with_mine : sum;
    sum = with_mine;
  }
}

MFA_SIM_UNCHECKED inline void ballot_lanes(void* const* arguments) {
  ulong mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] == nullptr) continue;
    mask |= static_cast<Exchange<ulong>*>(arguments[lane])->value << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] != nullptr) static_cast<Exchange<ulong>*>(arguments[lane])->result = mask;
  }
}

MFA_SIM_UNCHECKED inline void active_lanes(void* const* arguments) {
  ulong mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<ulong>(arguments[lane] != nullptr) << lane;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (arguments[lane] != nullptr) static_cast<Exchange<ulong>*>(arguments[lane])->result = mask;
  }
}

template <typename T>
constexpr bool is_shuffled = is_number<element_of<T>> || __is_same(element_of<T>, bfloat);

// Which lanes vote for something, as a mask.
MFA_SIM_COLLECTIVE ulong vote(mfa_sim_operation operation, bool value, const char* name, const char* file, int line) {
#ifdef MFA_SIM_STATIC
  ulong result;
  __asm__("vote %0" : "=r"(result) : "r"(static_cast<ulong>(value)));
  return result;
#endif
  return exchange<ulong>(operation, value, 0, 0, MFA_SIM_REDUCTION, 0, name, file, line);
}

MFA_SIM_OUTLINED uint lane_index() { return mfa_sim_current_position()->thread_index_in_simdgroup; }

// The votes of this lane's quad.
MFA_SIM_COLLECTIVE ulong quad_vote(bool value, const char* name, const char* file, int line) {
  return vote(&ballot_lanes, value, name, file, line) >> (lane_index() & ~3u) & 15;
}

}  // namespace mfa_sim

namespace metal {

MFA_SIM_COLLECTIVE void threadgroup_barrier(mem_flags flags, MFA_SIM_SITE) {
  mfa_sim_threadgroup_barrier(static_cast<uint32_t>(flags), MFA_SIM_HERE);
}
MFA_SIM_COLLECTIVE void simdgroup_barrier(mem_flags flags, MFA_SIM_SITE) {
  mfa_sim_simdgroup_barrier(static_cast<uint32_t>(flags), MFA_SIM_HERE);
}

// MFA_SIM_SHUFFLE(name, class, key, source): name(value, operand); key = 1 where the operand must be uniform.
#define MFA_SIM_SHUFFLE(name, cls, is_uniform, ...)                                                                 \
  template <typename T, ::mfa_sim::only_if<::mfa_sim::is_shuffled<T>> = 0>                                          \
  MFA_SIM_COLLECTIVE T name(T value, ushort operand, MFA_SIM_SITE) {                                                \
    return ::mfa_sim::exchange<T>(&::mfa_sim::shuffle_lanes<T, ::mfa_sim::__VA_ARGS__>, value, value, operand, cls, \
                                  is_uniform ? operand + 1 : 0, #name, MFA_SIM_HERE);                               \
  }
MFA_SIM_SHUFFLE(simd_shuffle, MFA_SIM_SHUFFLE, false, Direct<32>)
MFA_SIM_SHUFFLE(simd_shuffle_xor, MFA_SIM_SHUFFLE, true, Xor<32>)
MFA_SIM_SHUFFLE(simd_shuffle_up, MFA_SIM_SHUFFLE, true, Shift<32, -1>)
MFA_SIM_SHUFFLE(simd_shuffle_down, MFA_SIM_SHUFFLE, true, Shift<32, 1>)
MFA_SIM_SHUFFLE(simd_shuffle_rotate_up, MFA_SIM_SHUFFLE, true, Rotate<32, -1>)
MFA_SIM_SHUFFLE(simd_shuffle_rotate_down, MFA_SIM_SHUFFLE, true, Rotate<32, 1>)
MFA_SIM_SHUFFLE(simd_broadcast, MFA_SIM_REDUCTION, true, Direct<32>)
MFA_SIM_SHUFFLE(quad_shuffle, MFA_SIM_SHUFFLE, false, Direct<4>)
MFA_SIM_SHUFFLE(quad_shuffle_xor, MFA_SIM_SHUFFLE, true, Xor<4>)
MFA_SIM_SHUFFLE(quad_shuffle_up, MFA_SIM_SHUFFLE, true, Shift<4, -1>)
MFA_SIM_SHUFFLE(quad_shuffle_down, MFA_SIM_SHUFFLE, true, Shift<4, 1>)
MFA_SIM_SHUFFLE(quad_shuffle_rotate_up, MFA_SIM_SHUFFLE, true, Rotate<4, -1>)
MFA_SIM_SHUFFLE(quad_shuffle_rotate_down, MFA_SIM_SHUFFLE, true, Rotate<4, 1>)
MFA_SIM_SHUFFLE(quad_broadcast, MFA_SIM_REDUCTION, true, Direct<4>)
#undef MFA_SIM_SHUFFLE

#define MFA_SIM_FILL(name, size, is_up)                                                                  \
  template <typename T, ::mfa_sim::only_if<::mfa_sim::is_shuffled<T>> = 0>                               \
  MFA_SIM_COLLECTIVE T name(T value, T filling, ushort delta, ushort modulo = size, MFA_SIM_SITE) {      \
    return ::mfa_sim::exchange<T>(&::mfa_sim::fill_lanes<T, is_up>, value, filling, modulo << 8 | delta, \
                                  MFA_SIM_SHUFFLE, modulo << 8 | delta, #name, MFA_SIM_HERE);            \
  }
MFA_SIM_FILL(simd_shuffle_and_fill_up, 32, true)
MFA_SIM_FILL(simd_shuffle_and_fill_down, 32, false)
MFA_SIM_FILL(quad_shuffle_and_fill_up, 4, true)
MFA_SIM_FILL(quad_shuffle_and_fill_down, 4, false)
#undef MFA_SIM_FILL

#define MFA_SIM_REDUCE(name, condition, ...)                                                             \
  template <typename T, ::mfa_sim::only_if<condition> = 0>                                               \
  MFA_SIM_COLLECTIVE T name(T value, MFA_SIM_SITE) {                                                     \
    return ::mfa_sim::exchange<T>(&::mfa_sim::__VA_ARGS__, value, value, 0, MFA_SIM_REDUCTION, 0, #name, \
                                  MFA_SIM_HERE);                                                         \
  }
#define MFA_SIM_REDUCES(prefix, size)                                                            \
  MFA_SIM_REDUCE(prefix##_sum, MFA_SIM_REDUCIBLE, reduce_lanes<T, ::mfa_sim::Sum, size>)         \
  MFA_SIM_REDUCE(prefix##_product, MFA_SIM_REDUCIBLE, reduce_lanes<T, ::mfa_sim::Product, size>) \
  MFA_SIM_REDUCE(prefix##_min, MFA_SIM_REDUCIBLE, reduce_lanes<T, ::mfa_sim::Minimum, size>)     \
  MFA_SIM_REDUCE(prefix##_max, MFA_SIM_REDUCIBLE, reduce_lanes<T, ::mfa_sim::Maximum, size>)     \
  MFA_SIM_REDUCE(prefix##_and, MFA_SIM_BITS, reduce_lanes<T, ::mfa_sim::And, size>)              \
  MFA_SIM_REDUCE(prefix##_or, MFA_SIM_BITS, reduce_lanes<T, ::mfa_sim::Or, size>)                \
  MFA_SIM_REDUCE(prefix##_xor, MFA_SIM_BITS, reduce_lanes<T, ::mfa_sim::ExclusiveOr, size>)      \
  MFA_SIM_SCAN(prefix##_prefix_inclusive_sum, 0, ::mfa_sim::Sum, true, size)                     \
  MFA_SIM_SCAN(prefix##_prefix_exclusive_sum, 0, ::mfa_sim::Sum, false, size)                    \
  MFA_SIM_SCAN(prefix##_prefix_inclusive_product, 1, ::mfa_sim::Product, true, size)             \
  MFA_SIM_SCAN(prefix##_prefix_exclusive_product, 1, ::mfa_sim::Product, false, size)
#define MFA_SIM_SCAN(name, identity, operation, is_inclusive, size)                                                   \
  template <typename T, ::mfa_sim::only_if<MFA_SIM_REDUCIBLE> = 0>                                                    \
  MFA_SIM_COLLECTIVE T name(T value, MFA_SIM_SITE) {                                                                  \
    return ::mfa_sim::exchange<T>(&::mfa_sim::scan_lanes<T, operation, is_inclusive, size>, value,                    \
                                  T(static_cast<::mfa_sim::element_of<T>>(identity)), 0, MFA_SIM_REDUCTION, 0, #name, \
                                  MFA_SIM_HERE);                                                                      \
  }
#define MFA_SIM_REDUCIBLE ::mfa_sim::is_number<::mfa_sim::element_of<T>>
#define MFA_SIM_BITS (MFA_SIM_REDUCIBLE && !::mfa_sim::is_real<::mfa_sim::element_of<T>>)
MFA_SIM_REDUCES(simd, 32)
MFA_SIM_REDUCES(quad, 4)
#undef MFA_SIM_REDUCES
#undef MFA_SIM_SCAN

template <typename T, ::mfa_sim::only_if<::mfa_sim::is_shuffled<T>> = 0>
MFA_SIM_COLLECTIVE T simd_broadcast_first(T value, MFA_SIM_SITE) {
  return ::mfa_sim::exchange<T>(&::mfa_sim::shuffle_lanes<T, ::mfa_sim::Direct<32>>, value, value, 0, MFA_SIM_REDUCTION,
                                0, "simd_broadcast_first", MFA_SIM_HERE);
}
template <typename T, ::mfa_sim::only_if<::mfa_sim::is_shuffled<T>> = 0>
MFA_SIM_COLLECTIVE T quad_broadcast_first(T value, MFA_SIM_SITE) {
  return ::mfa_sim::exchange<T>(&::mfa_sim::shuffle_lanes<T, ::mfa_sim::Direct<4>>, value, value, 0, MFA_SIM_REDUCTION,
                                0, "quad_broadcast_first", MFA_SIM_HERE);
}

// The lanes for which a condition holds.
class simd_vote {
 public:
  using vote_t = ulong;
  explicit constexpr simd_vote(vote_t v = 0) : mask(v) {}
  explicit constexpr operator vote_t() const { return mask; }
  constexpr bool all() const { return mask == 0xffffffff; }
  constexpr bool any() const { return mask != 0; }

 private:
  vote_t mask;
};

MFA_SIM_COLLECTIVE simd_vote simd_ballot(bool value, MFA_SIM_SITE) {
  return simd_vote(::mfa_sim::vote(&::mfa_sim::ballot_lanes, value, "simd_ballot", MFA_SIM_HERE));
}
MFA_SIM_COLLECTIVE simd_vote simd_active_threads_mask(MFA_SIM_SITE) {
  return simd_vote(::mfa_sim::vote(&::mfa_sim::active_lanes, true, "simd_active_threads_mask", MFA_SIM_HERE));
}
MFA_SIM_COLLECTIVE bool simd_any(bool value, MFA_SIM_SITE) {
  return ::mfa_sim::vote(&::mfa_sim::ballot_lanes, value, "simd_any", MFA_SIM_HERE) != 0;
}
MFA_SIM_COLLECTIVE bool simd_all(bool value, MFA_SIM_SITE) {
  return ::mfa_sim::vote(&::mfa_sim::ballot_lanes, !value, "simd_all", MFA_SIM_HERE) == 0;
}
MFA_SIM_COLLECTIVE bool simd_is_first(MFA_SIM_SITE) {
  const ulong mask = ::mfa_sim::vote(&::mfa_sim::active_lanes, true, "simd_is_first", MFA_SIM_HERE);
  return ::mfa_sim::lane_index() == static_cast<uint>(__builtin_ctzl(mask));
}
MFA_SIM_COLLECTIVE bool simd_is_helper_thread() { return false; }

MFA_SIM_COLLECTIVE bool quad_any(bool value, MFA_SIM_SITE) {
  return ::mfa_sim::quad_vote(value, "quad_any", MFA_SIM_HERE) != 0;
}
MFA_SIM_COLLECTIVE bool quad_all(bool value, MFA_SIM_SITE) {
  return ::mfa_sim::quad_vote(!value, "quad_all", MFA_SIM_HERE) == 0;
}

}  // namespace metal
