"""The questions, in the design's order. Each measures on the GPU at hand; `answers` says what that means for mfa.

A result is {"question", "measured", "answer"}, ready for JSON; seconds are the GPU's own.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from agx_check import instances
from encoding import decode
from unit_products import M5, Product, places, source_of

from mfa.bench.model import SCHEDULERS, UNIT

from . import answers, build, variants
from .metal import Device, Launch, Library, MetalError
from .variants import Attention, Problem

HERE = Path(__file__).parent
PROBLEM = Problem(heads=32, length=4096)
STEPS = 20_000  # of a probe: some milliseconds
ROUNDS, REPEATS = 5, 8  # of a comparison; launches of each
MOST = 16  # SIMD-groups of a core: four per scheduler, which have 104 registers each
SIMDGROUPS = 4, 8, MOST
SOURCES = "*ward_*.metal"  # of metal/unit/: those with kernels of the two passes
REGIONS = 4 << 10, 16 << 10, 64 << 10, 4 << 20  # bytes that a core reads again and again
MLX_SHAPES = [
    (dtype, dim, causal) for dtype in ("float16", "bfloat16") for dim in (64, 128) for causal in (False, True)
]

# What kernels multiply: S of 32 keys and of 16, P V whole and of half a set; then what they could.
PRODUCTS = [
    Product("f16_f16_f32", (16, 32, 16), right=True),
    Product("bf16_bf16_f32", (16, 16, 32), right=True),
    Product("f32_f16_f32", (16, 32, 16)),
    Product("f32_bf16_f32", (16, 16, 32)),
    Product("f16_f16_f32", (32, 32, 16)),
    Product("f16_f16_f32", (16, 32, 32)),
    Product("f16_f16_f32", (32, 32, 32)),
]


class Bench:
    """The GPU, its number of cores, and a folder for what is compiled."""

    def __init__(self, folder: Path, cores: int) -> None:
        self.folder, self.cores, self.device = folder, cores, Device()

    def compiled(self, name: str, text: str) -> Library:
        source = self.folder / f"{name}.metal"
        source.write_text(text, encoding="utf-8")
        return self.device.library(build.metallib(source))

    def probes(self) -> Library:
        return self.compiled("probes", (HERE / "probes.metal").read_text(encoding="utf-8"))

    def least(self, launches: Sequence[Launch], times: int = 1) -> list[float]:
        """Seconds of each, the least of several rounds in turns, after one that isn't counted."""
        rounds = [[self.device.run(launch, times) / times for launch in launches] for _ in range(ROUNDS + 1)]
        return [min(column) for column in zip(*rounds[1:], strict=True)]

    def probe(self, library: Library, kernel: str, simdgroups: int) -> Launch:
        """One threadgroup per core."""
        threads = 32 * simdgroups
        out = self.device.buffer(np.zeros(self.cores * threads, np.float32))
        operands = struct.pack("ffi", 0.5, 2, STEPS)
        return Launch(library.pipeline(kernel), (self.cores, 1, 1), (threads, 1, 1), {0: out, 1: operands})

    def hertz(self, library: Library) -> float:
        """Of the clock, if a product of 16x16x16 takes a scheduler's unit 32 of it, and a full core keeps it busy."""
        (seconds,) = self.least([self.probe(library, "chain_16x32x16_1", MOST)])
        return 2 * STEPS * UNIT * MOST / SCHEDULERS / seconds


def multiplied_by_unit(
    bench: Bench, library: Library, product: Product, *matrices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of left, right and destination: the destination after, and the places of all elements."""
    places_found = np.full((32, sum(x.size for x in matrices) // 32, 2), -1, np.int32)
    buffers = dict(enumerate(map(bench.device.buffer, (*matrices, places_found))))
    bench.device.run(Launch(library.pipeline(product.name), (1, 1, 1), (32, 1, 1), buffers))
    return buffers[2].read(), buffers[3].read()


def layout(bench: Bench) -> dict[str, Any]:
    """Of each operand, of each lane the column and row of its elements."""
    measured: dict[str, Any] = {}
    for product in PRODUCTS:
        *matrices, expected = product.problem(seed=0)
        try:  # which of the shapes that nobody uses there are, is part of the question
            library = bench.compiled(product.name, source_of([product]))
            sums, found = multiplied_by_unit(bench, library, product, *matrices)
        except (build.CompileError, MetalError) as error:
            measured[product.name] = {"error": str(error)}
            continue
        measured[product.name] = {
            "places": [" ".join(f"{x},{y}" for x, y in lane) for lane in found],
            "as_expected": bool((found == places(M5, product)).all()),
            "sums_as_expected": bool((sums == expected).all()),
        }
    return {"measured": measured, "answer": answers.layout(measured)}


def adder(bench: Bench) -> dict[str, Any]:
    """Chains of products, by shape; and what becomes of a C that is too large for each of four summands alone."""
    library = bench.probes()
    kernels = [f"chain_16x{shape}_{chains}" for chains in (1, 2) for shape in ("32x16", "16x32", "32x32")]
    hertz, clocks = bench.hertz(library), {}
    for simdgroups in SIMDGROUPS:
        seconds = bench.least([bench.probe(library, kernel, simdgroups) for kernel in kernels])
        of = clocks[str(simdgroups)] = {}
        for kernel, taken in zip(kernels, seconds, strict=True):
            columns, depth, chains = map(int, re.findall(r"x(\d+)x(\d+)_(\d)", kernel)[0])
            products = STEPS * chains * columns * depth // 256 * simdgroups / SCHEDULERS
            of[kernel] = taken * hertz / products
    measured = {"hertz": hertz, "clocks_per_product": clocks, "adds_c_first": adds_c_first(bench)}
    return {"measured": measured, "answer": answers.adder(measured)}


def large_sums(product: Product) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left, right and C: 2^24, to which the unit adds four ones per 16 of the depth. Each by itself would be lost."""
    m, n, k = product.shape
    left, right = np.ones((m, k), np.float16), np.zeros((k, n), np.float16)
    for first in range(0, k, 16):
        right[first : first + 8 : 2] = 1  # one in each of the four sums of a product
    return left, right, np.full((m, n), 2.0**24, np.float32)


def adds_c_first(bench: Bench) -> dict[str, bool]:
    """By shape, whether C + 1 + 1 + ... is what the unit computes, or C + (1 + 1 + ...)."""
    products = [Product("f16_f16_f32", shape) for shape in ((16, 32, 16), (16, 16, 32), (16, 32, 32))]
    library = bench.compiled("large_sums", source_of(products))
    found = {}
    for product in products:
        sums, _ = multiplied_by_unit(bench, library, product, *large_sums(product))
        found["x".join(map(str, product.shape))] = bool((sums == 2**24).all())
    return found


def overlap(bench: Bench) -> dict[str, Any]:
    """Products and 32 multiply-adds each, alone, in the same SIMD-groups, and in others."""
    library, measured = bench.probes(), {}
    works = ("products", "arithmetic", "together", "apart")
    for simdgroups in SIMDGROUPS[1:]:  # of four, each scheduler has but one
        launches = [bench.probe(library, f"beside_{work}", simdgroups) for work in works]
        measured[str(simdgroups)] = dict(zip(works, bench.least(launches), strict=True))
    return {"measured": measured, "answer": answers.overlap(measured)}


WITHOUT_LIMIT = re.compile(r", max_total_threads_per_threadgroup\([^\]]*\)")


def spills(bench: Bench) -> dict[str, Any]:
    """How many threads each kernel could have, and how near forward comes to the unit's peak at each D."""
    metal = build.patched(bench.folder, ())
    for header in metal.rglob("*.h"):
        header.write_text(WITHOUT_LIMIT.sub("", header.read_text(encoding="utf-8")), encoding="utf-8")
    sources = sorted((metal / "unit").glob(SOURCES))
    libraries = [bench.device.library(build.metallib(source, metal)) for source in sources]
    of = {name: library for library in libraries for name in library.names()}
    threads = {
        each.name: of[each.kernel].pipeline(each.kernel, instances.constants_of(each)).most_threads
        for each in instances.pipelines(on_unit=True)
    }
    peak = 2 * 16**3 / UNIT * SCHEDULERS * bench.hertz(bench.probes()) * bench.cores
    shares = {}
    for row in variants.rows_of_instances().values():
        if row.dtype not in variants.DTYPES or row.head_dim != row.value_dim:
            continue
        if row == variants.shipped(row.dtype, row.head_dim):
            attention = Attention(bench.device, PROBLEM, row.dtype, row.head_dim)
            library = bench.device.library(variants.compiled(bench.folder / row.kernel, row))
            launch = attention.launch(library.pipeline(row.kernel, attention.constants()), row)
            (seconds,) = bench.least([launch], REPEATS)
            shares[row.kernel] = PROBLEM.operations(row) / (seconds * peak)
    measured = {"most_threads": threads, "share_of_peak": shares}
    return {"measured": measured, "answer": answers.spills(measured)}


def compared(bench: Bench, question: str) -> dict[str, Any]:
    """Variants of shipped kernels, each beside its own."""
    measured: dict[str, Any] = {}
    for number, variant in enumerate(variants.of_question(question)):
        folder, dtype = bench.folder / str(number), variant.row.dtype
        attention = Attention(bench.device, PROBLEM, dtype, variant.row.head_dim)
        launches = []
        for row, patches in ((variant.base, ()), (variant.row, variant.patches)):
            path = variants.compiled(folder / str(len(launches)), row, patches)
            pipeline = bench.device.library(path).pipeline(row.kernel, attention.constants())
            launches.append(attention.launch(pipeline, row))
        before, after = bench.least(launches, REPEATS)
        outs = [decode(variants.out_of(launch), dtype) for launch in launches]
        measured[f"{dtype}, {variant.name}"] = {
            "shipped": variant.base.kernel,
            "seconds_shipped": before,
            "seconds": after,
            "times_as_fast": before / after,
            "largest_difference": float(np.abs(outs[1] - outs[0]).max()),
            "means": variant.means,
        }
    answer = answers.cost(measured) if question == "rounding" else answers.compared(measured)
    return {"measured": measured, "answer": answer}


def l1(bench: Bench) -> dict[str, Any]:
    """Bytes per clock that a core gets, by the size of what it reads."""
    library = bench.probes()
    hertz, measured = bench.hertz(library), {}
    words = np.random.default_rng(0).integers(0, 2**32, max(REGIONS) // 4, np.uint32)
    source = bench.device.buffer(words)
    for region in REGIONS:
        for simdgroups in SIMDGROUPS[1:]:
            out = bench.device.buffer(np.zeros(bench.cores * simdgroups * 32, np.uint32))
            arguments = {0: source, 1: out, 2: struct.pack("II", STEPS, region // 16 - 1)}
            pipeline = library.pipeline("loads")
            launch = Launch(pipeline, (bench.cores, 1, 1), (32 * simdgroups, 1, 1), arguments)
            (seconds,) = bench.least([launch])
            measured.setdefault(str(region), {})[str(simdgroups)] = STEPS * simdgroups * 4096 / (seconds * hertz)
    return {"measured": measured, "answer": answers.l1(measured)}


def mlx(bench: Bench) -> dict[str, Any]:
    """mfa and MLX by turns, as their users call them."""
    if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx.core") is None:
        return {"measured": {}, "answer": answers.NO_MLX}
    import mlx.core

    from . import against_mlx

    measured = {}
    for dtype, dim, causal in MLX_SHAPES:
        seconds = against_mlx.seconds(mlx.core, PROBLEM, dtype, dim, causal, ROUNDS)
        measured[f"{dtype}, D {dim}{', causal' * causal}"] = {**seconds, "ratio": seconds["mlx"] / seconds["mfa"]}
    return {"measured": measured, "answer": answers.mlx(measured)}


def _comparison(question: str) -> Callable[[Bench], dict[str, Any]]:
    return lambda bench: compared(bench, question)


QUESTIONS: dict[str, tuple[str, Callable[[Bench], dict[str, Any]]]] = {
    "layout": ("Where are a product's elements, and in what order does it add?", layout),
    "adder": ("Does the unit add C, or do ALUs? What does a product cost by its shape?", adder),
    "overlap": ("How much of other instructions do products hide, in a SIMD-group and across them?", overlap),
    "spills": ("Which kernels take all registers, and does speed fall with D?", spills),
    "queries": ("Is Q to be held in registers, or read again for every block?", _comparison("queries")),
    "unroll": ("How many sets of D is a step of the loop over Q K' to have?", _comparison("unroll")),
    "barrier": ("Do barriers that keep SIMD-groups in step make the pass faster?", _comparison("barrier")),
    "block": ("How many keys is a step to have?", _comparison("block")),
    "simdgroups": ("Are eight SIMD-groups per threadgroup better than four?", _comparison("simdgroups")),
    "rounding": ("What do rounding P and refining products cost?", _comparison("rounding")),
    "l1": ("Which of the cost model's views is right: does L1 bind?", l1),
    "mlx": ("How does mfa compare with MLX's kernel?", mlx),
}


def ask(name: str, cores: int) -> dict[str, Any]:
    """Raises MetalError or CompileError."""
    question, measure = QUESTIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        return {"question": question, **measure(Bench(Path(folder), cores))}
