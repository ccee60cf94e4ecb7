"""A model of what attention costs on an Apple GPU: clocks per pipe of a core, from counted instructions and bytes.

    step    each pipe's clocks for one step of a threadgroup; a p-norm combines them, since pipes overlap, but not quite
    tile    a threadgroup's steps: those that some row sees
    launch  tiles dealt to cores in their order; no faster than device memory delivers what must be read once
    pass    its launches, one after another

It was fitted to published timings of other projects' kernels on M3 and M5 and never checked on M1 or M2: see
`PUBLISHED`. It ranks designs. Nothing here was measured by us on a GPU.

Sources of the constants: metal-benchmarks (instruction costs, registers, caches); MLX's published timings (NORM,
VIEWS); somebody's record of an M5 Pro (UNIT, UNIT_ALONE).
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .. import _native
from .chips import Chip
from .kernels import Kernel
from .registers import MOST as MOST_REGISTERS

SCHEDULERS = 4  # of a core; each issues one instruction of 32 lanes per clock
MMA, WIDE_MMA, SHUFFLE, REDUCE, EXP = 17, 18, 2, 14.5, 4  # slots
THREADGROUP_BYTES, L1_BYTES, L2_BYTES = 64, 64, 32  # per clock and core
REGISTER_BYTES, CORE_THREADGROUP_BYTES, MOST_THREADS = 208 << 10, 60 << 10, 1024  # of a core
# Of a step, in clocks, where nothing else runs: data from device memory, a barrier, an MMA whose result is waited for
# (at the end of each product, and wherever a SIMD-group barrier keeps the compiler from interleaving).
DEVICE_LATENCY, BARRIER_LATENCY, MMA_LATENCY = 300, 30, 35
# Of M5's matrix unit: clocks per product of 16x16x16, of a scheduler's unit and of one SIMD-group.
UNIT, UNIT_ALONE = 32, 36
LAUNCH_SECONDS = 5e-6
NORM = 8


class Problem(NamedTuple):
    """float16 attention of as many keys as queries, as many key heads as heads, and D = Dv."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool = False

    @property
    def scores(self) -> int:
        rows = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return self.batch * self.heads * rows

    def operations(self, products: int) -> int:
        """Floating-point operations of so many matrix products: 2 forward, 5 backward, 7 if two are recomputed."""
        return 2 * products * self.scores * self.head_dim


class View(NamedTuple):
    """What nobody measured of M5: why kernels that use the matrix unit don't keep it busy."""

    exposed: float  # share of a SIMD-group's other instructions that its products don't hide
    l1_bytes: float  # per clock and core


# Each explains MLX's published timings about as well as the other, and they differ in what else they say of a kernel.
VIEWS = {"issue": View(0.5, 128), "l1": View(0, L1_BYTES)}


class Prediction(NamedTuple):
    """Of one launch."""

    kernel: str
    seconds: float
    pipes: dict[str, float]  # seconds of each pipe alone
    tail: float  # seconds for which some core has nothing to do
    resident: int  # threadgroups per core
    bound: str


def slots(kernel: Kernel, chip: Chip, mixed_mma: float = MMA) -> tuple[float, float]:
    """Issue slots of a SIMD-group's step: on the pipe of float32, and on the one beside it."""
    wide = WIDE_MMA if not chip.has_side_pipe else MMA
    main = MMA * kernel.mma + mixed_mma * kernel.mixed_mma + wide * kernel.wide_mma
    main += kernel.arithmetic + kernel.exp + SHUFFLE * kernel.shuffle + REDUCE * kernel.reduce
    side = kernel.integer + kernel.conversion + kernel.move + kernel.barrier
    side += kernel.load + kernel.store + kernel.stack
    return (main, side) if chip.has_side_pipe else (main + side, 0)


def threads_per_core(registers: int) -> int:
    """That a core holds at a time; what takes more registers than a thread has keeps the rest on the stack."""
    return min(MOST_THREADS, REGISTER_BYTES // (4 * min(MOST_REGISTERS, registers)) // 64 * 64)


def resident_groups(kernel: Kernel) -> int:
    """Threadgroups that a core holds at a time, by registers and by threadgroup memory."""
    by_registers = threads_per_core(kernel.registers) // (32 * kernel.simdgroups)
    by_memory = CORE_THREADGROUP_BYTES // kernel.threadgroup_memory if kernel.threadgroup_memory else by_registers
    return max(1, min(by_registers, by_memory))


def step_pipes(
    kernel: Kernel, chip: Chip, mixed_mma: float = MMA, resident: int | None = None, view: View = VIEWS["issue"]
) -> dict[str, float]:
    """A core's clocks per pipe for one step of one threadgroup, while it holds `resident`: by default all it can."""
    main, side = slots(kernel, chip, mixed_mma)
    store = 1 if chip.has_side_pipe else kernel.store_conflict  # free on M3, fitted
    moved = kernel.device_read + kernel.device_write
    # SIMD-groups of a direct kernel read the same rows, at about the same time: L1 serves them. (metal-flash-attention
    # reaches 91% at D 128 on M3 that way, which L2 alone could not feed.)
    has_copies = kernel.path in ("staged", "team")
    from_l2 = moved if has_copies else moved * kernel.sharers / kernel.simdgroups
    l1_bytes = view.l1_bytes if kernel.unit_mma else L1_BYTES
    exposed_slots = view.exposed * (main + side) if kernel.unit_mma else 0
    spilled = 32 * kernel.simdgroups * kernel.stack_bytes  # of all threads of a core, more than L1 holds
    per_scheduler = kernel.simdgroups / SCHEDULERS
    exposed = BARRIER_LATENCY * kernel.barrier + MMA_LATENCY * (2 + kernel.fence) + DEVICE_LATENCY
    return {
        "unit": (UNIT * kernel.unit_mma + exposed_slots) * per_scheduler,
        "issue": main * per_scheduler,
        "side": side * per_scheduler,
        "exp": EXP * kernel.exp * per_scheduler,
        "threadgroup": (kernel.threadgroup_read + kernel.threadgroup_write * store) / THREADGROUP_BYTES,
        "l1": (moved + spilled) / l1_bytes,
        "l2": (from_l2 + spilled) / L2_BYTES,
        "latency": (UNIT_ALONE * kernel.unit_mma + main + exposed) / (resident or resident_groups(kernel)),
    }


def combined(pipes: dict[str, float]) -> float:
    """What pipes that overlap take together: at least the longest of them, at most their sum."""
    longest = max(pipes.values())
    if longest == 0:
        return 0.0
    powers = math.fsum((clocks / longest) ** NORM for clocks in pipes.values())
    return longest * math.pow(powers, 1 / NORM)


def tiles(kernel: Kernel, problem: Problem) -> Iterator[tuple[float, int]]:
    """Of each threadgroup of a head: its steps, in steps of all of its SIMD-groups, and how many are masked partly."""
    own = kernel.rows * kernel.sharers // kernel.simdgroups
    steps = math.ceil(problem.length / kernel.block)
    for first in range(0, problem.length, kernel.rows):
        starts = range(first, min(first + kernel.rows, problem.length), own)
        if not problem.causal:
            seen = [steps] * len(starts)
        elif kernel.kind == "backward_dkdv":  # owns keys, walks over the queries from the diagonal on
            seen = [steps - start // kernel.block for start in starts]
        else:
            seen = [math.ceil(min(start + own, problem.length) / kernel.block) for start in starts]
        masked = math.ceil(own / kernel.block) * len(starts) * kernel.sharers if problem.causal else 0
        yield sum(seen) * kernel.sharers / kernel.simdgroups, masked


def makespan(lengths: Iterable[float], machines: int) -> float:
    """In this order, each to the machine that is free first."""
    free = [0.0] * machines
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def predict(
    kernel: Kernel,
    problem: Problem,
    chip: Chip,
    compulsory_bytes: float,
    mixed_mma: float = MMA,
    view: View = VIEWS["issue"],
) -> Prediction:
    """One launch over all heads."""
    of_all_heads = sorted(tiles(kernel, problem), reverse=True)
    heads = problem.batch * problem.heads
    if kernel.kind == "backward_dq_from_ds":
        heads *= math.ceil(problem.head_dim / kernel.head_dim)  # parts of D
    work = [tile for tile in of_all_heads for _ in range(heads)]
    return predict_tiles(kernel, work, chip, compulsory_bytes, mixed_mma, view)


def predict_tiles(
    kernel: Kernel,
    work: Sequence[tuple[float, int]],
    chip: Chip,
    compulsory_bytes: float,
    mixed_mma: float = MMA,
    view: View = VIEWS["issue"],
) -> Prediction:
    """One launch of these threadgroups (see `tiles`), which start in this order."""
    pipes = step_pipes(kernel, chip, mixed_mma, view=view)
    step = combined(pipes)
    exception = kernel.exceptions / SCHEDULERS
    lengths = [count * step + masked * exception for count, masked in work]
    # The last threadgroup of a core has it for itself: nothing hides its latencies.
    main = slots(kernel, chip, mixed_mma)[0] + UNIT_ALONE * kernel.unit_mma
    alone = main * math.ceil(kernel.simdgroups / SCHEDULERS) + pipes["latency"] * resident_groups(kernel) - main
    last = max(0.0, alone - step) * min(count for count, _ in work)
    clocks = makespan(lengths, chip.cores) + last
    even = sum(lengths) / chip.cores
    hertz = chip.ghz * 1e9
    steps = sum(count for count, _ in work) / chip.cores
    times = {name: steps * value / hertz for name, value in pipes.items()}
    times["device"] = compulsory_bytes / (chip.bandwidth * 1e9)
    seconds = max(clocks / hertz, times["device"]) + LAUNCH_SECONDS
    bound = max(times, key=lambda name: times[name])
    return Prediction(kernel.name, seconds, times, (clocks - even) / hertz, resident_groups(kernel), bound)


def tensor_bytes(problem: Problem, count: int) -> int:
    """Of so many tensors [B,H,L,D] of float16."""
    return 2 * count * problem.batch * problem.heads * problem.length * problem.head_dim


def plan_forward(problem: Problem, chip: Chip) -> list[str]:
    """Names of the kernels that the plan launches."""
    return [launch.kernel for launch in _native.plan(**_fields(problem, chip)).launches]


def plan_backward(problem: Problem, chip: Chip, mode: str = "automatic") -> list[str]:
    """As `plan_forward`; in five_gemm mode, chunks of heads repeat kernels. With /dk or /dv: for one alone."""
    plan = _native.plan_backward(**_fields(problem, chip), mode=mode, scratch_limit=2**62)

    def of_one(constants: dict[str, bool]) -> str:
        key, value = (constants.get(f"wants_grad_{name}", False) for name in ("key", "value"))
        return "" if key == value else "/dk" if key else "/dv"

    return [launch.kernel + of_one(launch.constants) for launch in plan.launches]


def products_of(name: str) -> int:
    """Matrix products of a kernel, as `plan_forward` and `plan_backward` name it."""
    kernel, _, variant = name.partition("/")
    kinds = {"backward_dkdv": 4, "backward_dq_from_ds": 1, "backward_dq": 3, "backward_dbias": 2, "backward": 0}
    return {"dk": 3, "dv": 2}.get(variant) or next((n for kind, n in kinds.items() if kernel.startswith(kind)), 2)


def _fields(problem: Problem, chip: Chip) -> dict[str, object]:
    return {
        "family": chip.family,
        "dtype": "f16",
        "batch": problem.batch,
        "query_heads": problem.heads,
        "key_heads": problem.heads,
        "query_length": problem.length,
        "key_length": problem.length,
        "head_dim": problem.head_dim,
        "value_dim": problem.head_dim,
        "scale": problem.head_dim**-0.5,
        "window_right": 0 if problem.causal else None,
    }


def forward(
    kernels: dict[str, Kernel], problem: Problem, chip: Chip, mixed_mma: float = MMA, view: View = VIEWS["issue"]
) -> list[Prediction]:
    """The forward pass with the kernels of the plan."""
    names = plan_forward(problem, chip)
    return [predict(kernels[name], problem, chip, tensor_bytes(problem, 4), mixed_mma, view) for name in names]


def backward(
    kernels: dict[str, Kernel],
    problem: Problem,
    chip: Chip,
    mode: str = "automatic",
    mixed_mma: float = MMA,
    view: View = VIEWS["issue"],
) -> list[Prediction]:
    """The backward pass with the kernels of the plan. five_gemm writes dS in float32 once, and reads it."""
    predictions = []
    names = plan_backward(problem, chip, mode)
    scratch = 4.0 * problem.scores if any("from_ds" in name for name in names) else 0.0
    for name in names:
        if name.startswith("backward_delta"):
            moved = tensor_bytes(problem, 2) / (chip.bandwidth * 1e9)
            predictions.append(Prediction(name, moved + LAUNCH_SECONDS, {"device": moved}, 0.0, 1, "device"))
        else:
            moved = tensor_bytes(problem, 6) + scratch
            predictions.append(predict(kernels[name], problem, chip, moved, mixed_mma, view))
    return predictions


def seconds(predictions: Sequence[Prediction]) -> float:
    return math.fsum(prediction.seconds for prediction in predictions)


class Published(NamedTuple):
    """Somebody else's timing of a kernel that the table has."""

    kernel: str
    chip: str
    problem: Problem
    teraflops: float
    source: str


PUBLISHED = (
    Published("steel_f16_d64", "m3-max", Problem(1, 32, 4096, 64), 11.7, "MLX PR #1610"),
    Published("steel_f16_d128", "m3-max", Problem(1, 24, 8192, 128), 10.97, "attention-mps-torch, 75.2 ms"),
    Published("steel_bf16_d128", "m3-max", Problem(1, 24, 8192, 128), 10.39, "attention-mps-torch, 79.4 ms"),
    Published("steel_f32_d128", "m3-max", Problem(1, 24, 8192, 128), 7.64, "attention-mps-torch, 108 ms"),
    Published("steel_bf16_d72", "m3-ultra", Problem(1, 32, 4096, 72), 21.6, "MLX PR #4330"),
    # Of fewer key heads.
    Published("steel_nax_bf16_d64", "m5-max", Problem(1, 16, 8192, 64, True), 56.3, "MLX PR #3843, 2.44 ms"),
    Published("steel_nax_f16_d96", "m5-max", Problem(1, 32, 4096, 96), 50.0, "MLX PR #3943, 4.13 ms"),
    Published("steel_nax_bf16_d128", "m5-max", Problem(1, 16, 8192, 128, True), 54.1, "MLX PR #3843, 5.08 ms"),
)


def predicted_teraflops(
    kernels: dict[str, Kernel], published: Published, chip: Chip, view: View = VIEWS["issue"]
) -> float:
    moved = tensor_bytes(published.problem, 4)
    prediction = predict(kernels[published.kernel], published.problem, chip, moved, view=view)
    return published.problem.operations(2) / prediction.seconds / 1e12
