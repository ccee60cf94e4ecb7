"""Signatures of mfa.flash_attn: those of the real packages, which are pinned here as text."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

# A line is a module of mfa.flash_attn, and a function with its parameters: of flash-attn 2.8.3; of FlashAttention-3,
# which no package of PyPI installs, as in hopper/flash_attn_interface.py of the repository at 01afd16 (the source
# distribution of 2.8.3 has an older one, without return_attn_probs); of flash-attn-4 4.0.0b36.
PINNED = """
flash_attn_interface flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)
flash_attn_interface flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)
flash_attn_interface flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)
flash_attn_interface flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None)
flash_attn_interface flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False)
flash_attn_interface flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False)
flash_attn_interface flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None,
    rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
    alibi_slopes=None, num_splits=0, return_softmax_lse=False)
flash_attn_interface _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, return_softmax)
flash_attn_interface _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    rng_state=None)
flash_attn_interface _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
    alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False)
flash_attn_interface _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q,
    cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False)
bert_padding unpad_input(hidden_states, attention_mask, unused_mask=None)
bert_padding unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length)
bert_padding pad_input(hidden_states, indices, batch, seqlen)
rotary apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
    max_seqlen=None)
rotary apply_rotary_emb_qkv_(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,
    num_heads_q=None)
rotary apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0)
rotary RotaryEmbedding(dim, base=10000.0, interleaved=False, scale_base=None, device=None)
rotary RotaryEmbedding._update_cos_sin_cache(seqlen, device=None, dtype=None)
rotary apply_rotary(x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False,
    inplace=False, conjugate=False)
flash_attn_3 flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None,
    k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False)
flash_attn_3 flash_attn_qkvpacked_func(qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None,
    sm_margin=0, return_attn_probs=False)
flash_attn_3 flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, sm_margin=0, return_attn_probs=False)
flash_attn_3 flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None,
    rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None,
    k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
    return_softmax_lse=False)
flash_attn_3 flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None)
cute flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
    block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None)
cute flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
    block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None)
"""
SIGNATURES = dict(line.split("(", 1) for line in PINNED.strip().replace("\n    ", " ").splitlines())
SOURCES = {
    "flash_attn_interface": "flash_attn/flash_attn_interface.py",
    "bert_padding": "flash_attn/bert_padding.py",
    "rotary": "flash_attn/layers/rotary.py",
    "flash_attn_3": "hopper/flash_attn_interface.py",
    "cute": "flash_attn/cute/interface.py",
}

Parameters = list[tuple[str, object, object]]


def parameters(signature: inspect.Signature) -> Parameters:
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def pinned(name: str) -> Parameters:
    return parameters(inspect.signature(eval(f"lambda {SIGNATURES[name][:-1]}: None")))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    module, function = name.split()
    ours = importlib.import_module(f"mfa.flash_attn.{module}")
    for part in function.split("."):
        ours = getattr(ours, part)
    own = parameters(inspect.signature(ours))
    assert [p for p in own if p[0] != "self"] == pinned(name)


def test_every_public_function_is_pinned() -> None:
    for name in SOURCES:
        module = importlib.import_module(f"mfa.flash_attn.{name}")
        known = {other.split()[1] for other in SIGNATURES if other.split()[0] == name}
        aliases = {
            "__version__",
            "index_first_axis",
            "index_put_first_axis",
            "apply_rotary_emb_func",
            "get_scheduler_metadata",
        }
        assert {n for n in module.__all__ if not n.startswith("_wrapped")} - aliases <= known


def of_source(text: str) -> dict[str, Parameters]:
    """Of a module's functions, and of its classes, as of methods."""
    found = {}
    for scope in ast.walk(ast.parse(text)):
        for node in getattr(scope, "body", ()) if isinstance(scope, (ast.Module, ast.ClassDef)) else ():
            if not isinstance(node, ast.FunctionDef):
                continue
            name = node.name
            if isinstance(scope, ast.ClassDef):
                name = scope.name if name == "__init__" else f"{scope.name}.{name}"
                node.args.args = node.args.args[1:]
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            try:
                found[name] = parameters(inspect.signature(eval(f"lambda {ast.unparse(node.args)}: None")))
            except NameError:  # a default that needs the module: none of those that are pinned
                continue
    return found


def fetched(requirement: str, folder: Path) -> Path:
    """A package's files, from PyPI."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--quiet"]
    environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip can't fetch {requirement}: {done.stderr.strip().splitlines()[-1:]}")
    (archive,) = folder.iterdir()
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as files:
        files.extractall(folder)
    return folder if archive.suffix == ".whl" else next(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.slow
@pytest.mark.parametrize("requirement", ["flash-attn==2.8.3", "flash-attn-4==4.0.0b36"])
def test_pinned_is_what_the_packages_have(requirement: str, tmp_path: Path) -> None:
    root = fetched(requirement, tmp_path)
    modules = ["cute"] if "4.0" in requirement else [name for name in SOURCES if name != "cute"]
    for name in SIGNATURES:
        module, function = name.split()
        if module not in modules:
            continue
        source = "flash_attn/ops/triton/rotary.py" if function == "apply_rotary" else SOURCES[module]
        theirs, known = of_source((root / source).read_text())[function], pinned(name)
        if module == "flash_attn_3" and known[-1][0] == "return_attn_probs":
            known = known[:-1]
        assert theirs == known, name
