"""python -m mfa bench: sweeps, their files, and autotuning, with the simulator's counts in place of a clock."""

import csv
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

import mfa
from mfa import _library, _native, simulator
from mfa.bench import __main__ as bench
from mfa.bench import autotune, backends, sweep

TUNING = Path(__file__).parents[1] / "csrc" / "tuning.def"


def test_a_sweep_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--csv": tmp_path / "rows.csv", "--json": tmp_path / "rows.json"}
    options = ["--device", "cpu", "--lengths", "64", "--dtypes", "float32", "--backward", "--seconds", "0.001"]
    bench.main([*options, *(str(word) for pair in files.items() for word in pair)])
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(files["--json"].read_text())
    with files["--csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"torch {torch.__version__}" in printed[0]
    assert report["environment"]["torch"] == torch.__version__
    assert len(rows) == len(report["rows"]) == len(printed) - 1 == 2 * 2 * len(backends.installed())
    assert {row["backend"] for row in rows} >= {"mfa", "sdpa", "math"}
    for row in report["rows"]:
        assert row["milliseconds"] > 0
        assert row["error"] == ""


def test_backends_compute_the_same() -> None:
    query, key = torch.randn(1, 4, 33, 16), torch.randn(1, 2, 33, 16)
    for is_causal in (False, True):
        found = {name: function(query, key, key, is_causal) for name, function in backends.installed().items()}
        for name, out in found.items():
            torch.testing.assert_close(out, found["sdpa"], msg=name)


def test_what_a_backend_cannot_is_a_row_with_its_reason() -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("not for me\nbecause")

    row = sweep.measure("other", sweep.Case("float32", 1, 1, 8, 8, False), refuse, "cpu", False, 0.001)
    assert (row.milliseconds, row.error) == (None, "not for me")
    assert sweep.line(row).endswith("not for me")


def test_the_seed_is_in_its_suite() -> None:
    assert sweep.Case("float16", 4, 8, 2048, 64, False) in sweep.cases("seed", ["float16"])
    assert {case.batch * case.length for case in sweep.cases("flash", ["float16"])} == {16384}


def test_operations_are_those_of_flash_attention() -> None:
    assert sweep.Case("float16", 4, 8, 2048, 64, True).operations(True) == 3.5 * 4 * 4 * 8 * 2048**2 * 64 / 2


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the dependency group bench")
    rows = [
        sweep.Row(sweep.Case("float16", 1, 1, length, 64, False), name, False, 1.0, 2.0, 3.0)
        for length in (64, 128)
        for name in ("mfa", "sdpa")
    ]
    sweep.plot(rows, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["float16_D64.png"]


# ---- autotune -------------------------------------------------------------------------------------------------------


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("TUNE_")]


@pytest.mark.parametrize("family", ["apple7", "apple8", "apple9", "apple10"])
def test_every_tuned_tile_is_one_of_the_choices(family: str) -> None:
    found = autotune.choices(family)
    assert found
    for bucket, instances in found.items():
        assert autotune.tuned(bucket, family) in {instance.name for instance in instances}


@pytest.mark.parametrize("family", ["apple7", "apple8", "apple9", "apple10"])
def test_the_fastest_of_each_bucket_goes_into_a_patch(family: str, tmp_path: Path) -> None:
    """With a clock for which the last instance is the fastest; the patched rows choose it, newer families first."""
    catalogue = [instance.name for instance in _native.catalogue()]
    found = autotune.winners(family, lambda instance: 1 / (1 + catalogue.index(instance.name)))
    assert {winner.best.name for winner in found} <= {
        instances[-1].name for instances in autotune.choices(family).values()
    }
    assert all(winner.gain > 1.02 for winner in found)
    assert found
    (tmp_path / "csrc").mkdir()
    patched = tmp_path / "csrc" / "tuning.def"
    patched.write_text(TUNING.read_text())
    text = autotune.patch(TUNING.read_text(), family, found)
    subprocess.run(["patch", "-p1", "--quiet"], input=text, text=True, cwd=tmp_path, check=True)
    order = ["apple7", "apple8", "apple9", "apple10"]
    for winner in found:
        bucket = winner.bucket
        sizes = f"{bucket.head_dim}, {bucket.value_dim}, "
        rows = [
            row for row in rows_of(patched.read_text())
            if row.startswith(autotune.TUNABLE[bucket.kind]) and f", {bucket.dtype}, " in row and sizes in row
        ]  # fmt: skip
        serving = next(row for row in rows if order.index(row.split("(")[1].split(",")[0]) <= order.index(family))
        assert serving == autotune.row_of(winner.best, family)


def test_nothing_better_is_no_patch() -> None:
    assert autotune.winners("apple7", lambda _: 1.0) == []
    assert autotune.patch(TUNING.read_text(), "apple7", []) == ""


@pytest.mark.skipif(simulator.why_not() is not None, reason=str(simulator.why_not()))
def test_counts_can_take_the_place_of_a_clock() -> None:
    """By loads from threadgroup memory, one row tile loses at D 64."""

    def loads(instance: _native.Instance) -> float:
        if (instance.kind, instance.dtype, instance.head_dim) != ("forward", "f16", 64):
            return math.inf
        query = torch.zeros(1, 1, 128, 64, dtype=torch.float16)
        _library.prefer_instance(instance.name)
        try:
            with mfa.simulate("apple7") as sim:
                mfa.attention(query, query, query)
        finally:
            _library.prefer_instance(None)
        assert [launch.kernel for launch in sim.launches] == [instance.name]
        return sim.counters.threadgroup_reads

    tile = {instance.name: instance for instance in _native.catalogue()}
    one, two = (tile[f"forward_f16_d64_v64_staged_s4_r{rows}_k32"] for rows in (1, 2))
    assert loads(one) == 2 * loads(two)


def test_autotune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if mfa.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        bench.main(["--autotune"])
    assert "there is no GPU to measure" in capsys.readouterr().err
