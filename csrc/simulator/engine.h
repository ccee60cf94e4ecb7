// The simulator's engine: what translated kernels call, and what the host calls. C ABI, so that kernel libraries
// (built by clang against msl/) and the host (built by the system compiler) share nothing but these declarations.
//
// Execution model: one fiber per lane, 32 lanes per SIMD-group. A collective is executed once, by the last lane of its
// SIMD-group to arrive. Threadgroups of a dispatch run one after another; one dispatch runs at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Keeps the optimiser from moving a call under, out of, or across a branch.
#ifdef __clang__
#define MFA_SIM_CONVERGENT __attribute__((convergent))
#else
#define MFA_SIM_CONVERGENT
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct mfa_sim_library;  // opaque

// Both sides are compiled with hidden visibility; these are the names that cross.
#pragma GCC visibility push(default)

// ---- shared ---------------------------------------------------------------------------------------------------------

enum { MFA_SIM_LANES = 32, MFA_SIM_BUFFERS = 31, MFA_SIM_THREADGROUP_LIMIT = 32768, MFA_SIM_MAX_THREADS = 1024 };

// metal::mem_flags as a bit mask.
enum { MFA_SIM_MEM_NONE = 0, MFA_SIM_MEM_DEVICE = 1, MFA_SIM_MEM_THREADGROUP = 2, MFA_SIM_MEM_TEXTURE = 4 };

// Which counter a collective adds to (one, unless said), and whether it tolerates lanes that have returned.
enum mfa_sim_class {
  MFA_SIM_MMA,        // counters.mma; every lane of a full SIMD-group must take part
  MFA_SIM_UNIT,       // counters.unit_mma, by `key`: a product on the matrix unit; every lane must take part
  MFA_SIM_MATRIX,     // simdgroup_load / simdgroup_store / diagonal: uncounted, every lane must take part
  MFA_SIM_SHUFFLE,    // counters.shuffles
  MFA_SIM_REDUCTION,  // counters.reductions: reductions, scans, votes, ballots, broadcasts
};

struct mfa_sim_uint3 {
  uint32_t x, y, z;
};

// The built-in inputs of the running lane.
struct mfa_sim_position {
  mfa_sim_uint3 thread_position_in_grid, threads_per_grid;
  mfa_sim_uint3 threadgroup_position_in_grid, threadgroups_per_grid;
  mfa_sim_uint3 thread_position_in_threadgroup, threads_per_threadgroup;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, threads_per_simdgroup;
};

// ---- called by kernels ----------------------------------------------------------------------------------------------

// arguments[lane] is what that lane passed, or null for a lane that does not take part. Runs in one lane's fiber.
typedef void (*mfa_sim_operation)(void* const* arguments);

// Lanes meet when operation, name, key, file and line agree; otherwise the dispatch fails as divergent.
// `key` holds whatever must be uniform (a matrix pointer's stride, a shuffle's element size, ...).
MFA_SIM_CONVERGENT void mfa_sim_collective(mfa_sim_operation operation, void* argument, int cls, uint64_t key,
                                           const char* name, const char* file, int line);
MFA_SIM_CONVERGENT void mfa_sim_threadgroup_barrier(uint32_t mem_flags, const char* file, int line);
MFA_SIM_CONVERGENT void mfa_sim_simdgroup_barrier(uint32_t mem_flags, const char* file, int line);

// The storage of a threadgroup variable; `id` tells variables apart. The first lane to ask allocates.
void* mfa_sim_threadgroup_variable(const void* id, size_t size, size_t align, const char* name, const char* file,
                                   int line);

const mfa_sim_position* mfa_sim_current_position(void);
void mfa_sim_count_exp(uint32_t lanes_elements);   // elements evaluated by this lane
void mfa_sim_count_fragment_load(void);            // one lane load instruction that feeds a fragment
void mfa_sim_count_conversion(uint32_t elements);  // reserved for operand conversions marked in fragment.h
void mfa_sim_fail(const char* message, const char* file, int line);  // fails the dispatch; does not return

// ---- registration, from static constructors of a kernel library -----------------------------------------------------

enum mfa_sim_parameter_kind {
  MFA_SIM_BUFFER,       // device or constant pointer or reference; [[buffer(index)]]
  MFA_SIM_THREADGROUP,  // threadgroup pointer; [[threadgroup(index)]]
  MFA_SIM_BUILTIN,      // a position; filled by the entry wrapper from mfa_sim_position
};

struct mfa_sim_parameter {
  int kind;
  int index;            // buffer or threadgroup index; -1 for built-ins
  const char* name;     // as written in the kernel
  const char* type;     // as written in the kernel
  int writable;         // 1: device T*, 0: const or constant
  size_t element_size;  // sizeof(T) of T* or T&: a bound buffer must hold at least this for a reference
  int is_reference;
  const char* function_constant;  // name of the constant that guards this parameter, or null
};

// arguments[i] belongs to parameters[i]: the bound address (null when guarded off); built-ins get null.
typedef void (*mfa_sim_entry)(void* const* arguments);

struct mfa_sim_kernel {
  const char* name;  // host name
  mfa_sim_entry entry;
  const mfa_sim_parameter* parameters;
  int parameter_count;
  int max_total_threads;  // [[max_total_threads_per_threadgroup]], 0 when absent
  const char* file;
  int line;
};

struct mfa_sim_function_constant {
  const char* name;
  int index;
  void* address;
  size_t size;
  const char* type;  // "bool", "int", "uint", "float", ...
  uint8_t* is_set;   // set to 1 when the host gave a value: is_function_constant_defined()
};

void mfa_sim_register_kernel(const mfa_sim_kernel* kernel);
void mfa_sim_register_function_constant(const mfa_sim_function_constant* constant);

// ---- called by the host ---------------------------------------------------------------------------------------------

struct mfa_sim_counters {
  uint64_t mma, exp, shuffles, reductions, threadgroup_barriers, simdgroup_barriers, fragment_loads;
  uint64_t device_read_bytes, device_write_bytes, threadgroup_read_bytes, threadgroup_write_bytes;
  uint64_t device_reads, device_writes, threadgroup_reads, threadgroup_writes;  // lane load and store instructions
  uint64_t conversions;
  uint64_t unit_mma;  // products of 16x16x16
};

enum { MFA_SIM_CHECK_RACES = 1, MFA_SIM_CHECK_BOUNDS = 2, MFA_SIM_CHECK_UNINITIALISED = 4 };

// Loads a kernel library; null and a message on failure. Libraries live until the process ends.
mfa_sim_library* mfa_sim_open(const char* path, char* error, size_t error_size);
int mfa_sim_kernel_count(const mfa_sim_library*);
const mfa_sim_kernel* mfa_sim_kernel_at(const mfa_sim_library*, int i);
const mfa_sim_kernel* mfa_sim_find_kernel(const mfa_sim_library*, const char* name);
int mfa_sim_function_constant_count(const mfa_sim_library*);
const mfa_sim_function_constant* mfa_sim_function_constant_at(const mfa_sim_library*, int i);
int mfa_sim_is_instrumented(const mfa_sim_library*);  // 1: built in count mode, so checks and byte counters work

struct mfa_sim_argument {
  void* address;  // first byte the kernel may touch; null: not bound
  uint64_t size;  // bytes reachable from address. Touching anything beyond is out of bounds
};

struct mfa_sim_constant_value {
  int index;
  const void* value;
  size_t size;
};

struct mfa_sim_dispatch_info {
  const mfa_sim_library* library;
  const char* kernel;
  const mfa_sim_constant_value* constants;
  int constant_count;
  uint32_t threadgroups[3];  // grid, in threadgroups
  uint32_t threads_per_threadgroup[3];
  mfa_sim_argument arguments[MFA_SIM_BUFFERS];   // by buffer index
  uint64_t threadgroup_memory[MFA_SIM_BUFFERS];  // dynamic bytes, by [[threadgroup(i)]]; multiples of 16
  uint32_t checks;                               // MFA_SIM_CHECK_*
  uint64_t seed;                                 // 0: natural order
  int allow_divergence;  // 1: non-matrix collectives run for the lanes that meet (third-party kernels)
};

// 0 and counters on success; otherwise non-zero and a message: kernel, rule, file:line, lanes.
// Thread-safe (takes a lock). Static threadgroup memory used is returned too.
int mfa_sim_dispatch(const mfa_sim_dispatch_info* info, mfa_sim_counters* counters, uint64_t* threadgroup_memory_used,
                     char* error, size_t error_size);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
