"""`python -m mfa bench --model CHIP`: what the cost model predicts, beside MLX's kernels, and how it errs."""

import math
from collections.abc import Iterator

from . import kernels, model, model_decode, model_varlen
from .chips import CHIPS, Chip
from .model import Problem
from .model_decode import Decoding
from .model_varlen import Packed

HEAD_DIMS = (64, 80, 96, 128, 256)
BACKWARD_DIMS = (64, 80, 96, 128, 320, 384, 512)
UNIT_DIMS = (64, 80, 96, 128, 192, 256, 320, 384, 512)
SEED = Problem(4, 8, 2048, 64)  # the problem that mps-flash-attn published timings of, on M1 Max
SEED_FORWARD_MS, SEED_TRAINING_MS = 5.3, 55


GROUPS = (1, 4, 8, 16)  # query heads per key head
WINDOWS = ((8, 4), (8, 8), (8, 16))  # with tokens that a draft model proposed, to be verified
CACHE_KEYS = (1024, 4096, 32768)
PACKED_HEADS, PACKED_LENGTHS = 2, model_varlen.spread(64, 2048)


def shape(head_dim: int, causal: bool = False) -> Problem:
    """The problem of the tables."""
    return Problem(1, 32, 4096, head_dim, causal)


def steel(
    table: dict[str, kernels.Kernel], problem: Problem, chip: Chip, view: model.View = model.VIEWS["issue"]
) -> model.Prediction:
    """MLX's forward kernel; of the matrix unit, where it pads to a multiple of 32, the one for that."""
    on_unit = f"steel_nax_f16_d{math.ceil(problem.head_dim / 32) * 32}"
    name = on_unit if chip.has_unit and on_unit in table else f"steel_f16_d{problem.head_dim}"
    return model.predict(table[name], problem, chip, model.tensor_bytes(problem, 4), view=view)


def utilisation(problem: Problem, products: int, seconds: float, chip: Chip) -> float:
    """The share of the peak that goes into the products of scores that are seen."""
    return problem.operations(products) / seconds / chip.peak


def forward_rows(table: dict[str, kernels.Kernel], chip: Chip) -> Iterator[str]:
    heading = f"{'D':>4} {'kernel':38}{'dense':>8}{'if *':>7}{'causal':>8}{'bound':>12}"
    yield f"{heading}{'MLX':>7}{'bound':>12}  pipes worse than MLX's"
    for dim in HEAD_DIMS:
        dense, causal = shape(dim), shape(dim, causal=True)
        (ours,) = model.forward(table, dense, chip)
        shares = [
            utilisation(dense, 2, ours.seconds, chip),
            utilisation(dense, 2, model.seconds(model.forward(table, dense, chip, model.WIDE_MMA)), chip),
            utilisation(causal, 2, model.seconds(model.forward(table, causal, chip)), chip),
        ]
        theirs = steel(table, dense, chip)
        worse = [name for name, value in ours.pipes.items() if value > theirs.pipes[name] * 1.0001]
        yield (
            f"{dim:>4} {ours.kernel:38}{shares[0]:>8.1%}{shares[1]:>7.1%}{shares[2]:>8.1%}{ours.bound:>12}"
            f"{utilisation(dense, 2, theirs.seconds, chip):>7.1%}{theirs.bound:>12}  {', '.join(worse) or 'none'}"
        )


def unit_rows(table: dict[str, kernels.Kernel], chip: Chip) -> Iterator[str]:
    """What the plan has on the matrix unit."""
    yield f"{'D':>4} {'forward':38}" + "".join(f"{f'{name}: dense':>14}{'causal':>8}{'MLX':>7}" for name in model.VIEWS)
    for dim in UNIT_DIMS:
        problems = shape(dim), shape(dim, causal=True)
        names = model.plan_forward(problems[0], chip)
        if not on_unit(table, names):
            continue
        cells, has_mlx = "", dim in HEAD_DIMS
        for view in model.VIEWS.values():
            times = [model.seconds(model.forward(table, problem, chip, view=view)) for problem in problems]
            dense, causal = (utilisation(p, 2, seconds, chip) for p, seconds in zip(problems, times, strict=True))
            theirs = utilisation(problems[0], 2, steel(table, problems[0], chip, view).seconds, chip) if has_mlx else ""
            cells += f"{dense:>14.1%}{causal:>8.1%}{theirs:>7{'.1%' if has_mlx else ''}}"
        yield f"{dim:>4} {', '.join(names):38}{cells}"
    yield f"{'D':>4} {'backward':38}" + "".join(
        f"{f'{name}: dense':>14}{'causal':>8}{'of 5':>7}" for name in model.VIEWS
    )
    for dim in UNIT_DIMS:
        problems = shape(dim), shape(dim, causal=True)
        names = model.plan_backward(problems[0], chip)
        cells, made = "", sum(map(model.products_of, names))
        for view in model.VIEWS.values():
            times = [model.seconds(model.backward(table, problem, chip, view=view)) for problem in problems]
            dense, causal = (utilisation(p, made, seconds, chip) for p, seconds in zip(problems, times, strict=True))
            cells += f"{dense:>14.1%}{causal:>8.1%}{utilisation(problems[0], 5, times[0], chip):>7.1%}"
        yield f"{dim:>4} {f'{made} products':38}{cells}"


def on_unit(table: dict[str, kernels.Kernel], names: list[str]) -> bool:
    return any(name in table and table[name].unit_mma > 0 for name in names)


def backward_rows(table: dict[str, kernels.Kernel], chip: Chip) -> Iterator[str]:
    yield f"{'D':>4} {'mode':12}{'dense':>8}{'causal':>8}{'as of 5 GEMMs':>15}"
    for dim in BACKWARD_DIMS:
        dense, causal = shape(dim), shape(dim, causal=True)
        for mode in ("seven_gemm", "five_gemm"):
            names = model.plan_backward(dense, chip, mode)
            if mode == "five_gemm" and any("_unit_" in name for name in names):
                continue  # the matrix unit has no such mode
            products = sum(map(model.products_of, names))
            times = [model.seconds(model.backward(table, problem, chip, mode)) for problem in (dense, causal)]
            yield (
                f"{dim:>4} {mode:12}{utilisation(dense, products, times[0], chip):>8.1%}"
                f"{utilisation(causal, products, times[1], chip):>8.1%}{utilisation(dense, 5, times[0], chip):>15.1%}"
            )


def decoding(head_dim: int, group: int, keys: int, tokens: int = 1) -> Decoding:
    """One sequence: where decoding is hardest to spread over a GPU."""
    return Decoding(1, 8, group, keys, head_dim, tokens)


def decode_rows(table: dict[str, kernels.Kernel], chip: Chip) -> Iterator[str]:
    heading = (
        f"{'D':>4}{'keys':>7}{'heads':>7}{'tokens':>7} {'kernel':36}{'splits':>7}{'us':>7}{'forward':>8}{'share':>7}"
    )
    yield f"{heading}{'bound':>9}{'next':>6}  best by the model"
    for dim in (64, 128):
        for keys in CACHE_KEYS:
            for group, tokens in (*((group, 1) for group in GROUPS), *WINDOWS):
                problem = decoding(dim, group, keys, tokens)
                ways = (model_decode.planned, model_decode.unpacked, model_decode.best)
                ours, forward, best = (way(table, problem, chip) for way in ways)
                others = max(value for name, value in ours.pipes.items() if name != "device")
                ours_share, best_share = (model_decode.share(problem, way.seconds, chip) for way in (ours, best))
                yield (
                    f"{dim:>4}{keys:>7}{group:>7}{tokens:>7} {ours.kernel:36}{ours.splits:>7}{ours.seconds * 1e6:>7.0f}"
                    f"{forward.seconds * 1e6:>8.0f}{ours_share:>7.1%}{ours.bound:>9}"
                    f"{others / ours.pipes['device']:>6.0%}  {best.kernel}, {best.splits} splits: {best_share:.1%}"
                )


def packed(head_dim: int, causal: bool = False) -> Packed:
    return Packed(PACKED_HEADS, PACKED_LENGTHS, head_dim, causal)


def packed_share(kernel: kernels.Kernel, problem: Packed, chip: Chip, sequences: list[Problem] | None = None) -> float:
    """Of the float32 peak; the sequences start in the order of tile_map, or in this one."""
    sequences = sequences or model_varlen.by_class(problem.sequences)
    return problem.operations / model_varlen.seconds(kernel, sequences, chip) / chip.peak


def equal_share(table: dict[str, kernels.Kernel], problem: Packed, chip: Chip) -> float:
    """Of as many tokens in a dense batch of as many sequences."""
    count = len(problem.lengths)
    equal = Problem(count, problem.heads, sum(problem.lengths) // count, problem.head_dim, problem.causal)
    return utilisation(equal, 2, model.seconds(model.forward(table, equal, chip)), chip)


def padded_share(table: dict[str, kernels.Kernel], problem: Packed, chip: Chip) -> float:
    """Of a dense batch in which all are as long as the longest; only real tokens count."""
    padded = Problem(len(problem.lengths), problem.heads, max(problem.lengths), problem.head_dim, problem.causal)
    return problem.operations / model.seconds(model.forward(table, padded, chip)) / chip.peak


def varlen_rows(table: dict[str, kernels.Kernel], chip: Chip) -> Iterator[str]:
    heading = f"{'D':>4} {'':7}{'kernel':38}{'share':>7}{'equal':>7}{'padded':>8}{'rising':>8}"
    yield f"{heading}  other tiles"
    for dim in (64, 128):
        for causal in (False, True):
            problem = packed(dim, causal)
            kernel = model_varlen.planned(table, problem, chip)
            rising = sorted(problem.sequences, key=lambda sequence: sequence.length)
            others = ", ".join(
                f"{other.name.removeprefix('forward_f16_')} {packed_share(other, problem, chip):.1%}"
                for other in table.values()
                if other.name.startswith(f"forward_f16_d{dim}_v{dim}_staged") and other.name != kernel.name
            )
            share = packed_share(kernel, problem, chip)
            yield (
                f"{dim:>4} {'causal' if causal else 'dense':7}{kernel.name:38}{share:>7.1%}"
                f"{equal_share(table, problem, chip):>7.1%}{padded_share(table, problem, chip):>8.1%}"
                f"{packed_share(kernel, problem, chip, rising):>8.1%}  {others}"
            )


def tile_rows(table: dict[str, kernels.Kernel], chip: Chip) -> Iterator[str]:
    """Every tile there is, also those that tuning.def does not choose."""
    yield f"{'tile':46}{'registers':>10}{'KiB':>6}{'groups':>8}{'alone':>8}"
    for kernel in table.values():
        if kernel.unit_mma and not chip.has_unit:
            continue
        if kernel.name.startswith("steel") or kernel.kind == "decode" or "_d192_v128" in kernel.name:
            continue
        if kernel.path == "direct" and not chip.has_side_pipe:
            continue
        problem = shape(kernel.head_dim)
        prediction = model.predict(kernel, problem, chip, 0)
        yield (
            f"{kernel.name:46}{kernel.registers:>10}{kernel.threadgroup_memory / 1024:>6.1f}{prediction.resident:>8}"
            f"{utilisation(problem, model.products_of(kernel.name), prediction.seconds, chip):>8.1%}"
        )


def published_rows(table: dict[str, kernels.Kernel]) -> Iterator[str]:
    yield f"{'kernel':20}{'chip':10}{'N':>6}{'published':>11}{'model':>7}{'error':>8}  source"
    for point in model.PUBLISHED:
        chip = CHIPS[point.chip]
        views = model.VIEWS if chip.has_unit else {"": model.VIEWS["issue"]}
        for name, view in views.items():
            predicted = model.predicted_teraflops(table, point, chip, view)
            yield (
                f"{point.kernel:20}{chip.name:10}{point.problem.length:>6}{point.teraflops:>8.1f} TF"
                f"{predicted:>7.1f}{predicted / point.teraflops - 1:>+8.0%}  {point.source}{name and f', {name}'}"
            )


def seed_row(table: dict[str, kernels.Kernel], chip: Chip) -> str:
    forward = model.seconds(model.forward(table, SEED, chip))
    seven, five = (model.seconds(model.backward(table, SEED, chip, mode)) for mode in ("seven_gemm", "five_gemm"))
    return (
        f"B4 H8 N2048 D64 on {chip.name}, predicted: forward {1e3 * forward:.1f} ms, with backward "
        f"{1e3 * (forward + seven):.1f} ms (seven GEMMs) or {1e3 * (forward + five):.1f} ms (five); "
        f"mps-flash-attn's own on M1 Max: {SEED_FORWARD_MS} and {SEED_TRAINING_MS} ms"
    )


def lines(chip: Chip, tiles: bool = False) -> Iterator[str]:
    """The report. The last line is about the seed's problem."""
    table = kernels.of_float16()
    peak = f"{chip.peak / 1e12:.1f} TFLOP/s {'on the matrix unit' if chip.has_unit else 'float32'}"
    yield f"{chip.name}: {chip.cores} cores at {chip.ghz} GHz, {peak}, {chip.bandwidth} GB/s: the peak of what follows."
    yield "A model, fitted to others' timings on M3 and M5, not checked on M1 and M2; we measured nothing on a Mac."
    yield ""
    yield "Forward, float16, 32 heads, N 4096, share of the peak. *: if a mixed MMA costs what a wide one does."
    yield from forward_rows(table, chip)
    yield ""
    if chip.has_unit:
        yield "On the matrix unit, by both explanations of MLX's timings. issue, as in the rest: half of what is done"
        yield "beside products shows; l1: L1 gives 64 bytes per clock."
        yield from unit_rows(table, chip)
        yield ""
    yield "Backward, of the products that it makes."
    yield from backward_rows(table, chip)
    yield ""
    yield "Decode, float16, one token, 8 key heads, so many query heads on each. share: of the bandwidth, K and V once."
    yield "next: the slowest other pipe, as a share of the time that device memory takes."
    yield from decode_rows(table, chip)
    yield ""
    count, longest = len(PACKED_LENGTHS), max(PACKED_LENGTHS)
    yield f"Varlen, float16, {PACKED_HEADS} heads, {count} sequences of 1 to {longest} tokens, share of the peak."
    yield "equal: as many tokens in equal sequences. padded: all as the longest. rising: the short ones start first."
    yield from varlen_rows(table, chip)
    yield ""
    if tiles:
        yield "Tiles, each as the only launch. Registers are an estimate from optimised IR; M1 has 128 per thread."
        yield from tile_rows(table, chip)
        yield ""
    yield "Published timings of MLX's kernels, predicted."
    yield from published_rows(table)
    yield ""
    yield seed_row(table, chip)
