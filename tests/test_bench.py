"""python -m mfa bench: sweeps, their files, and autotuning, with the simulator's counts in place of a clock."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mfa
from mfa import _library, _native
from mfa.bench import __main__ as bench
from mfa.bench import autotune, backends, cases, memory, plots, timed

TUNING = Path(__file__).parents[1] / "csrc" / "plan" / "tuning.def"


CASE = cases.Case("float32", 1, 2, 64, 32, False)


def row(name: str, case: cases.Case = CASE, milliseconds: float = 1.0) -> timed.Row:
    return timed.Row(case, False, name, milliseconds, 2.0, 3.0)


def files_of(folder: Path) -> list[str]:
    """Options."""
    return ["--csv", str(folder / "rows.csv"), "--json", str(folder / "rows.json")]


def read(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "rows.json").read_text())


def test_a_sweep_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--lengths", "64", "--dtypes", "float32", "--backward", "--seconds", "0.001"]
    bench.main([*options, *files_of(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    rows, report = read(tmp_path)
    assert f"torch {torch.__version__}" in printed[0]
    assert report["environment"]["torch"] == torch.__version__
    assert len(rows) == len(report["rows"]) == 2 * 2 * len(backends.installed())
    assert {row["backend"] for row in rows} >= {"mfa", "sdpa", "math"}
    for found, line in zip(report["rows"], printed[1:], strict=False):
        assert found["milliseconds"] > 0
        assert found["error"] == ""
        assert f"{found['milliseconds']:.3f} ms" in line
        assert f"{found['megabytes']:.1f} MB" in line
    table = "\n".join(printed[1 + len(rows) :])
    assert "float32 B1 H4 L64 D64 causal" in table
    assert "1.00x" in table  # sdpa, as fast as itself


def test_without_rich_there_are_the_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("rich.progress", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, module, None)
    bench.main(["--device", "cpu", "--lengths", "32", "--seconds", "0.001"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(backends.installed())


@pytest.mark.simulator
def test_the_simulator_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--device", "simulator", "--lengths", "64", "--backward", *files_of(tmp_path)])
    rows, report = read(tmp_path)
    assert len(rows) == len(report["rows"]) == len(capsys.readouterr().out.splitlines()) - 1 == 4
    by_problem = {(found["causal"], found["is_training"]): found for found in report["rows"]}
    forward, training = by_problem[False, False], by_problem[False, True]
    heads, fragments = 4, (64 // 8) ** 3
    assert forward["mma"] == heads * 2 * fragments
    assert training["mma"] >= heads * 7 * fragments
    assert forward["kernels"].startswith("forward_f16_d64")
    assert "backward_dkdv" in training["kernels"]
    assert by_problem[True, False]["mma"] < forward["mma"]
    assert forward["device_read_bytes"] >= 3 * heads * 64 * 64 * 2


def test_counts_are_not_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--device", "simulator", "--plots", str(tmp_path)])
    assert "--plots" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[timed.Row]:
        yield row("mfa")
        raise KeyboardInterrupt

    monkeypatch.setattr(timed, "rows", interrupted)
    bench.main(["--device", "cpu", *files_of(tmp_path)])
    rows, report = read(tmp_path)
    assert [found["backend"] for found in rows] == [found["backend"] for found in report["rows"]] == ["mfa"]


def test_backends_compute_the_same() -> None:
    query, key = torch.randn(1, 4, 33, 16), torch.randn(1, 2, 33, 16)
    for is_causal in (False, True):
        found = {name: function(query, key, key, is_causal) for name, function in backends.installed().items()}
        for name, out in found.items():
            torch.testing.assert_close(out, found["sdpa"], msg=name)


def test_what_a_backend_cannot_is_a_row_with_its_reason() -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("not for me\nbecause")

    refused = timed.measure("other", CASE, refuse, "cpu", False, 0.001)
    assert (refused.milliseconds, refused.error) == (None, "not for me")
    assert str(refused).endswith("not for me")


def test_memory_is_that_of_the_peak() -> None:
    """The scores of the math backend, and a copy of them; of ours, what grows with the length."""
    case = cases.Case("float32", 1, 2, 512, 32, False)
    functions = backends.installed()
    ours, math_ = (timed.measure(name, case, functions[name], "cpu", False, 0.001) for name in ("mfa", "math"))
    scores, tensor = (4 * 2 * 512 * width / 2**20 for width in (512, 32))
    assert ours.megabytes is not None
    assert math_.megabytes is not None
    assert 2 * scores <= math_.megabytes <= 3 * scores
    assert tensor <= ours.megabytes <= 3 * tensor
    assert memory.peak_bytes(lambda: [torch.empty(1000) for _ in range(3)], "cpu") == 12000


def test_the_seed_is_in_its_suite() -> None:
    assert cases.Case("float16", 4, 8, 2048, 64, False) in cases.cases("seed", ["float16"])
    assert {case.batch * case.length for case in cases.cases("flash", ["float16"])} == {16384}


def test_operations_are_those_of_flash_attention() -> None:
    assert cases.Case("float16", 4, 8, 2048, 64, True).operations(True) == 3.5 * 4 * 4 * 8 * 2048**2 * 64 / 2


def test_speedups_are_over_sdpa_on_the_same_problem() -> None:
    longer = CASE._replace(length=128)
    rows = [row("mfa", milliseconds=1), row("sdpa", milliseconds=3), row("mfa", longer)]
    assert list(timed.speedups(rows).values()) == [3, 1, None]


def test_plots(tmp_path: Path) -> None:
    rows = [row(name, CASE._replace(length=length)) for length in (64, 128) for name in ("mfa", "sdpa")]
    refused = timed.Row(CASE, False, "other", None, None, None, "not for me")
    plots.plot([*rows, refused], {"chip": "Apple M1 Max", "gpu_cores": 24}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["float32_D32.png"]


def test_the_roof_is_that_of_this_mac() -> None:
    chip = plots.chip_of({"chip": "Apple M1 Max", "gpu_cores": 24})
    assert chip is not None
    assert (chip.name, chip.cores) == ("M1 Max", 24)
    assert plots.chip_of({"chip": "Apple M9"}) is None
    assert plots.chip_of({}) is None


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
    (tmp_path / "csrc" / "plan").mkdir(parents=True)
    patched = tmp_path / "csrc" / "plan" / "tuning.def"
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


@pytest.mark.simulator
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


# -- a language model -----------------------------------------------------------------------------------------------


def test_generate_is_timed_beside_sdpa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers isn't installed")
    file = tmp_path / "generate.json"
    options = ["--device", "cpu", "--dtype", "float32", "--prompts", "5", "9", "--tokens", "3", "--repeats", "1"]
    bench.main(["--suite", "generate", *options, "--json", str(file)])
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["prompt"], row["implementation"]) for row in rows] == [
        *((5, "mfa"), (5, "sdpa"), (9, "mfa"), (9, "sdpa"))
    ]
    assert all(row["prefill_ms"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert capsys.readouterr().out.count("tokens/s") == 4
    with pytest.raises(SystemExit):
        bench.main(["--suite=generate", "--tokens", "1"])


@pytest.mark.simulator
def test_generate_reads_keys_and_values_once_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers isn't installed")
    bench.main(["--suite", "generate", "--device", "simulator", "--prompts", "600", "--tokens", "3"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "per token 4.0 launches" in line  # two layers, decode and combine
    assert float(line.split()[-5]) <= 1.1
