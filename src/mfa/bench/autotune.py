"""Measures the tiles of metal/instances.def that csrc/plan/tuning.def doesn't choose; prints the winners as a patch.

    for each bucket that has a choice:
        time each of its instances, preferred over tuning.def, alternating
        the fastest wins if it beats the tuned one by more than `margin`

Run it on the Mac that the rows are meant for; a row of tuning.def serves its GPU family and every later one.
Then it measures where ATen is faster (against_aten.py), and prints the rows of policy.json for this GPU.
"""

import argparse
import difflib
import itertools
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Measurement, Timer

from .. import _library, _native, device_info
from ..attention import attention
from ..sdpa import policy
from . import against_aten

TUNABLE = {"forward": "TUNE_FORWARD", "backward_dkdv": "TUNE_DKDV", "backward_dq": "TUNE_DQ"}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_FAMILIES = ("apple7", "apple8", "apple9", "apple10")
_FIRST = {"direct": "apple9", "unit": "apple10", "unit_team": "apple10"}  # family that runs a path
# Seconds of an instance's problem, with the instance preferred.
Clock = Callable[[_native.Instance], float]


class Bucket(NamedTuple):
    kind: str
    dtype: str
    head_dim: int
    value_dim: int


class Winner(NamedTuple):
    """A better tile than the one that tuning.def has."""

    bucket: Bucket
    tuned: _native.Instance
    best: _native.Instance
    gain: float  # how many times as fast


def row_of(instance: _native.Instance, family: str) -> str:
    """Its row in tuning.def."""
    own = f"{instance.own}, " if instance.kind == "backward_dq" else ""
    tiles = instance.name.rsplit("_r", 1)[1].split("_")[0]
    return (
        f"{TUNABLE[instance.kind]}({family}, {instance.dtype}, {own}{instance.head_dim}, {instance.value_dim}, "
        f"{instance.path}, {instance.simdgroups}, {tiles}, {instance.block})"
    )


def choices(family: str) -> dict[Bucket, list[_native.Instance]]:
    """The buckets with more than one instance; a direct one runs on M3 and later only, one of the unit on M5."""
    found: dict[Bucket, list[_native.Instance]] = {}
    for instance in _native.catalogue():
        first = _FIRST.get(instance.path, _FAMILIES[0])
        if instance.kind in TUNABLE and _FAMILIES.index(first) <= _FAMILIES.index(family):
            bucket = Bucket(instance.kind, instance.dtype, instance.head_dim, instance.value_dim)
            found.setdefault(bucket, []).append(instance)
    return {bucket: instances for bucket, instances in found.items() if len(instances) > 1}


def tuned(bucket: Bucket, family: str) -> str:
    """The name of what tuning.def chooses."""
    fields = {
        "family": family,
        "dtype": bucket.dtype,
        "query_length": 256,
        "key_length": 256,
        "head_dim": bucket.head_dim,
        "value_dim": bucket.value_dim,
    }
    launches = _native.plan(**fields).launches + _native.plan_backward(**fields, mode="seven_gemm").launches
    return next(launch.kernel for launch in launches if launch.kernel.startswith(f"{bucket.kind}_{bucket.dtype}"))


def winners(family: str, clock: Clock, rounds: int = 3, margin: float = 1.02) -> list[Winner]:
    """Of every bucket. `clock` is asked `rounds` times for each instance, in turns; the least counts."""
    found = []
    for bucket, instances in choices(family).items():
        times = dict.fromkeys((instance.name for instance in instances), float("inf"))
        for _, instance in itertools.product(range(rounds), instances):
            times[instance.name] = min(times[instance.name], clock(instance))
        best = min(instances, key=lambda instance: times[instance.name])
        name = tuned(bucket, family)
        current = next(instance for instance in instances if instance.name == name)
        gain = times[name] / times[best.name]
        if gain > margin:
            found.append(Winner(bucket, current, best, gain))
    return found


def patch(text: str, family: str, better: Sequence[Winner]) -> str:
    """A unified diff of tuning.def: its row for this very family is replaced, or a new one goes before older ones."""
    lines = text.splitlines(keepends=True)
    for winner in better:
        new = row_of(winner.best, family) + "\n"
        # By the name of the macro, the family, the dtype and the bucket; the rest is the tile.
        head = re.compile(
            rf"{TUNABLE[winner.bucket.kind]}\((\w+), {winner.bucket.dtype}, (?:held, |reread, )?"
            rf"{winner.bucket.head_dim}, {winner.bucket.value_dim}, "
        )
        rows = [(index, found[1]) for index, line in enumerate(lines) if (found := head.match(line))]
        index, row_family = next((i, f) for i, f in rows if _FAMILIES.index(f) <= _FAMILIES.index(family))
        lines[index : index + (row_family == family)] = [new]
    return "".join(
        difflib.unified_diff(text.splitlines(keepends=True), lines, "a/csrc/plan/tuning.def", "b/csrc/plan/tuning.def")
    )


def mps_clock(length: int, seconds: float) -> Clock:
    """Medians on this Mac's GPU, of the pass that the instance belongs to."""

    def clock(instance: _native.Instance) -> float:
        torch.manual_seed(0)
        shapes = [(1, 16, length, dim) for dim in (instance.head_dim, instance.head_dim, instance.value_dim)]
        is_forward = instance.kind == "forward"
        query, key, value = leaves = [
            torch.randn(shape, device="mps", dtype=DTYPES[instance.dtype], requires_grad=not is_forward)
            for shape in shapes
        ]
        _library.prefer_instance(instance.name)
        before = _library.set_backward_mode(
            7 if instance.kind == "backward_dq" else 0
        )  # five products have no use for it
        try:
            out = attention(query, key, value)
            grad = torch.ones_like(out)
            backward = "torch.autograd.grad(out, leaves, grad, retain_graph=True)"
            statement = "attention(*leaves)" if is_forward else backward
            scope = {"attention": attention, "leaves": leaves, "out": out, "grad": grad, "torch": torch}
            timing: Measurement = Timer(statement, globals=scope).blocked_autorange(min_run_time=seconds)
            return float(timing.median)
        finally:
            _library.set_backward_mode(before)
            _library.prefer_instance(None)

    return clock


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa bench --autotune", description=__doc__)
    parser.add_argument("--tuning", type=Path, default=Path("csrc/plan/tuning.def"), help="default: %(default)s")
    parser.add_argument("--length", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement (default: %(default)s)")
    options = parser.parse_args(command_line)
    info = device_info()
    if info.why_not is not None or info.family is None:
        parser.error(f"there is no GPU to measure: {info.why_not}")
    found = winners(info.family, mps_clock(options.length, options.seconds))
    for winner in found:
        print(f"# {winner.best.name}: {winner.gain:.2f} times as fast as {winner.tuned.name}, on {info.name}")
    print(patch(options.tuning.read_text(encoding="utf-8"), info.family, found) or "# tuning.def has the fastest tiles")
    source = f"bench --autotune on {info.name}, {platform.platform()}, torch {torch.__version__}"
    for line in against_aten.report(policy.machine(), against_aten.mps_clock(options.seconds), source, policy.rows()):
        print(line)
