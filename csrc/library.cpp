// The table of contents: every op of the namespace, and what runs it.
//
// Schemas are defined here, so that a program without Python can load the ops; fake tensors, autograd, autocast and
// vmap are in src/mfa/_ops/.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include "ops/attention.h"

namespace {

// As the structs of csrc/ops/arguments.h and of each family, and the tuples of src/mfa/_arguments.py.
#define QKV "Tensor query, Tensor key, Tensor value, "
#define FEATURES \
  "Tensor? sinks, Tensor? alibi_slopes, float scale, SymInt? window_left, SymInt? window_right, float softcap, "
#define DROPOUT "float dropout_p, Tensor? rng_state"
#define DENSE "Tensor? bias, " FEATURES DROPOUT ", Tensor? block_mask"
#define VARLEN                                                                                            \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, " FEATURES DROPOUT \
  ", Tensor? seqused_k"
#define BACKWARD "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? correction, "
#define DECODE                                                                                             \
  "Tensor cache_lengths, Tensor? block_table, Tensor? key_scale, Tensor? value_scale, Tensor? attn_mask, " \
  "Tensor? cache_leftpad, " FEATURES "SymInt num_splits"
#define PAGED                                                                                             \
  "Tensor cu_seqlens_q, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor seqused_k, Tensor block_table, " \
  "Tensor? key_scale, Tensor? value_scale, " FEATURES "SymInt num_splits"

#define APPEND                                                                                                         \
  "Tensor key, Tensor value, Tensor? cache_lengths, SymInt cache_length, Tensor? block_table, Tensor(c!)? key_scale, " \
  "Tensor(d!)? value_scale, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens, bool rotary_interleaved, " \
  "bool queries_advance"

// mfa::attention has no kernel: Python decomposes it, since a C++ composite would see lengths as constants.
constexpr const char* kSchemas[] = {
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor",

    "attention_forward(" QKV DENSE ") -> (Tensor out, Tensor lse)",

    // What training calls: correction is what rounding took from out, for attention_backward. float16, with the shape
    // and layout of out where that has 16 bits, and size 0 elsewhere. trains_terms: whether a gradient of bias, sinks
    // or alibi_slopes is going to be asked for, which needs a more exact out. It has a default since it is younger than
    // the op: torch keeps compiled graphs on disk, which call the op as it was.
    "attention_forward_with_correction(" QKV DENSE
    ", bool trains_terms=True) -> (Tensor out, Tensor lse, Tensor correction)",

    // output_mask says which gradients are wanted, in the order of the results; one that is not is of size 0.
    "attention_backward(" QKV DENSE ", " BACKWARD
    "bool[6] output_mask) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_bias, Tensor grad_sinks, Tensor grad_alibi_slopes)",

    "attention_varlen_forward(" QKV VARLEN ") -> (Tensor out, Tensor lse)",

    "attention_varlen_forward_with_correction(" QKV VARLEN
    ", bool trains_terms=True) -> (Tensor out, Tensor lse, Tensor correction)",

    "attention_varlen_backward(" QKV VARLEN ", " BACKWARD
    "bool[5] output_mask) -> (Tensor grad_query, "
    "Tensor grad_key, Tensor grad_value, Tensor grad_sinks, Tensor grad_alibi_slopes)",

    // What attention_decode gets: rotated_query (of size 0 without rotary), and lengths with what was appended.
    "attention_append(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, " APPEND
    ") -> (Tensor rotated_query, Tensor lengths)",

    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, " DECODE ") -> (Tensor out, Tensor lse)",

    "attention_varlen_paged(" QKV PAGED ") -> (Tensor out, Tensor lse)",
};

template <typename Function>
Function* find(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

// STABLE_TORCH_LIBRARY_FRAGMENT, with tags where torch has them (2.12 on; the headers of our target, 2.10, don't name
// them). FRAGMENT, because another package may own the namespace. Errors are left to _library.py, which looks for every
// op: throwing from a static initialiser would end the process.
struct Definitions {
  TorchLibraryHandle library = nullptr;

  Definitions() {
    if (aoti_torch_library_init_fragment("mfa", __FILE__, __LINE__, &library) != AOTI_TORCH_SUCCESS) return;
    auto* define_with_tags = find<AOTITorchError(TorchLibraryHandle, const char*, const std::int32_t*, std::int32_t)>(
        "torch_library_def_with_tags");
    auto* fixed_stride_order = find<std::int32_t()>("torch_tag_needs_fixed_stride_order");
    auto* pt2_compliant = find<std::int32_t()>("torch_tag_pt2_compliant_tag");
    for (const char* schema : kSchemas) {
      if (define_with_tags && fixed_stride_order && pt2_compliant) {
        const std::int32_t tags[] = {fixed_stride_order(), pt2_compliant()};
        define_with_tags(library, schema, tags, 2);
      } else {
        aoti_torch_library_def(library, schema);
      }
    }
  }
  ~Definitions() {
    if (library) aoti_torch_delete_library_object(library);
  }
  Definitions(const Definitions&) = delete;
  Definitions& operator=(const Definitions&) = delete;
} definitions;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfa, MPS, m) {
  m.impl("attention_forward", &mfa::attention_forward);
  m.impl("attention_forward_with_correction", &mfa::attention_forward_with_correction);
  m.impl("attention_backward", &mfa::attention_backward);
  m.impl("attention_varlen_forward", &mfa::attention_varlen_forward);
  m.impl("attention_varlen_forward_with_correction", &mfa::attention_varlen_forward_with_correction);
  m.impl("attention_varlen_backward", &mfa::attention_varlen_backward);
  m.impl("attention_append", &mfa::attention_append);
  m.impl("attention_decode", &mfa::attention_decode);
  m.impl("attention_varlen_paged", &mfa::attention_varlen_paged);
}
