// What the matrix unit, the ALUs beside it and L1 can do: kernels that `make mac` times, and that the simulator checks.
// Operands are uniform, so that results don't depend on the layout; small, so that sums are exact.
#define MFA_MATRIX_UNIT
#include "unit/product.h"

namespace mfa {

struct Operands {
  float left, right;
  int steps;
};

// Products onto `kChains` results that don't depend on one another.
template <int kColumns, int kDepth, int kChains>
struct Chain {
  vec<half, 4> left[kDepth / 8], right[kColumns * kDepth / 128];
  Fragment<float> sums[kChains][2][kColumns / kFragment];

  explicit Chain(constant Operands& operands) {
    MFA_UNROLL
    for (short i = 0; i < kDepth / 8; ++i) {
      left[i] = vec<half, 4>(half(operands.left));
    }
    MFA_UNROLL
    for (short i = 0; i < kColumns * kDepth / 128; ++i) {
      right[i] = vec<half, 4>(half(operands.right));
    }
    MFA_UNROLL
    for (short c = 0; c < kChains; ++c) {
      MFA_UNROLL
      for (short n = 0; n < kColumns / kFragment; ++n) {
        sums[c][0][n] = sums[c][1][n] = Fragment<float>(c);  // not alike, else a compiler makes one of them
      }
    }
  }

  void step() {
    MFA_UNROLL
    for (short c = 0; c < kChains; ++c) {
      multiply_tiles<kColumns, kDepth, false>(sums[c][0], sums[c][1], left, right);
    }
  }

  float total() const {
    float sum = 0;
    MFA_UNROLL
    for (short c = 0; c < kChains; ++c) {
      MFA_UNROLL
      for (short n = 0; n < kColumns / kFragment; ++n) {
        sum += sums[c][0][n].x + sums[c][0][n].y + sums[c][1][n].x + sums[c][1][n].y;
      }
    }
    return sum;
  }
};

// A lane's sum of all of its results, kColumns / 2 per chain: each kDepth * left * right per step, and its chain's
// number.
template <int kColumns, int kDepth, int kChains>
[[kernel]] void chain(device float* out [[buffer(0)]], constant Operands& operands [[buffer(1)]],
                      uint thread_index [[thread_position_in_grid]]) {
  Chain<kColumns, kDepth, kChains> chain(operands);
  for (int step = 0; step < operands.steps; ++step) {
    chain.step();
  }
  out[thread_index] = chain.total();
}

// Multiply-adds, independent ones: kOperations per step.
constant constexpr int kOperations = 32;
constant constexpr int kIndependent = 8;

struct Arithmetic {
  float left, right;
  float sums[kIndependent];

  explicit Arithmetic(constant Operands& operands) : left(operands.left), right(operands.right) {
    MFA_UNROLL
    for (short i = 0; i < kIndependent; ++i) {
      sums[i] = i;
    }
  }

  void step() {
    MFA_UNROLL
    for (short i = 0; i < kOperations; ++i) {
      sums[i % kIndependent] = fma(left, right, sums[i % kIndependent]);
    }
  }

  float total() const {
    float sum = 0;
    MFA_UNROLL
    for (short i = 0; i < kIndependent; ++i) {
      sum += sums[i];
    }
    return sum;
  }
};

// Who does what: all SIMD-groups one thing, or both; or half of them this and the others that, twice as often.
enum Work { products, arithmetic, together, apart };

template <Work kWork>
[[kernel]] void beside(device float* out [[buffer(0)]], constant Operands& operands [[buffer(1)]],
                       uint thread_index [[thread_position_in_grid]],
                       ushort simdgroup [[simdgroup_index_in_threadgroup]]) {
  Chain<32, 16, 1> chain(operands);
  Arithmetic own(operands);
  if (kWork == apart) {
    // Of each scheduler one half, whether it has every fourth SIMD-group of a threadgroup or neighbours.
    if (((simdgroup ^ simdgroup >> 2) & 1) == 0) {
      for (int step = 0; step < 2 * operands.steps; ++step) {
        chain.step();
      }
    } else {
      for (int step = 0; step < 2 * operands.steps; ++step) {
        own.step();
      }
    }
  } else {
    for (int step = 0; step < operands.steps; ++step) {
      if (kWork != arithmetic) {
        chain.step();
      }
      if (kWork != products) {
        own.step();
      }
    }
  }
  out[thread_index] = chain.total() + own.total();
}

struct Reads {
  uint steps;
  uint mask;  // of places: those of a region of a power of two
};

// Rows as K and V are read, 32 of 128 bytes per step, by all SIMD-groups alike; `out` is what was read, xor.
[[kernel]] void loads(const device uint4* source [[buffer(0)]], device uint* out [[buffer(1)]],
                      constant Reads& reads [[buffer(2)]], uint thread_index [[thread_position_in_grid]],
                      ushort lane_index [[thread_index_in_simdgroup]]) {
  const Lane lane(lane_index);
  uint4 seen = 0;
  uint first = lane.row * 8 + lane.column / 2;
  for (uint step = 0; step < reads.steps; ++step) {
    MFA_UNROLL
    for (short i = 0; i < 8; ++i) {
      seen ^= source[(first + i / 2 * 64 + i % 2 * 4) & reads.mask];
    }
    first += 256;
  }
  out[thread_index] = seen.x ^ seen.y ^ seen.z ^ seen.w;
}

#define CHAIN(columns, depth, chains)             \
  template                                        \
      [[host_name("chain_16x" #columns "x" #depth \
                  "_" #chains)]] [[kernel]] decltype(chain<columns, depth, chains>) chain<columns, depth, chains>;
CHAIN(32, 16, 1)
CHAIN(16, 32, 1)
CHAIN(32, 32, 1)
CHAIN(32, 16, 2)
CHAIN(16, 32, 2)
CHAIN(32, 32, 2)

#define BESIDE(work) template [[host_name("beside_" #work)]] [[kernel]] decltype(beside<work>) beside<work>;
BESIDE(products)
BESIDE(arithmetic)
BESIDE(together)
BESIDE(apart)

}  // namespace mfa
