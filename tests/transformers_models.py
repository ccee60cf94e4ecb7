"""Tiny random models of transformers, one for each configuration of which one can be made."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LENGTH, HEADS, DIM, WIDTH = 13, 4, 16, 64
# What a configuration's field becomes that has a number: windows and chunks are shorter than a row.
SIZES: dict[str, Any] = {
    field: size
    for size, fields in {
        WIDTH: "hidden_size n_embd d_model dim embedding_size embed_dim emb_dim intermediate_size n_inner d_ff ffn_dim "
        "ffn_hidden_size hidden_dim encoder_ffn_dim decoder_ffn_dim mlp_dim embedding_dim word_embed_proj_dim "
        "out_hidden_size decoder_hidden_size encoder_hidden_size decoder_intermediate_size encoder_intermediate_size "
        "projector_hidden_size attention_hidden_size moe_intermediate_size shared_expert_intermediate_size expert_dim "
        "cross_attention_hidden_size vision_hidden_size text_hidden_size lru_width projection_dim output_dim "
        "dense_intermediate_size moe_shared_expert_intermediate_size encoder_dim decoder_dim fc_dim feedforward_dim "
        "decoder_ffn_size encoder_ffn_size encoder_width vocab_size vocab_size_per_layer_input text_vocab_size",
        HEADS: "num_attention_heads n_head n_heads num_heads nhead encoder_num_heads encoder_attention_heads "
        "decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts index_topk num_codebooks",
        2: "num_key_value_heads num_kv_heads num_global_key_value_heads index_n_heads num_hidden_layers n_layer "
        "n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth "
        "encoder_num_layers decoder_num_layers encoder_num_hidden_layers decoder_num_hidden_layers num_experts_per_tok "
        "moe_topk moe_k num_experts_per_token linear_num_key_heads linear_num_value_heads num_feat_extract_layers "
        "mamba_expand num_conv_pos_embedding_groups mlp_ratio encoder_num_key_value_heads decoder_num_key_value_heads "
        "H_cycles L_cycles",
        DIM: "head_dim d_kv global_head_dim index_head_dim kv_lora_rank q_lora_rank linear_key_head_dim swa_head_dim "
        "linear_value_head_dim mamba_d_head mamba_head_dim qk_head_dim o_lora_rank v_head_dim swa_v_head_dim",
        8: "qk_rope_head_dim qk_nope_head_dim rotary_dim hidden_size_per_layer_input mamba_d_state state_size "
        "mamba_n_heads mamba_num_heads mamba_chunk_size patch_size num_mel_bins window_size patch_length hash_size",
        1: "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups moe_num_shared_experts "
        "num_shared_experts n_groups",
        6: "sliding_window attention_window attention_chunk_size local_attention",
        256: "max_position_embeddings n_positions max_target_positions num_position_embeddings",
        32: "image_size input_size crop_size max_source_positions",
        3: "num_channels in_channels in_chans",
        5: "num_queries num_query_tokens",
    }.items()
    for field in fields.split()
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
NEVER_NONE = ("vocab_size", "head_dim", "num_key_value_heads", "n_routed_experts", "sliding_window_size")
MROPE = (
    "glm4v",
    "glm46v_t",
    "glm_image_t",
    "glm_ocr_t",
    "glmga_t",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_o",
    "paddleocr_vl",
)
CHANCE = ("dropout", "drop_path", "layerdrop", "drop_rate", "pdrop")  # in the names of fields that become 0
# Which of a configuration's models: the first of these that it has.
MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "CTC")
LARGEST = 30e6  # parameters

# What such sizes don't fit together in.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "esmc": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "num_hidden_layers": 2,
        "index_block_size": 8,  # longer than padding: otherwise a token may see padding only, which has no sense
        "index_topk_blocks": 1,
    },
    "reformer": {"is_decoder": True},
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16},
    "textnet": {"image_size": [32, 32]},
    "yolos": {"image_size": [32, 32]},
    "zaya": {"num_experts_per_tok": 1},
}


def names() -> list[str]:
    """model_type of each configuration that has a model."""
    return sorted({*auto.MODEL_MAPPING_NAMES, *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})


def model_class(name: str) -> Any:
    mappings = [getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in MAPPINGS]
    found = [mapping[name] for mapping in (*mappings, auto.MODEL_MAPPING_NAMES) if name in mapping]
    models = [getattr(hf, model if isinstance(model, str) else model[0], None) for model in found]
    return next((model for model in models if model and model.config_class is CONFIG_MAPPING[name]), models[-1])


def tiny(config: Any, name: str) -> Any:
    """A small configuration of this class; a part of one where the class has parts."""
    default = config()
    fields = {field.name: vars(default).get(field.name, field.default) for field in dataclasses.fields(config)}
    chosen: dict[str, Any] = {}
    tokens = 40  # on which no input has
    by_stage = isinstance(fields.get("num_heads"), list | tuple)  # sizes that fit together already
    for field, value in fields.items():
        if value is None and field in NEVER_NONE:
            value = 0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field in SPECIAL:
            chosen[field] = SPECIAL[field]
        elif field.endswith(("_token_id", "_token_index")) and is_number:
            chosen[field], tokens = tokens, tokens + 1
        elif any(word in field for word in CHANCE) and is_number:
            chosen[field] = type(value)(0)
        elif field in SIZES and is_number and not (by_stage and SIZES[field] == WIDTH):
            chosen[field] = type(value)(SIZES[field])
    kinds = list(dict.fromkeys(fields.get("layer_types") or ()))
    if kinds:
        chosen["layer_types"] = kinds * (1 if len(kinds) > 1 else 2)
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        chosen["head_dim"] = SIZES["qk_rope_head_dim"]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        chosen["num_key_value_heads"] = HEADS
    rope = fields.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    if "mrope_section" in rope or config.model_type.startswith(MROPE):
        chosen["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **rope, "mrope_section": [2, 3, 3]}
    for part in getattr(config, "sub_configs", {}):
        made = getattr(default, part, None)
        if isinstance(made, hf.PreTrainedConfig):
            chosen[part] = tiny(type(made), f"{name}.{part}")
    return config(**{**chosen, **OVERRIDES.get(name, {}), **OVERRIDES.get(config.model_type, {})})


def make(name: str) -> Any:
    """The model, in float32, with eager attention and weights at which attention matters.

    Raises:
        Exception: of whatever kind, if it can't be made so small.
    """
    config = tiny(CONFIG_MAPPING[name], name)
    kind = model_class(name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def arguments(model: Any) -> dict[str, Tensor]:
    """Of a forward pass, without padding."""
    wanted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    config = model.config

    def size(name: str, default: int) -> int:
        for part in (config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
            value = getattr(part, name, None)
            if value:
                return value if isinstance(value, int) else value[0]
        return default

    def noise(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    def ids(length: int) -> Tensor:
        return torch.randint(3, 40, (2, length), generator=generator)

    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    image = noise(*frames, size("num_channels", 3), *[size("image_size", 32)] * 2)
    found: dict[str, Tensor] = {}
    if "input_ids" in wanted:
        found["input_ids"] = ids(LENGTH)
        found["input_ids"][:, -5] = SPECIAL["eos_token_id"]  # where no padding is: some models pool there
    if "decoder_input_ids" in wanted:
        found["decoder_input_ids"] = ids(7)
    is_dual = hasattr(config, "vision_config") and not model.can_generate()
    if "pixel_values" in wanted and (model.main_input_name == "pixel_values" or is_dual or "input_ids" not in found):
        found["pixel_values"] = image
    elif model.main_input_name == "pixel_values_videos":
        found["pixel_values_videos"] = image if image.dim() == 5 else image[:, None]
    if "input_features" in wanted and "input_ids" not in found:
        by_frame = hasattr(config, "input_feat_per_channel")
        found["input_features"] = noise(64, 8) if by_frame else noise(size("num_mel_bins", 8), 64)
    if "input_values" in wanted and "input_ids" not in found:
        found["input_values"] = noise(400)
    return found


def paddings() -> Iterator[tuple[str, Tensor]]:
    """Attention masks [2,LENGTH] that hide a part of the second row."""
    for name, rows in (("left", slice(0, 4)), ("right", slice(-4, None))):
        mask = torch.ones(2, LENGTH, dtype=torch.int64)
        mask[1, rows] = 0
        yield name, mask


def results(model: Any, mask: Tensor | None = None) -> list[Tensor]:
    """What counts of the model's floating-point results."""
    torch.manual_seed(0)
    given = arguments(model) | ({} if mask is None else {"attention_mask": mask})
    out = model(**given)
    parts = out.to_tuple() if hasattr(out, "to_tuple") else out
    tensors = [x for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    return [x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x for x in tensors]


def difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all, relative to the largest number of its tensor."""
    if [x.shape for x in ours] != [x.shape for x in expected]:
        return math.inf
    pairs = ((a.detach(), b.detach()) for a, b in zip(ours, expected, strict=True) if b.numel())
    found = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs]
    return max((x if x == x else math.inf for x in found), default=0.0)
