"""The software Metal device: the Metal kernels, plan and parameters of a GPU, on CPU tensors."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import _library, _log, _simulation, _torch
from ._simulation import why_not as why_not

if TYPE_CHECKING:
    from . import _native

FAMILIES = ("apple7", "apple8", "apple9", "apple10")
CHECKS = ("races", "bounds", "uninitialised")

_Result = TypeVar("_Result")


class SimulationError(RuntimeError):
    """A kernel broke a rule of Metal: the text has the rule, the kernel, file and line."""


@dataclass(frozen=True)
class Counters:
    """What a launch did, each counted once per SIMD-group, except `exp` and the bytes and accesses: those per lane."""

    mma: int = 0  # 8x8x8 multiply-accumulates
    unit_mma: int = 0  # 16x16x16 products of the matrix unit (M5)
    exp: int = 0
    shuffles: int = 0
    reductions: int = 0  # with votes, ballots and scans
    conversions: int = 0
    threadgroup_barriers: int = 0
    simdgroup_barriers: int = 0
    fragment_loads: int = 0
    device_read_bytes: int = 0
    device_write_bytes: int = 0
    device_reads: int = 0
    device_writes: int = 0
    threadgroup_read_bytes: int = 0
    threadgroup_write_bytes: int = 0
    threadgroup_reads: int = 0
    threadgroup_writes: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(operator.add(getattr(self, f.name), getattr(other, f.name)) for f in fields(Counters)))


@dataclass(frozen=True)
class Launch:
    """One kernel that ran."""

    kernel: str
    constants: dict[str, bool]
    grid: tuple[int, int, int]  # threadgroups
    group: tuple[int, int, int]  # threads
    threadgroup_memory: int  # bytes
    counters: Counters  # zeros without counters


class Simulation:
    """What `simulate()` returns; its results stay readable after the `with` block."""

    def __init__(self, simulator: _native.Simulator, counts: bool = True) -> None:
        self._simulator = simulator
        self._counts = counts

    @property
    def launches(self) -> list[Launch]:
        """The kernels that ran, in order."""
        return [
            Launch(
                launch.kernel,
                dict(launch.constants),
                launch.grid,
                launch.group,
                launch.threadgroup_memory,
                Counters(**launch.counters) if self._counts else Counters(),  # fast kernels count some things only
            )
            for launch in self._simulator.launches
        ]

    @property
    def counters(self) -> Counters:
        """The sum over all launches."""
        return sum((launch.counters for launch in self.launches), Counters())

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Calls `function`, and raises SimulationError where the simulator found something."""
        try:
            return function()
        except RuntimeError as error:
            finding = self._simulator.finding
            if finding is None or finding not in str(error):
                raise
            raise SimulationError(finding) from None

    def call(self, op: Any, *arguments: Any) -> Any:
        """What an MPS tensor would reach: the very kernel of `op` that is registered for MPS, on CPU tensors."""
        return self.run(lambda: op.redispatch(_torch.DispatchKeySet(_torch.DispatchKey.MPS), *arguments))

    def __enter__(self) -> Simulation:
        if _simulation.active() is not None:
            raise RuntimeError("mfa.simulate() is active already; simulations don't nest")
        self._simulator.enter(_library.address_of("mfa_set_simulated_launcher"))
        _simulation.set_active(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _simulation.set_active(None)
        self._simulator.exit()


def simulate(
    family: str = "apple7",
    *,
    checks: Iterable[str] = (),
    seed: int = 0,
    counters: bool = True,
    kernel_library: str | os.PathLike[str] | None = None,
) -> Simulation:
    """Runs the Metal kernels on CPU tensors inside a `with` block, with the plan of a GPU family.

        with mfa.simulate(checks=("races",)) as sim:
            out = mfa.attention(query, key, value)
        sim.counters.mma

    Process-wide: calls from every thread are simulated meanwhile, one after another.

    Args:
        family: apple7 (M1), apple8 (M2), apple9 (M3, M4) or apple10 (M5).
        checks: of "races", "bounds", "uninitialised". A broken rule raises SimulationError. So do, always, collectives
            and barriers that not all of their threads reach.
        seed: 0 runs lanes, SIMD-groups and threadgroups in their natural order; another shuffles all three.
        counters: False leaves all counters zero, and without checks runs kernels that are compiled for speed.
        kernel_library: another build of the kernels than the installed one, from csrc/simulator/translate.py.

    Raises:
        ValueError: an unknown family or check, or a negative seed.
        RuntimeError: this build has no simulator, or a simulation is active already.
    """
    names = (checks,) if isinstance(checks, str) else tuple(checks)
    for check in names:
        if check not in CHECKS:
            raise ValueError(f"checks has {check!r}; each must be one of {', '.join(CHECKS)}")
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; it must be one of {', '.join(FAMILIES)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be within 0 ... 2^64 - 1")
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    from . import _native

    kernels = "mfa_kernels_count" if counters or names else "mfa_kernels_fast"
    path = os.fspath(kernel_library) if kernel_library is not None else str(_library.path_of(kernels))
    simulator = _native.Simulator(path, family, list(names), seed)
    for note in simulator.notes:
        _log.once(note)
    return Simulation(simulator, counters)
