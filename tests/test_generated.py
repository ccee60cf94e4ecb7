"""Tables and figures of the README and of docs/ are what the code says."""

import json
import re
from importlib.metadata import version
from io import BytesIO

import generated
import pytest
from fidelity import Problem
from test_fidelity_mlx import BLOCKS, build, headers, run_steel  # noqa: F401 (headers is a fixture)

from mfa.bench import figures, kernels, model, report
from mfa.bench.chips import CHIPS

FIGURES = generated.ROOT / "docs" / "figures"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.simulator if name == "operations" else ()) for name in generated.GENERATED],
)
def test_table_is_current(name: str) -> None:
    assert generated.sections()[name] == generated.GENERATED[name](), "run `python tests/generated.py`"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_is_current(name: str) -> None:
    """What it shows, and with the same matplotlib also how."""
    made, text = BytesIO(), (FIGURES / f"{name}.svg").read_text(encoding="utf-8")
    figures.save(name, made)
    description, creator = r"<dc:description>(.*)</dc:description>", r"Matplotlib v[\d.]+"
    now = made.getvalue().decode()
    shown, current = (json.loads(re.findall(description, svg)[0]) for svg in (text, now))
    assert shown == current, "run `python -m mfa bench --figures docs/figures`"
    if re.findall(creator, text) == re.findall(creator, now):
        assert text == now


@pytest.mark.parametrize("library", ["torch", "transformers", "diffusers"])
def test_libraries_are_those_that_run(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} isn't installed; it needs Python 3.11")
    installed = version(library).split("+")[0]
    if library == "torch" and installed not in generated.pinned()[library]:
        pytest.skip(f"torch is {installed} here, chosen by TORCH")
    assert installed in generated.pinned()[library]


def test_the_seeds_problem_is_predicted_as_written() -> None:
    table, chip = kernels.of_float16(), CHIPS["m1-max"]
    page = (generated.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    forward = model.seconds(model.forward(table, report.SEED, chip))
    training = forward + model.seconds(model.backward(table, report.SEED, chip))
    assert f"{1e3 * forward:.1f} ms forward and {1e3 * training:.1f} ms with backward" in page


@pytest.mark.simulator
@pytest.mark.parametrize("dim", [64, 128])
def test_mlx_counts(dim: int, request: pytest.FixtureRequest) -> None:
    block_q, block_k = BLOCKS[dim]
    arguments = f"half, {block_q}, {block_k}, {dim}, {dim}, 4, 1, float, float"
    instance = f'instantiate_kernel("steel_f16_{dim}_1", attention, {arguments})'
    header = "steel/attn/kernels/steel_attention.h"
    library = build(request.getfixturevalue("headers"), f"readme{dim}", "count", header, [instance])
    counters = run_steel(library, Problem("f16", dim, 256, 256), 1, 0)
    assert [of(counters) for of in generated.OPERATIONS.values()] == generated.MLX[dim]
