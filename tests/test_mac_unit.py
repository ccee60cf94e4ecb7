"""What `make mac` asks of M5's matrix unit: its kernels are right, and its answers follow from what it measures."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mac_report
import numpy as np
import oracle
import pytest
import torch
from agx_check import instances
from driver import xcrun
from encoding import decode, encode
from mac_unit import answers, build, questions, variants
from mac_unit.variants import ARGUMENTS, Row, Variant
from simulator_engine import BOUNDS, RACES, Library, build_kernels, open_library
from unit_products import Product, multiplied

from mfa import _native
from mfa.bench import autotune

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def test_the_report_asks_all_questions_in_their_order() -> None:
    assert tuple(questions.QUESTIONS) == mac_report.UNIT_QUESTIONS
    asked = {variant.question for variant in variants.variants()}
    assert asked == {"queries", "unroll", "barrier", "block", "simdgroups", "rounding"}


# -- probes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(name="probes", scope="module")
def build_probes(tmp_path_factory: pytest.TempPathFactory) -> Library:
    source = Path(questions.__file__).with_name("probes.metal")
    output = tmp_path_factory.mktemp("probes") / "probes.so"
    return open_library(build_kernels([source], output, standard="metal4.0", include_dirs=[build.METAL]))


LEFT, RIGHT, STEPS = -0.5, 3.0, 7
FMAS = sum(range(8)) + 32 * LEFT * RIGHT * STEPS
PRODUCTS = 16 * 16 * LEFT * RIGHT * STEPS
# Of the lanes of one half of the SIMD-groups, and of the other.
SUMS = {
    **{
        f"chain_16x{columns}x{depth}_{chains}": (
            columns / 2 * (chains * depth * LEFT * RIGHT * STEPS + sum(range(chains))),
        )
        * 2
        for columns, depth in ((32, 16), (16, 32), (32, 32))
        for chains in (1, 2)
    },
    "beside_products": (PRODUCTS + sum(range(8)),) * 2,
    "beside_arithmetic": (FMAS,) * 2,
    "beside_together": (PRODUCTS + FMAS,) * 2,
    "beside_apart": (2 * PRODUCTS + sum(range(8)), 2 * FMAS - sum(range(8))),
}


@pytest.mark.simulator
@pytest.mark.parametrize("kernel", SUMS)
def test_sums_of_a_probe(probes: Library, kernel: str) -> None:
    """Uniform operands, so that a sum is the depth times their product, wherever its elements are."""
    out = np.zeros((2, 8, 32), np.float32)
    operands = struct.pack("ffi", LEFT, RIGHT, STEPS)
    counters = probes.dispatch(
        kernel, grid=(2,), group=(256,), arguments=[out, operands], checks=RACES | BOUNDS, seed=len(kernel)
    )
    np.testing.assert_array_equal(out[:, [0, 2, 5, 7]], SUMS[kernel][0])
    np.testing.assert_array_equal(out[:, [1, 3, 4, 6]], SUMS[kernel][1])
    if kernel.startswith("chain"):
        columns, depth, chains = (int(text) for text in kernel.removeprefix("chain_16x").replace("_", "x").split("x"))
        assert counters["unit_mma"] == 16 * STEPS * chains * columns * depth // 256


@pytest.mark.parametrize("shape", [(16, 32, 16), (16, 16, 32), (16, 32, 32)])
def test_large_sums_tell_who_adds_c(shape: tuple[int, int, int]) -> None:
    """By the unit's documented order nothing is left of the products; added to C at last, all of them are."""
    left, right, c = (x.astype(np.float64) for x in questions.large_sums(Product("f16_f16_f32", shape)))
    np.testing.assert_array_equal(multiplied(left, right, c), 2.0**24)
    np.testing.assert_array_equal(multiplied(left, right, 0 * c) + c, 2.0**24 + shape[2] / 4)


@pytest.mark.simulator
@pytest.mark.parametrize("region", [4 << 10, 16 << 10])
def test_reads_of_a_probe(probes: Library, region: int) -> None:
    """Each step the next 4 KB of the region; every lane its own 128 bytes."""
    source = np.random.default_rng(region).integers(0, 2**32, region // 4, np.uint32)
    out, steps = np.zeros(64, np.uint32), 5
    reads = struct.pack("II", steps, region // 16 - 1)
    counters = probes.dispatch("loads", grid=(1,), group=(64,), arguments=[source, out, reads], checks=RACES | BOUNDS)
    blocks = source.reshape(-1, 4, 8, 2, 4, 4)  # rows 8 apart, row, set of 32, octet, words
    seen = np.bitwise_xor.reduce([blocks[step % len(blocks)] for step in range(steps)])
    of_lane = np.bitwise_xor.reduce(seen, axis=(0, 2, 4))  # row, octet
    lanes = np.arange(32)
    row = 4 * (lanes >> 4) + (lanes >> 1 & 3)
    octet = 2 * (lanes >> 3 & 1) + (lanes & 1)
    np.testing.assert_array_equal(out.reshape(2, 32), np.broadcast_to(of_lane[row, octet], (2, 32)))
    assert counters["device_read_bytes"] == 2 * steps * 4096


# -- variants ---------------------------------------------------------------------------------------------------------


def each_variant() -> Iterator[Any]:
    """In the unmarked suite one that is a row, and two that are patches."""
    unmarked = {"queries", "barrier", "rounding"}
    for variant in variants.variants():
        is_slow = variant.question not in unmarked
        unmarked -= {variant.question}
        yield pytest.param(
            variant, id=f"{variant.row.dtype}, {variant.name}", marks=[pytest.mark.slow] if is_slow else []
        )


def run(
    library: Library, row: Row, lengths: tuple[int, int], causal: bool, seed: int
) -> tuple[list[torch.Tensor], Any]:
    """Two heads: inputs and output."""
    heads, (queries, keys) = 2, lengths
    generator = np.random.default_rng(seed)
    arrays = [
        encode(generator.standard_normal((1, heads, length, row.head_dim)), row.dtype)
        for length in (queries, keys, keys)
    ]
    plan = _native.plan(
        family="apple10",
        dtype=row.dtype,
        query_heads=heads,
        key_heads=heads,
        query_length=queries,
        key_length=keys,
        head_dim=row.head_dim,
        value_dim=row.head_dim,
        scale=row.head_dim**-0.5,
        window_right=0 if causal else None,
    )
    out = np.zeros_like(arrays[0])
    tensors = zip(("query", "key", "value", "out"), (*arrays, out), strict=True)
    library.dispatch(
        row.kernel,
        grid=(heads, -(-queries // row.rows), 1),
        group=(32 * row.simdgroups,),
        arguments={
            **{ARGUMENTS[name]: array for name, array in tensors},
            ARGUMENTS["lse"]: np.zeros((heads, queries), np.float32),
            ARGUMENTS["params"]: bytes(plan.params),
        },
        constants=variants.constants_of(plan.launches[0]),
        checks=RACES | BOUNDS,
        seed=seed,
    )
    decoded = [torch.from_numpy(decode(array, row.dtype)) for array in (*arrays, out)]
    return [tensor.to(DTYPES[row.dtype]) for tensor in decoded[:3]], decoded[3]


def test_what_variants_replace_is_there(tmp_path: Path) -> None:
    for number, variant in enumerate(variants.variants()):
        build.patched(tmp_path / str(number), variant.patches)


@pytest.mark.simulator
@pytest.mark.parametrize("variant", list(each_variant()))
def test_a_variant_is_right(variant: Variant, tmp_path: Path) -> None:
    metal = build.patched(tmp_path, variant.patches)
    source = tmp_path / "kernel.metal"
    source.write_text(variants.source(variant.row))
    options: dict[str, Any] = {"standard": "metal4.0", "include_dirs": [metal]}
    library = open_library(build_kernels([source], tmp_path / "kernel.so", **options))
    # SIMD-groups meet at a threadgroup barrier only if they walk the same blocks.
    problems = (
        [((128, 256), False)] if "threadgroup barrier" in variant.name else [((130, 97), False), ((77, 160), True)]
    )
    for seed, (lengths, causal) in enumerate(problems, 1):
        (query, key, value), out = run(library, variant.row, lengths, causal, seed)
        window = (None, 0) if causal else (None, None)
        exact = oracle.attention(query, key, value, window=window)[0]
        error = (out - exact).abs()
        if variant.row.dtype == "f16" and variant.name.endswith(("P cut", "never refined")):
            # They leave what keeps the error rule: each P is right to 10 bits.
            summands = oracle.attention(query, key, value.abs(), window=window)[0]
            assert (error <= 2**-10 * summands + 2**-11 * exact.abs()).all()
        else:
            plain = oracle.composition(query, key, value, window=window)[0]
            assert oracle.largest_error(out, exact) <= oracle.tolerance(plain, exact)


@pytest.mark.simulator
def test_a_source_that_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", xcrun.install(tmp_path))
    source = tmp_path / "wrong.metal"
    source.write_text("kernel void wrong(device float* x) { x[0] = y; }\n")
    with pytest.raises(build.CompileError, match="use of undeclared identifier 'y'"):
        build.metallib(source)


def test_a_patch_of_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metal/unit/forward\.h has 'no such text' 0 times, not once"):
        build.patched(tmp_path, [build.Patch("unit/forward.h", "no such text", "")])


def test_rows_are_those_of_the_kernels() -> None:
    catalogue = {instance.name: instance for instance in _native.catalogue()}
    for name, row in variants.rows_of_instances().items():
        assert (catalogue[name].rows, catalogue[name].memory, catalogue[name].block) == (
            row.rows,
            row.memory,
            row.block,
        )
    assert {row.kernel for row in variants.rows_of_instances().values()} == {
        instance.name for instance in catalogue.values() if (instance.kind, instance.path) == ("forward", "unit")
    }


def test_a_row_of_tuning_is_the_autotuners() -> None:
    for instance in _native.catalogue():
        if (instance.kind, instance.path) == ("forward", "unit"):
            row = variants.rows_of_instances()[instance.name]
            assert row.tuning == autotune.row_of(instance, "apple10")


def test_what_is_compiled_for_the_unit_is_what_a_plan_launches() -> None:
    pipelines = {pipeline.name for pipeline in instances.pipelines(on_unit=True)}
    for dim in (64, 80, 96, 128):
        plan = _native.plan_backward(
            family="apple10", dtype="bf16", query_length=512, key_length=512, head_dim=dim, value_dim=dim
        )
        for launch in plan.launches:
            wants = {name for name in ("key", "value") if launch.constants[f"wants_grad_{name}"]}
            variant = {("key",): "/dk", ("value",): "/dv"}.get(tuple(wants), "")
            assert f"{launch.kernel}{variant}" in pipelines or "delta" in launch.kernel


# -- answers ----------------------------------------------------------------------------------------------------------


def placed(as_expected: bool, sums_as_expected: bool) -> dict[str, Any]:
    good = {"places": [], "as_expected": True, "sums_as_expected": True}
    return {"a": good, "b": {**good, "as_expected": as_expected, "sums_as_expected": sums_as_expected}}


def chains(alone: float, full: float, deep: float, first: bool = True) -> dict[str, Any]:
    """Clocks of a product of 16x32x16, and those of a deeper one as a share."""
    clocks = {
        key: {"chain_16x32x16_1": each, "chain_16x32x32_1": deep * each} for key, each in (("4", alone), ("32", full))
    }
    return {"hertz": 1.6e9, "clocks_per_product": clocks, "adds_c_first": {"16x32x16": first, "16x16x32": True}}


def works(together: float, apart: float) -> dict[str, Any]:
    """Where products alone take 2, and arithmetic 1."""
    taken = {"products": 2.0, "arithmetic": 1.0, "together": together, "apart": apart}
    return {"8": {**taken, "together": 9.0}, "16": taken, "32": {**taken, "together": 9.0}}


def gains(*times_as_fast: float) -> dict[str, Any]:
    return {f"D {i}": {"times_as_fast": each, "means": f"line {i}"} for i, each in enumerate(times_as_fast)}


@pytest.mark.parametrize(
    ("question", "measured", "said"),
    [
        ("layout", placed(True, True), "bit for bit: nothing changes"),
        ("layout", {**placed(True, True), "c": {"error": "static_assert"}}, "There is no c. Elements and sums are as"),
        ("layout", placed(False, True), "Elements are elsewhere in b: metal/unit/product.h"),
        ("layout", placed(True, False), "but b add up otherwise: the simulator's"),
        ("adder", chains(36, 32, 1), "The unit adds C, before the products; a product takes 36 clocks of a SIMD-group"),
        ("adder", chains(36, 32, 1), "UNIT (32) and UNIT_ALONE (36) hold"),
        ("adder", chains(44, 32, 1), "UNIT_ALONE in src/mfa/bench/model.py, 36, is to follow"),
        ("adder", chains(44, 40, 0.8, False), "C is added last in 16x32x16, so by ALUs"),
        ("adder", chains(44, 40, 0.8, False), "1.25 times as many as one 32 deep: multiply_tiles()"),
        ("overlap", works(2.5, 2.4), "exposed in src/mfa/bench/model.py is 0.50 (view 'issue'); nothing else"),
        ("overlap", works(2.5, 2.4), "With 4 SIMD-groups per scheduler, 50% of arithmetic shows"),
        ("overlap", works(2.5, 2.0), "SIMD-groups of unequal phase pay"),
        ("overlap", works(2.1, 2.0), "is 0.10 (view 'l1')"),
        (
            "spills",
            {"most_threads": {"a": 384, "b": 512, "c": 384}, "share_of_peak": {"a": 0.86, "b": 0.85}},
            "2 of 3 kernels get the fewest threads, 384: a, c. No D falls behind (86% of the peak at best)",
        ),
        (
            "spills",
            {"most_threads": {"a": 384}, "share_of_peak": {"a": 0.86, "b": 0.6}},
            "b fall behind the best D (86% of the peak)",
        ),
        ("compared", gains(0.9, 1.01), "What mfa ships stays: the best of the others is 1.01 times as fast (D 1)"),
        ("compared", gains(1.07, 1.0, 1.03), "D 0 is 1.07 times as fast: line 0; D 2 is 1.03 times as fast: line 2."),
        ("cost", gains(1.25), "D 0: 0.80 of the shipped kernel's time. Accuracy decides"),
        (
            "l1",
            {"4096": {"8": 50.0, "32": 120.0}, "65536": {"8": 200.0}},
            "120 bytes per clock from L1: the view 'issue'",
        ),
        ("l1", {"4096": {"8": 66.0}}, "L1 binds: what reads less pays"),
        ("mlx", {"a": {"ratio": 1.2}, "b": {"ratio": 1.05}}, "mfa is at least 1.05 times as fast as MLX's kernel"),
        ("mlx", {"a": {"ratio": 1.2}, "b": {"ratio": 0.9}}, "MLX's kernel is faster at b (0.90)"),
    ],
)
def test_answers(question: str, measured: dict[str, Any], said: str) -> None:
    answer = getattr(answers, question)(measured)
    assert said in answer
    assert answer.endswith(".")


def test_without_mlx_the_report_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx", None)
    found = questions.mlx(None)  # type: ignore[arg-type]
    assert found["measured"] == {}
    assert "pip install mlx" in found["answer"]
