// <metal_cooperative_tensor>, and the scopes of <metal_tensor>: a matrix whose elements lie in the registers of lanes.
#pragma once

namespace metal {

struct execution_thread {};
struct execution_simdgroup {};
template <int N>
struct execution_simdgroups {};

constexpr size_t dynamic_extent = static_cast<size_t>(-1);
template <typename Index, size_t... kExtents>
struct extents {
  using index_type = Index;
  static constexpr size_t rank() { return sizeof...(kExtents); }
};

}  // namespace metal

MFA_SIM_INLINE ushort __metal_get_thread_index_in_simdgroup(ushort) {
#ifdef MFA_SIM_STATIC
  uint lane;
  __asm__("lane %0" : "=r"(lane));  // asked for once, wherever the kernel asks
  return static_cast<ushort>(lane);
#endif
  return static_cast<ushort>(::mfa_sim::lane_index());
}

namespace mfa_sim {

// An index with the place that wrote it, which an operator cannot take as a default argument.
struct ElementIndex {
  int value;
  const char* file;
  int line;
  template <typename I>
  MFA_SIM_INLINE constexpr ElementIndex(I i, MFA_SIM_SITE)
      : value(static_cast<int>(i)), file(mfa_sim_file), line(mfa_sim_line) {}
};

// What a lane holds of an operand. All bits are set until the kernel writes: NaN, and recognised by run().
template <typename T, int N>
struct Share {
  T at[N];

#if defined(MFA_SIM_COUNT) || defined(MFA_SIM_ASAN)
  MFA_SIM_INLINE Share() {
    for (int i = 0; i < N; ++i) at[i] = poison<T>();
  }
#else
  Share() = default;
#endif
};

}  // namespace mfa_sim

namespace metal {

// Layout: capacity, and where element i of a lane lies in the operand as it is stored.
template <typename Element, typename Extents, typename Layout>
struct cooperative_tensor {
  using element_type = Element;
  using value_type = Element;
  using extents_type = Extents;
  using layout = Layout;
  using index_type = typename Extents::index_type;

  static constexpr ushort get_rank() { return Extents::rank(); }
  static constexpr ushort get_capacity() { return Layout::kCapacity; }
  static constexpr bool is_valid_element(ushort i) { return i < Layout::kCapacity; }
  // [0] runs along contiguous memory, [1] over rows.
  MFA_SIM_INLINE array<index_type, 2> get_multidimensional_index(::mfa_sim::ElementIndex i) const {
    const auto place = Layout::stored(static_cast<int>(::mfa_sim::lane_index()), checked(i));
    return {{static_cast<index_type>(place.column), static_cast<index_type>(place.row)}};
  }
  MFA_SIM_INLINE Element& operator[](::mfa_sim::ElementIndex i) { return elements.at[checked(i)]; }
  MFA_SIM_INLINE const Element& operator[](::mfa_sim::ElementIndex i) const { return elements.at[checked(i)]; }

  ::mfa_sim::Share<Element, Layout::kCapacity> elements;

 private:
  // On a GPU nobody looks.
  static MFA_SIM_INLINE int checked(::mfa_sim::ElementIndex i) {
    if (i.value < 0 || i.value >= Layout::kCapacity) {
      mfa_sim_fail("element of a cooperative tensor out of bounds", i.file, i.line);
    }
    return i.value;
  }
};

}  // namespace metal
