"""README.md: every python snippet runs, and what is generated from code equals the code.

`python tests/test_readme.py` rewrites the generated sections.
"""

import re
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fidelity import Problem
from test_fidelity_mlx import BLOCKS, build, headers, run_steel  # noqa: F401 (headers is a fixture)

import mfa.flash_attn
import mfa.sdpa
from mfa import support
from mfa.bench import kernels, model, model_decode, model_varlen, report
from mfa.bench.chips import CHIPS

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
SECTION = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(\n?<!-- end -->)", re.DOTALL)


OPERATIONS = {
    "8x8x8 MMAs": lambda c: c["mma"],
    "threadgroup loads, per lane": lambda c: c["threadgroup_reads"],
    "threadgroup bytes read": lambda c: c["threadgroup_read_bytes"],
    "threadgroup bytes written": lambda c: c["threadgroup_write_bytes"],
    "device bytes read": lambda c: c["device_read_bytes"],
    "exp2, per lane": lambda c: c["exp"],
    "shuffles, reductions, votes": lambda c: c["shuffles"] + c["reductions"],
    "threadgroup barriers": lambda c: c["threadgroup_barriers"],
    "SIMD-group barriers": lambda c: c["simdgroup_barriers"],
}
MLX = {  # in the order of OPERATIONS, by D; test_mlx_counts counts them anew
    64: [16_384, 1_179_648, 2_359_296, 557_056, 557_056, 73_728, 4_096, 1_088, 4_096],
    128: [32_768, 2_621_440, 5_242_880, 1_114_112, 1_114_112, 81_920, 4_096, 2_112, 49_152],
}


def count(dim: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 256, dim, generator=generator).half() for _ in range(3))
    with mfa.simulate("apple7") as sim:
        mfa.attention(query, key, value, return_lse=True)
    return [of(asdict(sim.counters)) for of in OPERATIONS.values()]


def operations() -> str:
    """Our counts beside those of MLX."""
    lines = ["| | MLX, D 64 | mfa, D 64 | MLX, D 128 | mfa, D 128 |", "| --- | ---: | ---: | ---: | ---: |"]
    columns = zip(OPERATIONS, MLX[64], count(64), MLX[128], count(128), strict=True)
    return "\n".join(lines + [f"| {name} | " + " | ".join(f"{n:,}" for n in row) + " |" for name, *row in columns])


def pinned() -> dict[str, list[str]]:
    """The versions that the tests are made for."""
    text = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    others = {name: [version] for name, version in re.findall(r"\b(transformers|diffusers)==([\d.]+)", text)}
    return {"torch": (README.parent / "tests" / "torch_versions.txt").read_text().split(), **others}


def libraries() -> str:
    """What runs of each library; the models are those that the tests have."""
    import test_diffusers
    import test_flash_attn
    import test_mps_flash_attn
    import test_transformers

    models = ", ".join(test_transformers.CONFIGS)
    denoisers = ", ".join(test_diffusers.MODELS)
    functions = len(test_flash_attn.SIGNATURES), len(test_mps_flash_attn.SIGNATURES)
    versions = {name: ", ".join(numbers) for name, numbers in pinned().items()}
    rows = {
        f"torch {versions['torch']}, without what each lacks": "OpInfo's samples of SDPA in four dtypes, with "
        "gradients; `varlen_attn`; `nn.MultiheadAttention`, `nn.TransformerEncoderLayer`; `sdpa_kernel`, autocast, "
        "`torch.func`, `torch.compile`, `torch.export`",
        f"transformers {versions['transformers']}": f"tiny random {models}: logits, padding left and right, a training "
        "step, `generate` with static, dynamic and sliding caches, `torch.compile`",
        f"diffusers {versions['diffusers']}": f"tiny random {denoisers}: outputs and gradients; DiTPipeline; "
        "`torch.compile`",
        "flash-attn 2.8.3": f"not itself, it needs CUDA: signatures and conventions of {functions[0]} functions, "
        "`bert_padding`",
        "mps-flash-attn 0.6.3": f"not itself, it needs a Mac: signatures and conventions of {functions[1]} functions, "
        "the snippets and feature lists of its READMEs",
    }
    return "\n".join(
        ["| library | what runs |", "| --- | --- |", *(f"| {name} | {what} |" for name, what in rows.items())]
    )


def predictions() -> str:
    """The cost model's, beside what it says of MLX's kernels."""
    table = kernels.load()
    chips = [CHIPS[name] for name in ("m1", "m1-max", "m2-max", "m3-max", "m4-max")]
    lines = ["| | " + " | ".join(chip.name for chip in chips) + " |", "| --- |" + " ---: |" * len(chips)]
    for dim in report.HEAD_DIMS:
        dense, causal = report.shape(dim), report.shape(dim, causal=True)
        cells = []
        for chip in chips:
            ours = [
                report.utilisation(problem, 2, model.seconds(model.forward(table, problem, chip)), chip)
                for problem in (dense, causal)
            ]
            mlx = report.utilisation(dense, 2, report.steel(table, dense, chip).seconds, chip)
            cells.append(f"{ours[0]:.0%}, {ours[1]:.0%} ({mlx:.0%})")
        lines.append(f"| forward D {dim}: dense, causal (MLX dense) | " + " | ".join(cells) + " |")
    for dim in (64, 80, 128):
        problem = report.shape(dim)
        times = [model.seconds(model.backward(table, problem, chip)) for chip in chips]
        cells = [f"{report.utilisation(problem, 5, time, chip):.0%}" for time, chip in zip(times, chips, strict=True)]
        lines.append(f"| backward D {dim} | " + " | ".join(cells) + " |")
    for dim in (64, 128):
        cells = [
            ", ".join(
                f"{model_decode.share(problem, model_decode.planned(table, problem, chip).seconds, chip):.0%}"
                for group in (1, 4, 8)
                for problem in [report.decoding(dim, group, 32768)]
            )
            for chip in chips
        ]
        lines.append(f"| decode D {dim}: 1, 4, 8 heads per key head, of the bandwidth | " + " | ".join(cells) + " |")
    for dim in (64, 128):
        problem = report.packed(dim)
        cells = [
            f"{report.packed_share(model_varlen.planned(table, problem, chip), problem, chip):.0%} "
            f"({report.equal_share(table, problem, chip):.0%})"
            for chip in chips
        ]
        lines.append(f"| varlen D {dim} (as many tokens in equal sequences) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


GENERATED = {
    "support": support.markdown,
    "operations": operations,
    "libraries": libraries,
    "predictions": predictions,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.simulator if name == "operations" else ()) for name in GENERATED]
)
def test_generated_section_is_current(name: str) -> None:
    sections = {section: body for _, section, body, _ in SECTION.findall(TEXT)}
    assert sections[name] == GENERATED[name](), "run `python tests/test_readme.py`"


@pytest.mark.parametrize("library", ["torch", "transformers", "diffusers"])
def test_libraries_are_those_that_run(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} isn't installed; it needs Python 3.11")
    installed = version(library).split("+")[0]
    if library == "torch" and installed not in pinned()[library]:
        pytest.skip(f"torch is {installed} here, chosen by TORCH")
    assert installed in pinned()[library]


def test_the_seeds_problem_is_predicted_as_written() -> None:
    table, chip = kernels.load(), CHIPS["m1-max"]
    forward = model.seconds(model.forward(table, report.SEED, chip))
    training = forward + model.seconds(model.backward(table, report.SEED, chip))
    assert f"{1e3 * forward:.1f} ms forward and {1e3 * training:.1f} ms with backward" in TEXT


@pytest.mark.simulator
@pytest.mark.parametrize("dim", [64, 128])
def test_mlx_counts(dim: int, request: pytest.FixtureRequest) -> None:
    block_q, block_k = BLOCKS[dim]
    arguments = f"half, {block_q}, {block_k}, {dim}, {dim}, 4, 1, float, float"
    instance = f'instantiate_kernel("steel_f16_{dim}_1", attention, {arguments})'
    header = "steel/attn/kernels/steel_attention.h"
    library = build(request.getfixturevalue("headers"), f"readme{dim}", "count", header, [instance])
    counters = run_steel(library, Problem("f16", dim, 256, 256), 1, 0)
    assert [of(counters) for of in OPERATIONS.values()] == MLX[dim]


@pytest.mark.simulator
def test_snippets_run() -> None:
    """In one namespace, top to bottom, as a reader would paste them."""
    namespace: dict[str, object] = {}
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
    assert len(snippets) > 5
    try:
        for snippet in snippets:
            if any(find_spec(name) is None for name in re.findall(r"\b(transformers|diffusers)\b", snippet[1])):
                continue  # they need Python 3.11
            line = TEXT[: snippet.start(1)].count("\n")  # so that a traceback names README's line
            exec(compile("\n" * line + snippet[1], str(README), "exec"), namespace)
        assert not mfa.sdpa.is_enabled()
    finally:
        mfa.sdpa.disable()
        mfa.flash_attn.uninstall()


def test_links_within_the_repository_exist() -> None:
    for path, anchor in re.findall(r"\]\(([\w./]*)#?([\w-]*)\)", TEXT):
        target = README.parent / path if path else README
        assert target.exists(), path
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


if __name__ == "__main__":
    README.write_text(SECTION.sub(lambda m: f"{m[1]}{GENERATED[m[2]]()}\n<!-- end -->", TEXT), encoding="utf-8")
