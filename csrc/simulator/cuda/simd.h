// What the lanes of a warp do together, and barriers.
#pragma once

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}

MFA_SIM_COLLECTIVE void threadgroup_barrier(mem_flags) { ::mfa_sim::hardware::threadgroup_barrier(); }
MFA_SIM_COLLECTIVE void simdgroup_barrier(mem_flags) { ::mfa_sim::hardware::simdgroup_barrier(); }
}  // namespace metal

namespace mfa_sim {

constexpr int kLanes = 32;
MFA_SIM_INLINE int lane_index() { return hardware::lane(); }

// Any value of up to four bytes, or of several words.
template <typename T, typename Word>
MFA_SIM_COLLECTIVE T by_words(T value, Word word) {
  if constexpr (sizeof(T) <= 4) {
    int bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = word(bits);
    __builtin_memcpy(&value, &bits, sizeof value);
  } else {
    int bits[sizeof(T) / 4];
    __builtin_memcpy(bits, &value, sizeof value);
#pragma unroll
    for (unsigned i = 0; i < sizeof(T) / 4; ++i) bits[i] = word(bits[i]);
    __builtin_memcpy(&value, bits, sizeof value);
  }
  return value;
}

}  // namespace mfa_sim

namespace metal {

template <typename T>
MFA_SIM_COLLECTIVE T simd_shuffle(T value, ushort lane) {
  return ::mfa_sim::by_words(value, [=](int x) { return ::mfa_sim::hardware::shuffle(x, lane); });
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_shuffle_xor(T value, ushort mask) {
  return ::mfa_sim::by_words(value, [=](int x) { return ::mfa_sim::hardware::shuffle_xor(x, mask); });
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_shuffle_up(T value, ushort delta) {
  return ::mfa_sim::by_words(value, [=](int x) { return ::mfa_sim::hardware::shuffle_up(x, delta); });
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_shuffle_down(T value, ushort delta) {
  return ::mfa_sim::by_words(value, [=](int x) { return ::mfa_sim::hardware::shuffle_down(x, delta); });
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_shuffle_and_fill_up(T value, T filling, ushort delta) {
  const T shifted = simd_shuffle_up(value, delta),
          filled = simd_shuffle(filling, (::mfa_sim::lane_index() - delta) & 31);
  return ::mfa_sim::lane_index() < delta ? filled : shifted;
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_shuffle_and_fill_down(T value, T filling, ushort delta) {
  const T shifted = simd_shuffle_down(value, delta),
          filled = simd_shuffle(filling, (::mfa_sim::lane_index() + delta) & 31);
  return ::mfa_sim::lane_index() + delta > 31 ? filled : shifted;
}
MFA_SIM_COLLECTIVE bool simd_any(bool value) { return ::mfa_sim::hardware::any(value); }
MFA_SIM_COLLECTIVE bool simd_all(bool value) { return ::mfa_sim::hardware::all(value); }

template <typename T>
MFA_SIM_COLLECTIVE T simd_sum(T value) {
  for (ushort mask = 1; mask < 32; mask *= 2) value += simd_shuffle_xor(value, mask);
  return value;
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_max(T value) {
  for (ushort mask = 1; mask < 32; mask *= 2) value = max(value, simd_shuffle_xor(value, mask));
  return value;
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_min(T value) {
  for (ushort mask = 1; mask < 32; mask *= 2) value = min(value, simd_shuffle_xor(value, mask));
  return value;
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_or(T value) {
  for (ushort mask = 1; mask < 32; mask *= 2) value |= simd_shuffle_xor(value, mask);
  return value;
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_prefix_inclusive_sum(T value) {
  for (ushort delta = 1; delta < 32; delta *= 2) {
    const T before = simd_shuffle_up(value, delta);
    value += ::mfa_sim::lane_index() >= delta ? before : T(0);
  }
  return value;
}
template <typename T>
MFA_SIM_COLLECTIVE T simd_prefix_exclusive_sum(T value) {
  return simd_prefix_inclusive_sum(value) - value;
}

}  // namespace metal
