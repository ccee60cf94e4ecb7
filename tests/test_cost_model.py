"""The cost model: properties of its arithmetic, the table that it works from, and what it claims about itself."""

import math

import count_kernels
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfa.bench import kernels, model, report
from mfa.bench.chips import CHIPS
from mfa.bench.model import Problem

TABLE = kernels.load()
OURS = [kernel for kernel in TABLE.values() if not kernel.name.startswith("steel")]
names = st.sampled_from(sorted(TABLE))
chips = st.sampled_from(sorted(CHIPS))
clocks = st.floats(0, 1e6)


@given(st.dictionaries(st.text(), clocks, min_size=1))
def test_pipes_overlap_but_not_quite(pipes: dict[str, float]) -> None:
    together = model.combined(pipes)
    assert max(pipes.values()) <= together * (1 + 1e-12)
    assert together <= sum(pipes.values()) * (1 + 1e-12)


@given(st.dictionaries(st.sampled_from("abcd"), clocks, min_size=1), st.sampled_from("abcd"), clocks)
def test_more_work_never_takes_less(pipes: dict[str, float], name: str, more: float) -> None:
    assert model.combined(pipes) <= model.combined({**pipes, name: pipes.get(name, 0) + more}) * (1 + 1e-12)


@given(st.lists(clocks, min_size=1), st.integers(1, 40))
def test_a_makespan_is_at_most_the_longest_job_over_an_even_split(lengths: list[float], machines: int) -> None:
    made, even = model.makespan(lengths, machines), math.fsum(lengths) / machines
    assert max(even, *lengths) <= made * (1 + 1e-9) + 1e-9
    assert made <= (even + max(lengths)) * (1 + 1e-9)


@given(names, st.integers(1, 700), st.booleans())
def test_tiles_count_the_blocks_that_some_row_sees(name: str, length: int, causal: bool) -> None:
    kernel = TABLE[name]
    own = kernel.rows // kernel.simdgroups

    def sees(own_rows: range, block: range) -> bool:
        if not causal:
            return True
        return block[-1] >= own_rows[0] if kernel.kind == "backward_dkdv" else block[0] <= own_rows[-1]

    blocks = [range(first, min(first + kernel.block, length)) for first in range(0, length, kernel.block)]
    seen = sum(
        sees(range(first, min(first + own, length)), block) for first in range(0, length, own) for block in blocks
    )
    counted = sum(steps for steps, _ in model.tiles(kernel, Problem(1, 1, length, kernel.head_dim, causal)))
    if causal:
        assert counted * kernel.simdgroups == pytest.approx(seen)
    else:
        assert counted == len(blocks) * math.ceil(length / kernel.rows)


@given(names, chips, st.integers(1, 2), st.integers(1, 20), st.integers(64, 1024), st.booleans())
def test_predictions_are_possible(name: str, chip: str, batch: int, heads: int, length: int, causal: bool) -> None:
    """No faster than the products at the rate of an MMA, no faster than memory, slower with half of it."""
    kernel, gpu = TABLE[name], CHIPS[chip]
    problem = Problem(batch, heads, length, kernel.head_dim, causal)
    moved = model.tensor_bytes(problem, 4)
    prediction = model.predict(kernel, problem, gpu, moved)
    products = kernel.products * kernel.simdgroups * 2 * 512 / (2 * kernel.rows * kernel.block * kernel.head_dim)
    assert prediction.seconds >= 2 * products * problem.scores * kernel.head_dim / gpu.peak
    assert prediction.seconds >= moved / (gpu.bandwidth * 1e9)
    slower = model.predict(kernel, problem, gpu._replace(bandwidth=gpu.bandwidth / 2), moved)
    assert slower.seconds >= prediction.seconds
    assert prediction.tail >= -1e-12
    assert prediction.bound in prediction.pipes


@pytest.mark.parametrize("kernel", OURS, ids=lambda kernel: kernel.name)
def test_a_core_holds_what_the_prediction_assumes(kernel: kernels.Kernel) -> None:
    groups = model.resident_groups(kernel)
    assert 32 * kernel.simdgroups * groups * kernel.registers * 4 <= model.REGISTER_BYTES
    assert kernel.threadgroup_memory * groups <= model.CORE_THREADGROUP_BYTES
    assert kernel.registers <= 128, "more than a thread has on M1"


def test_a_thread_of_metal_benchmarks_table() -> None:
    """Threads per core by half-registers per thread, as Mesa's driver has it for M1."""
    table = {104: 1024, 136: 768, 160: 640, 184: 576, 208: 512, 232: 448, 256: 384}
    kernel = OURS[0]._replace(simdgroups=1, threadgroup_memory=0)
    assert {half: 32 * model.resident_groups(kernel._replace(registers=half // 2)) for half in table} == table


def test_published_timings_are_predicted_as_the_docs_say() -> None:
    errors = {
        (point.kernel, point.chip): model.predicted_teraflops(TABLE, point, CHIPS[point.chip]) / point.teraflops - 1
        for point in model.PUBLISHED
    }
    assert max(abs(error) for (name, _), error in errors.items() if "f32" not in name) < 0.12
    assert max(map(abs, errors.values())) < 0.25


@pytest.mark.parametrize("chip", CHIPS)
def test_the_plan_has_only_kernels_of_the_table(chip: str) -> None:
    for dim in report.HEAD_DIMS:
        for causal in (False, True):
            assert model.seconds(model.forward(TABLE, report.shape(dim, causal), CHIPS[chip])) > 0


def test_the_report_ends_with_the_seed() -> None:
    *_, last = report.lines(CHIPS["m1-max"], tiles=True)
    assert last.startswith("B4 H8 N2048 D64 on M1 Max, predicted: forward 3.")
    assert last.endswith("5.3 and 55 ms")


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_tile_of_float16_is_counted() -> None:
    assert {instance.name for _, instance in count_kernels.rows_of_instances()} == {kernel.name for kernel in OURS}


def test_counts_of_a_kernel_are_current() -> None:
    counted = next(count_kernels.ours())
    assert counted == TABLE[counted.name], "run `python tests/count_kernels.py`"


@pytest.mark.slow
def test_all_counts_are_current() -> None:
    assert {kernel.name: kernel for kernel in count_kernels.count()} == TABLE, "run `python tests/count_kernels.py`"


def test_mlx_counts_are_those_of_a_hand_count() -> None:
    """Per step of a SIMD-group at D 64: 64 MMAs of float32, 144 conversions, 32 stores, 4 and 16 barriers."""
    steel = TABLE["steel_f16_d64"]
    assert (steel.wide_mma, steel.conversion, steel.store, steel.exp, steel.shuffle) == (64, 144, 32, 9, 16)
    assert (steel.barrier, steel.fence) == (4, 16)
