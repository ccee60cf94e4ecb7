"""What a measurement means for mfa, in a sentence: which line of it changes, or that none does."""

from __future__ import annotations

import math
from typing import Any

from mfa.bench.model import UNIT, UNIT_ALONE, VIEWS

MARGIN = 1.02  # by which something must be faster, as autotune has it
CLOSE = 0.1  # of what is expected, as a share
NO_MLX = "Not measured: mlx.core can't be imported. `.venv/bin/pip install mlx` installs it; then run this part again."


def layout(measured: dict[str, Any]) -> str:
    refused = [name for name, each in measured.items() if "error" in each]
    placed = {name: each for name, each in measured.items() if name not in refused}
    misplaced = [name for name, each in placed.items() if not each["as_expected"]]
    others = [name for name, each in placed.items() if each["as_expected"] and not each["sums_as_expected"]]
    if misplaced:
        said = (
            f"Elements are elsewhere in {', '.join(misplaced)}: metal/unit/product.h and `places` in "
            "tests/unit_products.py are to follow the dump."
        )
    elif others:
        said = (
            f"Elements are where product.h takes them to be, but {', '.join(others)} add up otherwise: the simulator's "
            "arithmetic (csrc/simulator/msl/unit_product.h) is to change, kernels are not."
        )
    else:
        said = "Elements and sums are as product.h and the simulator have them, bit for bit: nothing changes."
    return f"There is no {', '.join(refused)}. {said}" if refused else said


def adder(measured: dict[str, Any]) -> str:
    clocks = measured["clocks_per_product"]
    alone, full = (clocks[key]["chain_16x32x16_1"] for key in (min(clocks, key=int), max(clocks, key=int)))
    gain = max(clocks[key]["chain_16x32x16_1"] / clocks[key]["chain_16x32x32_1"] for key in clocks)
    last = [shape for shape, first in measured["adds_c_first"].items() if not first]
    where = f"C is added last in {', '.join(last)}, so by ALUs" if last else "The unit adds C, before the products"
    said = f"{where}; a product takes {alone:.0f} clocks of a SIMD-group by itself and {full:.0f} of a full core"
    if gain > 1 + CLOSE:
        return (
            f"{said}, {gain:.2f} times as many as one 32 deep: multiply_tiles() in metal/unit/products.h should take "
            "32 of the depth at a time, 16x32x32."
        )
    if abs(alone / UNIT_ALONE - 1) > CLOSE:
        return f"{said}: UNIT_ALONE in src/mfa/bench/model.py, {UNIT_ALONE}, is to follow; shapes of products stay."
    return f"{said}, whatever its depth: products stay 16x32x16, and UNIT ({UNIT}) and UNIT_ALONE ({UNIT_ALONE}) hold."


def exposed(seconds: dict[str, float], beside: str) -> float:
    """The share of arithmetic that products don't hide."""
    return (seconds[beside] - seconds["products"]) / seconds["arithmetic"]


def overlap(measured: dict[str, Any]) -> str:
    shown = {key: {work: exposed(each, work) for work in ("together", "apart")} for key, each in measured.items()}
    middle = sorted(measured, key=int)[len(measured) // 2]
    inside, across = shown[middle]["together"], shown[middle]["apart"]
    said = (
        f"With {int(middle) // 4} SIMD-groups per scheduler, {inside:.0%} of arithmetic shows beside products of the "
        f"same SIMD-group, and {across:.0%} beside those of others"
    )
    view = min(VIEWS, key=lambda name: abs(VIEWS[name].exposed - inside))
    if inside - across > 0.2:
        return (
            f"{said}: View.exposed in src/mfa/bench/model.py is {inside:.2f} (view {view!r}), and SIMD-groups of "
            "unequal phase pay: more of them per core, no barrier."
        )
    return f"{said}: View.exposed in src/mfa/bench/model.py is {inside:.2f} (view {view!r}); nothing else changes."


def spills(measured: dict[str, Any]) -> str:
    threads, shares = measured["most_threads"], measured["share_of_peak"]
    fewest = min(threads.values())
    full = [name for name, count in threads.items() if count == fewest]
    best = max(shares.values())
    slow = [name for name, share in shares.items() if share < best * (1 - 1.5 * CLOSE)]
    said = f"{len(full)} of {len(threads)} kernels get the fewest threads, {fewest}: {', '.join(sorted(full))}"
    if slow:
        return (
            f"{said}. {', '.join(slow)} fall behind the best D ({best:.0%} of the peak): if the part `registers` shows "
            "that they spill, their rows of tuning.def take blocks of 16."
        )
    return f"{said}. No D falls behind ({best:.0%} of the peak at best): the rows of tuning.def stay."


def compared(measured: dict[str, Any]) -> str:
    better = [
        f"{name} is {each['times_as_fast']:.2f} times as fast: {each['means']}"
        for name, each in measured.items()
        if each["times_as_fast"] > MARGIN
    ]
    if better:
        return "; ".join(better) + "."
    best = max(measured, key=lambda name: measured[name]["times_as_fast"])
    gain = measured[best]["times_as_fast"]
    return f"What mfa ships stays: the best of the others is {gain:.2f} times as fast ({best})."


def cost(measured: dict[str, Any]) -> str:
    """What mfa does for accuracy, against a kernel that leaves it; and what refining everything would take."""
    words = [f"{name}: {1 / each['times_as_fast']:.2f} of the shipped kernel's time" for name, each in measured.items()]
    return "; ".join(words) + ". Accuracy decides, not this: docs/numerics.md may name the price."


def l1(measured: dict[str, Any]) -> str:
    smallest = measured[min(measured, key=int)]
    most = max(smallest.values())
    view = min(VIEWS, key=lambda name: abs(math.log(most / VIEWS[name].l1_bytes)))
    bound = {
        "issue": "L1 doesn't bind, so instructions do: fewer of them pay, and Q may be read again",
        "l1": "L1 binds: what reads less pays, Q held and larger blocks",
    }[view]
    return f"A core gets {most:.0f} bytes per clock from L1: the view {view!r} of src/mfa/bench/model.py. {bound}."


def mlx(measured: dict[str, Any]) -> str:
    slower = [f"{name} ({each['ratio']:.2f})" for name, each in measured.items() if each["ratio"] < 1 / MARGIN]
    if slower:
        return f"MLX's kernel is faster at {', '.join(slower)}: the other answers say where mfa loses it."
    least = min(each["ratio"] for each in measured.values())
    return f"mfa is at least {least:.2f} times as fast as MLX's kernel: its tiles stay."
