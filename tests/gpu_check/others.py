"""Other people's Metal kernels, through the same translation, for counters side by side.

MLX's steel attention, from the mlx-metal wheel, and PyTorch's prefill kernel, from a header in the torch wheel:
unmodified, and never committed.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from translate_cuda import Source, translate_source

BATCH, HEADS = 4, 8
BLOCKS = {64: (32, 32), 128: (32, 16)}  # queries, keys: what MLX and PyTorch choose on Apple GPUs for these dimensions
MLX_VERSION = "0.32.4"
MLX_KERNELS = "mlx/include/mlx/backend/metal/kernels/"
MLX_CONSTANTS = {"align_Q": 200, "align_K": 201, "do_causal": 301}
# Headers of no interest to attention, which lean on Apple's internals.
STUBS = {
    "mlx/backend/metal/kernels/bf16_math.h": "#pragma once\n",
    "mlx/backend/metal/kernels/logging.h": "#pragma once\n",
    "mlx/backend/metal/kernels/complex.h": "#pragma once\ntemplate <typename T>\nstruct complex_t {\n  T real, imag;\n"
    "  constexpr complex_t(T r, T i) : real(r), imag(i) {}\n};\nusing complex64_t = complex_t<float>;\n",
    "c10/metal/common.h": "#pragma once\n#define IF_CONSTEXPR constexpr\nnamespace c10 { namespace metal {\n"
    "template <typename T> using accum_t = float;\n"
    "template <typename T> inline T ceil_div(T a, T b) { return (a + b - 1) / b; }\n} }\n",
}


def write_stubs(directory: Path) -> Path:
    for name, text in STUBS.items():
        file = directory / "stubs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory / "stubs"


def mlx_headers(directory: Path) -> Path:
    """Where the wheel's headers are, fetched with pip into the cache that the tests use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mfa"
    pattern = f"mlx_metal-{MLX_VERSION}-*.whl"
    if not any(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", f"mlx-metal=={MLX_VERSION}", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--platform", "macosx_14_0_arm64", "--dest", str(cache)]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(cache.glob(pattern))) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.startswith(MLX_KERNELS)])
    return directory / "mlx/include"


def mlx_source(directory: Path) -> Source:
    headers = [write_stubs(directory), mlx_headers(directory)]
    lines = ["#include <metal_stdlib>", '#include "mlx/backend/metal/kernels/utils.h"']
    lines.append('#include "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.h"')
    for dim, (queries, keys) in BLOCKS.items():
        arguments = f"half, {queries}, {keys}, {dim}, {dim}, 4, 1, float, float"
        lines.append(f'instantiate_kernel("steel_f16_d{dim}", attention, {arguments})')
    file = directory / "steel.metal"
    file.write_text("\n".join([*lines, ""]))
    return translate_source(file, include_dirs=headers)


def torch_source(directory: Path) -> Source:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "include/ATen/native/mps/kernels/PrefillAttention.h").read_text()
    text = text[: text.rindex("#define instantiate_attn_shapes_helper")]
    text = text.replace("#if !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)", "#if 1", 1)
    instances = [
        f"instantiate_attn(f16, half, {queries}, {keys}, {dim}, 4, 1, 0, {causal}, f16, half)"
        for dim, (queries, keys) in BLOCKS.items()
        for causal in (0, 1)
    ]
    begin = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
    file = directory / "prefill.metal"
    file.write_text(begin + text + "\n".join(instances) + "\n#endif\n")
    return translate_source(file, include_dirs=[write_stubs(directory)])


def strides(length: int, dim: int) -> list[int]:
    return [HEADS * length * dim, length * dim, dim]


def mlx_launch(dim: int, length: int, causal: bool) -> dict[str, Any]:
    """One launch: buffers by index, of tensors by name or of bytes."""
    queries, keys = BLOCKS[dim]
    blocks = [length // queries, length // keys]
    params = struct.pack("<6i", BATCH, HEADS, dim, length, length, 1) + struct.pack("<f", dim**-0.5)
    params += struct.pack("<7i", *blocks, *blocks, 0, 0, 0)
    params += struct.pack("<12q", *strides(length, dim) * 4)
    constants = [MLX_CONSTANTS["align_Q"], MLX_CONSTANTS["align_K"], *([MLX_CONSTANTS["do_causal"]] if causal else [])]
    return {
        "kernel": f"steel_f16_d{dim}",
        "constants": constants,
        "grid": (blocks[0], HEADS, BATCH),
        "group": (128, 1, 1),
        "buffers": {0: "query", 1: "key", 2: "value", 3: "out", 4: params.hex()},
    }


def torch_launch(dim: int, length: int, causal: bool) -> dict[str, Any]:
    queries, keys = BLOCKS[dim]
    params = struct.pack("<6i", BATCH, HEADS, dim, length, length, 1) + struct.pack("<2f", dim**-0.5, 1)
    params += struct.pack("<12i", *strides(length, dim) * 4)
    shape = f"bq{queries}_bk{keys}_bd{dim}_wm4_wn1_hm0_dc{int(causal)}"
    return {
        "kernel": f"prefill_attention_f16_{shape}_maskf16",
        "constants": [],
        "grid": (length // queries, HEADS, BATCH),
        "group": (128, 1, 1),
        "buffers": {
            0: "query",
            1: "key",
            2: "value",
            3: "out",
            4: params.hex(),
            5: bytes(16).hex(),
            6: bytes(64).hex(),
        },
    }
