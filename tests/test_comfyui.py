"""The calls that ComfyUI's attention_pytorch makes, restated by signature, through the file of docs/comfyui.md.

ComfyUI is no package. It views [B,L,H*D] as heads, gives 2-D and 3-D masks leading dimensions, and splits batches.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from sdpa_cases import check_nothing_active, count_routed, random  # noqa: F401 (fixtures)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mfa import sdpa

PAGE = Path(__file__).parents[1] / "docs" / "comfyui.md"
HEADS, DIM, BATCH, LENGTH, KEYS = 2, 16, 3, 10, 14


@pytest.fixture(name="node")
def loaded_node() -> Iterator[dict[str, Any]]:
    """The file of the documentation, loaded as ComfyUI does."""
    (code,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) < 8
    module: dict[str, Any] = {}
    exec(compile(code, "custom_nodes/mfa_attention.py", "exec"), module)
    yield module
    sdpa.disable()


def attention_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    batch_limit: int = 2**31,
    function: Any = scaled_dot_product_attention,
) -> Tensor:
    """[B,L,H*D], or with `skip_reshape` [B,H,L,D]; the result likewise, by `skip_output_reshape`."""
    if not skip_reshape:
        q, k, v = (x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    parts = []
    for start in range(0, q.shape[0], batch_limit):
        part = slice(start, start + batch_limit)
        own = mask if mask is None or mask.shape[0] == 1 else mask[part]
        parts.append(function(q[part], k[part], v[part], attn_mask=own, dropout_p=0.0, is_causal=False))
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if skip_output_reshape else out.transpose(1, 2).reshape(out.shape[0], -1, heads * out.shape[-1])


def additive(*shape: int) -> Tensor:
    """As for CLIP: what is hidden is the dtype's lowest number, not -inf."""
    hidden = torch.rand(shape) < 0.3
    hidden[..., 0] = False
    return torch.zeros(shape).masked_fill(hidden, torch.finfo(torch.float16).min)


CASES: dict[str, dict[str, Any]] = {
    "no mask": {},
    "additive, 2-D": {"mask": additive(LENGTH, KEYS)},
    "additive, 3-D": {"mask": additive(BATCH, LENGTH, KEYS)},
    "additive, 4-D, per head": {"mask": additive(BATCH, HEADS, LENGTH, KEYS)},
    "bool, 2-D": {"mask": additive(LENGTH, KEYS) == 0},
    "bool, 3-D, of keys": {"mask": additive(BATCH, 1, KEYS) == 0},
    "bool, 4-D, of keys": {"mask": additive(BATCH, 1, 1, KEYS) == 0},
    "batches of 2": {"batch_limit": 2, "mask": additive(BATCH, 1, KEYS)},
    "heads given": {"skip_reshape": True},
    "heads given and wanted": {"skip_reshape": True, "skip_output_reshape": True, "mask": additive(LENGTH, KEYS)},
    "heads wanted": {"skip_output_reshape": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_its_calls_are_routed_and_right(
    name: str, dtype: torch.dtype, device: Device, node: dict[str, Any], routed: list[Any]
) -> None:
    torch.manual_seed(0)
    case = dict(CASES[name])
    mask = case.pop("mask", None)
    shapes = [(BATCH, length, HEADS * DIM) for length in (LENGTH, KEYS, KEYS)]
    if case.get("skip_reshape"):
        shapes = [(BATCH, HEADS, length, DIM) for length in (LENGTH, KEYS, KEYS)]
    inputs = [random(*shape, dtype=dtype) for shape in shapes]
    own = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)  # ATen wants the query's dtype
    on_device = [x.to(device.type) for x in inputs]
    if device.name == "cpu":
        sdpa.enable(cpu=True)
    with device.active(), torch.inference_mode():
        out = attention_pytorch(*on_device, HEADS, None if own is None else own.to(device.type), **case).cpu()
    assert len(routed) == (2 if "batch_limit" in case else 1)

    def reference(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **_: Any) -> Tensor:
        return oracle.attention(q, k, v, bias=attn_mask)[0]

    def low(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **_: Any) -> Tensor:
        return oracle.composition(q, k, v, bias=attn_mask)[0]

    wide = own if own is None or own.dtype == torch.bool else own.double()
    expected = attention_pytorch(*(x.double() for x in inputs), HEADS, wide, **case, function=reference)
    other = attention_pytorch(*inputs, HEADS, own, **case, function=low)
    assert out.shape == expected.shape
    assert oracle.largest_error(out, expected) <= oracle.tolerance(other, expected)


def test_the_file_is_a_node_for_comfyui_and_routes(node: dict[str, Any]) -> None:
    assert node["NODE_CLASS_MAPPINGS"] == {}
    assert sdpa.is_enabled()


def test_a_vaes_single_wide_head_is_routed(node: dict[str, Any], routed: list[Any]) -> None:
    """[B,C,H,W] as [B,1,H*W,C]."""
    inputs = [random(1, 512, 3, 4).view(1, 1, 512, -1).transpose(2, 3) for _ in range(3)]
    sdpa.enable(cpu=True)
    out = scaled_dot_product_attention(*inputs, attn_mask=None, dropout_p=0.0, is_causal=False)
    assert len(routed) == 1
    sdpa.disable()
    expected = scaled_dot_product_attention(*inputs, attn_mask=None, dropout_p=0.0, is_causal=False)
    torch.testing.assert_close(out, expected)
