// Function constants: what a pipeline is specialised for. A feature that is off costs nothing, since the driver
// compiles its branch away.
#pragma once

#include "params.h"

constant bool has_window [[function_constant(mfa::kHasWindow)]];
constant bool writes_lse [[function_constant(mfa::kWritesLse)]];
constant bool is_aligned [[function_constant(mfa::kAligned)]];
constant bool is_exact_head [[function_constant(mfa::kExactHead)]];
constant bool has_bias [[function_constant(mfa::kHasBias)]];
constant bool has_mask [[function_constant(mfa::kHasMask)]];
constant bool has_float_bias [[function_constant(mfa::kHasFloatBias)]];
constant bool has_softcap [[function_constant(mfa::kHasSoftcap)]];
constant bool has_alibi [[function_constant(mfa::kHasAlibi)]];
constant bool has_sinks [[function_constant(mfa::kHasSinks)]];
constant bool has_dropout [[function_constant(mfa::kHasDropout)]];
constant bool has_grad_lse [[function_constant(mfa::kHasGradLse)]];
constant bool wants_grad_key [[function_constant(mfa::kWantsGradKey)]];
constant bool wants_grad_value [[function_constant(mfa::kWantsGradValue)]];
constant bool wants_grad_alibi [[function_constant(mfa::kWantsGradAlibi)]];
constant bool writes_score_gradient [[function_constant(mfa::kWritesScoreGradient)]];
constant bool is_varlen [[function_constant(mfa::kIsVarlen)]];
constant bool has_key_lengths [[function_constant(mfa::kHasKeyLengths)]];
constant bool is_paged [[function_constant(mfa::kIsPaged)]];
constant bool has_leftpad [[function_constant(mfa::kHasLeftpad)]];
constant bool key_is_quantized [[function_constant(mfa::kKeyIsQuantized)]];
constant bool key_is_int8 [[function_constant(mfa::kKeyIsInt8)]];
constant bool key_is_e5m2 [[function_constant(mfa::kKeyIsE5m2)]];
constant bool value_is_quantized [[function_constant(mfa::kValueIsQuantized)]];
constant bool value_is_int8 [[function_constant(mfa::kValueIsInt8)]];
constant bool value_is_e5m2 [[function_constant(mfa::kValueIsE5m2)]];
constant bool is_split [[function_constant(mfa::kIsSplit)]];
constant bool has_mask_blocks [[function_constant(mfa::kHasMaskBlocks)]];
constant bool has_correction [[function_constant(mfa::kHasCorrection)]];
constant bool bias_is_of_last_keys [[function_constant(mfa::kBiasIsOfLastKeys)]];
constant bool has_rotary [[function_constant(mfa::kHasRotary)]];
constant bool has_rotary_seqlens [[function_constant(mfa::kHasRotarySeqlens)]];
constant bool is_rotary_interleaved [[function_constant(mfa::kRotaryInterleaved)]];
constant bool is_rotary_float [[function_constant(mfa::kRotaryFloat)]];
constant bool has_key_starts [[function_constant(mfa::kHasKeyStarts)]];
constant bool value_is_key [[function_constant(mfa::kValueIsKey)]];
constant bool has_block_mask [[function_constant(mfa::kHasBlockMask)]];
constant bool sums_score_gradient [[function_constant(mfa::kSumsScoreGradient)]];
