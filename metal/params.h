// What host and kernels agree on: argument indices, function-constant indices, and the parameter block.
// Compiled as MSL and as C++.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define MFA_INT64 long
#else
#include <cstdint>
#define MFA_INT64 std::int64_t
#endif

namespace mfa {

// Every kernel binds a tensor at the same index, so a launch is a kernel name plus one table of arguments.
enum Argument : unsigned {
  kQuery = 0,
  kKey = 1,
  kValue = 2,
  kOut = 3,
  kLse = 4,  // float32 [batch, query_heads, query_length], natural logarithm
  kParams = 5,
  kFirstUnit = 6,    // one int: the first (batch, key head) of a chunk
  kBias = 7,         // bool, float32 or the query's dtype, see bias_strides
  kSinks = 8,        // float32 [query_heads]
  kAlibiSlopes = 9,  // float32 [query_heads] or [batch, query_heads]
  kRngState = 10,    // two int64: seed, offset
  kGradOut = 11,
  kGradLse = 12,     // float32, as kLse
  kStatistics = 13,  // float32 [batch, query_heads, query_length, 2]: log-sum-exp in base 2, delta
  kGradQuery = 14,
  kGradKey = 15,
  kGradValue = 16,
  kScoreGradient = 17,      // scratch of the five-GEMM backward, see score_gradient.h
  kGradAlibi = 18,          // float32 [batch, query_heads, query_length]: each row's part of the gradient of its slope
  kGradBias = 19,           // float32, contiguous, of the bias's own shape
  kGradSlopes = kGradBias,  // float32 [sequences, query_heads]; packed sequences have no bias
  kTileMap = 20,            // int2 per threadgroup: (sequence, tile), see layout.h
  kQueryStarts = 21,        // cu_seqlens_q: int32 [sequences + 1]
  kKeyStarts = 22,          // cu_seqlens_k; of caches int32 [batch], the slot of each one's first live key
  kKeyLengths = 23,         // int32 [batch or sequences]: live keys of each cache, or keys that count
  kBlockTable = 24,         // int32 [batch or sequences, pages_per_sequence]
  kKeyScale = 25,           // float32 [pages or batch, key_heads, page or capacity] of a quantized cache
  kValueScale = 26,
  kPartialOut = 27,   // float32 [splits, batch or sequences, query_heads, split_queries, Dv]
  kPartialLse = 28,   // float32 [splits, batch or sequences, query_heads, split_queries], natural logarithm
  kMaskClasses = 29,  // uint4 [bias_batch, bias_heads, row blocks, column blocks], see mask_classes.h
  kCorrection = 30,   // half: what rounding took from out, see correction.h
  kArgumentCount = 31,
  // Of append, which knows neither gradients nor packed sequences.
  kNewKey = kGradKey,
  kNewValue = kGradValue,
  kRotaryCos = kGradQuery,  // float32 or the query's dtype [positions, R/2]
  kRotarySin = kGradOut,
  kRotarySeqlens = kQueryStarts,  // int32 [batch]: position of the first new token, where it isn't key_lengths
  kNewLengths = kStatistics,      // int32 [batch]: key_lengths, and what was appended
};

// Indices of the function constants in features.h. All are bools.
enum FunctionConstant : unsigned {
  kHasWindow = 0,     // window_left or window_right hides a key from some query
  kWritesLse = 1,     // the caller wants the log-sum-exp
  kAligned = 2,       // all base addresses and row strides are multiples of 16 bytes, see rows_aligned
  kExactHead = 3,     // D and Dv equal the instance's head dimensions: no tail
  kHasBias = 4,       // a bias is bound, of the query's dtype unless one of the next two is set
  kHasMask = 5,       // ... of bools: true = attend
  kHasFloatBias = 6,  // ... of float32
  kHasSoftcap = 7,
  kHasAlibi = 8,
  kHasSinks = 9,
  kHasDropout = 10,
  kHasGradLse = 11,  // the caller passed a gradient of the log-sum-exp
  kWantsGradKey = 12,
  kWantsGradValue = 13,
  kWantsGradAlibi = 14,
  kWritesScoreGradient = 15,  // five-GEMM backward: dS goes to scratch
  kIsVarlen = 16,             // packed sequences of queries: a tile map and the list of starts are bound
  kHasKeyLengths = 17,        // each batch entry or sequence has its own number of keys, of those that it could have
  kIsPaged = 18,              // K and V lie in pages, found through the block table
  kHasLeftpad = 19,           // each batch entry's live keys start at a slot of its own
  kKeyIsQuantized = 20,       // K is float8_e4m3fn, unless one of the next two is set, and has scales
  kKeyIsInt8 = 21,
  kKeyIsE5m2 = 22,
  kValueIsQuantized = 23,  // so is V
  kValueIsInt8 = 24,
  kValueIsE5m2 = 25,
  kIsSplit = 26,            // decode: this launch writes partial results, which combine merges
  kHasMaskBlocks = 27,      // the classes of the mask's blocks are bound
  kHasCorrection = 28,      // forward writes the correction, backward_delta reads it
  kBiasIsOfLastKeys = 29,   // the bias's last column is that of the last key, and keys before its first have none
  kHasRotary = 30,          // append: queries and new keys are rotated
  kHasRotarySeqlens = 31,   // ... from positions of their own
  kRotaryInterleaved = 32,  // ... in pairs of neighbours
  kRotaryFloat = 33,        // ... by tables of float32
  kHasKeyStarts = 34,       // the list of key starts is bound: keys are packed too, or there is a leftpad
  kValueIsKey = 35,         // MLA: V is the first columns of K, which are read once
  kHasBlockMask = 36,       // what is bound as bias is a packed block mask
  kSumsScoreGradient = 37,  // forward on the matrix unit: backward is going to make gradients of bias, sinks or slopes
};

// A packed block mask, int32: its header, as src/mfa/block_mask.py names it. Sections are given by their first word.
enum MaskHeader : int {
  kMaskBatch = 0,
  kMaskHeads = 1,
  kMaskQueryLength = 2,
  kMaskKeyLength = 3,
  kMaskQueryBlocks = 4,
  kMaskKeyBlocks = 5,
  kMaskEntries = 6,
  kMaskMixedBlocks = 7,
  kMaskQueryStarts = 8,
  kMaskKeyStarts = 9,
  kMaskKeyEntries = 10,
  kMaskQueryOrder = 11,
  kMaskKeyOrder = 12,
  kMaskTable = 13,
  kMaskBits = 14,
  kMaskSize = 15,
};
enum MaskSizes : int {
  kMaskBlockRows = 128,   // of queries, and of keys
  kMaskTableColumns = 8,  // words of an entry
};

// One attention problem, as a kernel sees it. Lengths and strides are in elements.
struct AttentionParams {
  int batch, query_heads, key_heads, group_size;  // group_size = query_heads / key_heads
  int query_length, key_length;                   // Lq, Lk
  int head_dim, value_dim;                        // D, Dv
  int window_left, window_right;  // query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right; clamped to +-(Lq+Lk)
  float scale;
  float scale_log2;  // scale * log2(e)
  float softcap;
  int heavy_first;                           // 1: the last query tile runs first (causal: it has the most keys)
  int dropout_threshold;                     // of 65536: a draw below it drops
  float dropout_factor;                      // 65536 / (65536 - dropout_threshold)
  int alibi_batch_stride;                    // 0 or query_heads
  int sequences;                             // packed sequences (varlen); 0 otherwise
  int page_size, pages, pages_per_sequence;  // of a paged cache
  int splits, split_keys;                    // decode: parts of the keys, and keys per part
  int split_queries;                         // decode: what parts are made of has at most so many queries per sequence
  int bias_batch, bias_heads, bias_rows, bias_columns;  // the bias's own shape: 1 where it broadcasts
  int block_mask_words;                                 // of a packed block mask
  MFA_INT64 bias_strides[4];                            // batch, head, query, key; 0 where it broadcasts
  MFA_INT64 query_strides[3];  // batch (0 when packed), head, row; the last dimension is contiguous
  MFA_INT64 key_strides[3];    // batch or page, head, row
  MFA_INT64 value_strides[3];
  MFA_INT64 key_scale_strides[3];  // batch or page, head, row
  MFA_INT64 value_scale_strides[3];
  MFA_INT64 out_strides[3];
  MFA_INT64 grad_out_strides[3];
  MFA_INT64 grad_query_strides[3];
  MFA_INT64 grad_key_strides[3];
  MFA_INT64 grad_value_strides[3];
  // Of append.
  int cache_length, new_tokens;        // of each batch entry; there before, unless it has its own length, and new
  int rotary_pairs, rotary_positions;  // R/2, and rows of the tables
  int queries_advance;                 // 1: query i is at its key's position; 0: all are at the first one's
  MFA_INT64 new_key_strides[3];        // batch, head, row
  MFA_INT64 new_value_strides[3];
};

}  // namespace mfa

#undef MFA_INT64
