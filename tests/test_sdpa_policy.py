"""Which calls mfa.sdpa leaves to ATen because ATen is faster: the table, the machine, the call, and the measurement."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdpa_cases import check_nothing_active  # noqa: F401 (a fixture)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention

from mfa import _log, sdpa
from mfa.bench import against_aten
from mfa.sdpa import policy

TABLE = policy.rows()
PREFILL = next(row for row in TABLE if row.kernel == "prefill_attention_mpp")
M5 = policy.Machine("apple10", False, (2, 14), (26, 2))  # whose matrix unit mfa can't use
PLAIN = policy.Call("float16", 128, 128, 1024, is_causal=True, mask="none", is_plain=True)


# -- the table ------------------------------------------------------------------------------------------------------


def test_the_file_is_as_rows_are_printed() -> None:
    text = Path(policy.__file__).with_name("policy.json").read_text(encoding="utf-8")
    assert text == "[\n" + ",\n".join(map(str, TABLE)) + "\n]\n"


def test_each_row_is_a_claim_with_its_source() -> None:
    for row in TABLE:
        assert row.family in ("apple7", "apple8", "apple9", "apple10")
        assert row.basis in ("prediction", "measurement")
        assert row.times_as_fast > 1
        assert len(row.source) > 20
        assert {type(getattr(torch, name)) for name in row.dtype} == {torch.dtype}
        assert set(row.mask) <= {"none", "bool", "query's dtype"}


def test_atens_metal_4_prefill_wins_on_m5() -> None:
    assert policy.faster(PLAIN, M5, TABLE) == PREFILL


@pytest.mark.parametrize(
    "machine",
    [
        M5._replace(matrix_unit=True),
        M5._replace(family="apple9"),
        M5._replace(family=None),
        M5._replace(torch=(2, 13)),
        M5._replace(macos=(26, 1)),
        M5._replace(macos=()),
        M5._replace(variables=frozenset({"PYTORCH_MPS_DISABLE_PREFILL_ATTENTION"})),
    ],
    ids=str,
)
def test_on_another_machine_mfa_takes_the_call(machine: policy.Machine) -> None:
    assert policy.faster(PLAIN, machine, TABLE) is None


def test_a_later_system_has_the_kernel_too() -> None:
    later = M5._replace(torch=(3, 0), macos=(27, 0), variables=frozenset({"HOME"}))
    assert policy.faster(PLAIN, later, TABLE) == PREFILL


@pytest.mark.parametrize(
    ("changes", "taken_by_aten"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "float32"}, False),
        ({"is_causal": False, "mask": "bool"}, True),
        ({"is_causal": False, "mask": "query's dtype"}, True),
        ({"is_causal": False, "mask": "other"}, False),
        ({"is_plain": False}, False),
        ({"query_length": 9}, True),
        ({"query_length": 8}, False),
        ({"head_dim": 64}, False),
        ({"head_dim": 64, "value_dim": 64}, True),
        ({"head_dim": 80, "value_dim": 80}, False),
        ({"head_dim": 96, "value_dim": 96}, True),
        ({"head_dim": 256, "value_dim": 256}, True),
    ],
    ids=str,
)
def test_which_calls_aten_wins(changes: dict[str, Any], taken_by_aten: bool) -> None:
    assert (policy.faster(PLAIN._replace(**changes), M5, TABLE) is not None) == taken_by_aten


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.14.1", (2, 14)), ("2.15.0a0+git12ab", (2, 15)), ("26.2", (26, 2)), ("27", (27,)), ("", ())],
)
def test_versions(text: str, expected: tuple[int, ...]) -> None:
    assert policy.version(text) == expected


def test_a_length_that_data_decide_about_stays_with_mfa() -> None:
    """Under torch.compile and torch.export; another length is a guard."""
    shapes = ShapeEnv()
    assert policy.faster(PLAIN._replace(query_length=shapes.create_unbacked_symint()), M5, TABLE) is None


# -- routing --------------------------------------------------------------------------------------------------------


@pytest.fixture(name="takers")
def on_an_m5(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Who took each call. Neither computes: off a Mac, torch can't for `mps` tensors."""
    found: list[str] = []

    def taker(name: str) -> Callable[..., Tensor]:
        def take(query: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(name)
            return query

        return take

    monkeypatch.setattr(sdpa, "attention", taker("mfa"))
    monkeypatch.setattr(sdpa, "_aten", SimpleNamespace(decompose=taker("ATen")))
    monkeypatch.setattr(sdpa, "_mps_why_not", lambda: None)
    monkeypatch.setattr(policy, "machine", lambda: M5)
    policy.rows_here.cache_clear()
    _log.said.clear()
    yield found
    policy.rows_here.cache_clear()


def tensors(device: str = "mps", **options: Any) -> list[Tensor]:
    return [torch.empty(1, 2, 32, 64, device=device, dtype=torch.float16, **options) for _ in range(3)]


def test_the_call_is_left_to_aten_and_the_log_says_so_once(takers: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with FakeTensorMode(), sdpa.enabled(), caplog.at_level(logging.WARNING, "mfa"):
        for _ in range(2):
            scaled_dot_product_attention(*tensors())
    assert takers == ["ATen", "ATen"]
    assert [record.message for record in caplog.records] == [
        "scaled_dot_product_attention goes to ATen: its prefill_attention_mpp is 1.4 times as fast as mfa on this GPU, "
        'by prediction; mfa.sdpa.enable(prefer="mfa") takes such calls all the same'
    ]


def test_prefer_mfa(takers: list[str]) -> None:
    with FakeTensorMode():
        sdpa.enable(prefer="mfa")
        scaled_dot_product_attention(*tensors())
        with sdpa.enabled():
            scaled_dot_product_attention(*tensors())
        with sdpa.enabled(prefer="mfa"):
            scaled_dot_product_attention(*tensors())
        scaled_dot_product_attention(*tensors())  # as before
    assert takers == ["mfa", "ATen", "mfa", "mfa"]


def test_training_and_dropout_stay_with_mfa(takers: list[str]) -> None:
    with FakeTensorMode(), sdpa.enabled():
        query, key, value = tensors()
        query.requires_grad_()
        scaled_dot_product_attention(query, key, value)
        scaled_dot_product_attention(query.detach(), key, value, dropout_p=0.5)
        assert takers == ["mfa", "mfa"]
        with torch.no_grad():
            scaled_dot_product_attention(query, key, value)
    assert takers == ["mfa", "mfa", "ATen"]


def test_cpu_tensors_are_no_matter_of_speed(takers: list[str]) -> None:
    with sdpa.enabled(cpu=True):
        scaled_dot_product_attention(*tensors("cpu"))
    assert takers == ["mfa"]


@pytest.mark.parametrize("prefer", ["aten", None, True])
def test_prefer_is_refused_by_name(prefer: Any) -> None:
    for activate in (sdpa.enable, lambda **options: sdpa.enabled(**options).__enter__()):
        with pytest.raises(ValueError, match=f"prefer is {prefer!r}; it must be 'faster' or 'mfa'"):
            activate(prefer=prefer)
    assert not sdpa.is_enabled()


# -- python -m mfa bench --autotune ---------------------------------------------------------------------------------


def clock(gains: Any) -> against_aten.Clock:
    """ATen takes a second. Every other measurement of mfa is an outlier."""
    calls = [0]

    def seconds(name: str, case: against_aten.Case) -> float:
        calls[0] += name == "mfa"
        return 1.0 if name == "ATen" else gains(case) * (1 if calls[0] % 5 < 3 else 100)

    return seconds


def test_rows_say_where_aten_won() -> None:
    """A fake clock: by dtype, head dimension, causal and length."""

    def gains(case: against_aten.Case) -> float:
        if case.dtype == "bfloat16" or case.head_dim == 96:
            return 1.01
        if case.is_causal:
            return {16: 0.5, 64: 1.2, 256: 1.3, 1024: 0.9, 4096: 3}[case.length]
        return 2.0 if case.head_dim == 64 else 1.0

    found = list(against_aten.rows(PREFILL, clock(gains), "a Mac"))
    assert {(*row.dtype, row.basis, row.source) for row in found} == {("float16", "measurement", "a Mac")}
    assert [(*row.head_dim, *row.is_causal, row.query_length, row.times_as_fast) for row in found] == [
        (64, False, [9, None], 2.0),
        *((dim, True, span, gain) for dim in (64, 128, 256) for span, gain in (([64, 256], 1.2), ([4096, None], 3))),
    ]
    call = policy.Call("float16", 128, 128, 100, is_causal=True, mask="none", is_plain=True)
    assert policy.faster(call, M5, found) is not None
    assert policy.faster(call._replace(query_length=1024), M5, found) is None
    assert policy.faster(call._replace(is_causal=False), M5, found) is None


def test_the_report_can_be_pasted_into_the_table() -> None:
    machine = M5._replace(family="apple9")
    heading, rows = against_aten.report(machine, clock(lambda case: 2.0), "a Mac", TABLE)
    assert heading == "# prefill_attention_mpp: 16 rows of apple9 for src/mfa/sdpa/policy.json"
    assert {row["family"] for row in json.loads(f"[{rows}]")} == {"apple9"}
    assert list(against_aten.report(machine, clock(lambda case: 1.0), "a Mac", TABLE)) == [
        "# prefill_attention_mpp: 0 rows of apple9 for src/mfa/sdpa/policy.json"
    ]
    (line,) = against_aten.report(machine._replace(torch=(2, 13)), clock(lambda case: 2.0), "a Mac", TABLE)
    assert line.startswith("# prefill_attention_mpp: not here; it needs torch 2.14, macOS 26.2")


def test_measured_rows_are_measured_again_as_one_kernel() -> None:
    measured = list(against_aten.rows(PREFILL, clock(lambda case: 2.0), "a Mac"))
    again = against_aten.templates(measured)
    assert [replace(row, **dict.fromkeys(("source", "basis", "times_as_fast"))) for row in again] == [
        replace(PREFILL, **dict.fromkeys(("source", "basis", "times_as_fast")))
    ]
