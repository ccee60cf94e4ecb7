"""README.md: every python snippet runs, every link leads somewhere, and its table of features tells the truth."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import mfa
from mfa import support

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


@pytest.mark.simulator
def test_snippets_run() -> None:
    """In one namespace, top to bottom, as a reader would paste them."""
    namespace: dict[str, object] = {}
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
    assert len(snippets) >= 3
    for snippet in snippets:
        line = TEXT[: snippet.start(1)].count("\n")  # so that a traceback names README's line
        exec(compile("\n" * line + snippet[1], str(README), "exec"), namespace)


def test_links_within_the_repository_exist() -> None:
    for path, anchor in re.findall(r"\]\(([\w./]*)#?([\w-]*)\)", TEXT):
        target = README.parent / path if path else README
        assert target.exists(), path
        if target.is_dir():
            continue
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor


def test_a_macos_build_has_the_metal_backend() -> None:
    """Without which the table must not speak of mps."""
    assert "add_metal_backend(mfa)" in (README.parent / "CMakeLists.txt").read_text(encoding="utf-8")


# ---- the support table, row by row -----------------------------------------------------------------------------------

QUERY, KEY, VALUE = torch.randn(3, 1, 4, 20, 32, dtype=torch.float16)
STARTS = torch.tensor([0, 7, 20], dtype=torch.int32)
TABLE = torch.tensor([[1, 0]], dtype=torch.int32)


def gradients() -> None:
    query, key, value = (x.clone().requires_grad_() for x in (QUERY, KEY, VALUE))
    torch.autograd.grad(mfa.attention(query, key, value).sum(), (query, key, value))


def bias_gradient() -> None:
    bias = torch.randn(4, 20, 20, requires_grad=True)
    torch.autograd.grad(mfa.attention(QUERY, KEY, VALUE, bias).sum(), bias)


def block_mask() -> None:
    query, key, value = (x.clone().requires_grad_() for x in (QUERY, KEY, VALUE))
    blocks = create_block_mask(mfa.masks.causal(), None, None, 20, 20, device="cpu")
    torch.autograd.grad(mfa.attention(query, key, value, block_mask=blocks).sum(), (query, key, value))


def merge() -> None:
    parts = [mfa.attention(QUERY, KEY[:, :, s], VALUE[:, :, s], return_lse=True) for s in (slice(9), slice(9, None))]
    mfa.merge_attention(*parts[0], *parts[1])


def varlen() -> None:
    packed = [x[0].transpose(0, 1).clone().requires_grad_() for x in (QUERY, KEY, VALUE)]
    out = mfa.attention_varlen(*packed, STARTS, STARTS, 13, 13, is_causal=True)
    torch.autograd.grad(out.sum(), packed)


def pages(cache: torch.Tensor) -> torch.Tensor:
    return cache[0, :, :16].unflatten(1, (2, 8)).transpose(0, 1).contiguous()


def quantized() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        (key, key_scale), (value, value_scale) = mfa.quantize_kv(KEY, dtype), mfa.quantize_kv(VALUE, dtype)
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        mfa.attention_with_kv_cache(QUERY[:, :, :1], key, value, cache_seqlens=17, **scales)


REQUESTS = {
    "forward, any length": lambda: mfa.attention(QUERY[:, :, :7], KEY, VALUE),
    "gradients": gradients,
    "gradient of `attn_mask`": bias_gradient,
    "`is_causal`": lambda: mfa.attention(QUERY, KEY, VALUE, is_causal=True),
    "`window`": lambda: mfa.attention(QUERY, KEY, VALUE, window=(3, -1)),
    "`enable_gqa`": lambda: mfa.attention(QUERY, KEY[:, :2], VALUE[:, :2], enable_gqa=True),
    "Dv other than D": lambda: mfa.attention(QUERY, KEY, VALUE[..., :13]),
    "`return_lse`": lambda: mfa.attention(QUERY, KEY, VALUE, return_lse=True),
    "`attn_mask`": lambda: mfa.attention(QUERY, KEY, VALUE, torch.ones(20, 20, dtype=torch.bool).tril()),
    "`block_mask`, with gradients": block_mask,
    "`softcap`": lambda: mfa.attention(QUERY, KEY, VALUE, softcap=5.0),
    "`alibi_slopes`": lambda: mfa.attention(QUERY, KEY, VALUE, alibi_slopes=torch.ones(4)),
    "`sinks`": lambda: mfa.attention(QUERY, KEY, VALUE, sinks=torch.zeros(4)),
    "`dropout_p`": lambda: mfa.attention(QUERY, KEY, VALUE, dropout_p=0.5),
    "`merge_attention`": merge,
    "`attention_varlen`, with gradients": varlen,
    "`attention_with_kv_cache`": lambda: mfa.attention_with_kv_cache(QUERY[:, :, :1], KEY, VALUE, cache_seqlens=17),
    "paged cache": lambda: mfa.attention_with_kv_cache(
        QUERY[:, :, :1], pages(KEY), pages(VALUE), cache_seqlens=11, block_table=TABLE
    ),
    "packed queries over pages": lambda: mfa.attention_varlen(
        QUERY[0, :, :3].transpose(0, 1),
        *(pages(KEY), pages(VALUE), torch.tensor([0, 1, 3], dtype=torch.int32), None, 2, 11),
        block_table=TABLE.expand(2, -1),
        seqused_k=torch.tensor([11, 9], dtype=torch.int32),
    ),
    "int8 or float8 cache": quantized,
}


def can(request: Callable[[], object], device: str) -> bool:
    """Whether it works; what doesn't must be refused as the contract says, and in the simulator kernels must run."""
    try:
        if device == "cpu":
            request()
        else:
            with mfa.simulate() as sim:
                request()
            assert sim.launches, "answered without the kernels"
    except NotImplementedError:
        return False
    return True


@pytest.mark.simulator
@pytest.mark.parametrize("feature", support.FEATURES, ids=lambda feature: feature.name)
def test_support_table_tells_the_truth(feature: support.Feature) -> None:
    assert feature == support.Feature(feature.name, *(can(REQUESTS[feature.name], d) for d in ("cpu", "simulator")))
