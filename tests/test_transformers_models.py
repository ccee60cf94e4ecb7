"""docs/transformers.md: its table is what comes of each model of transformers."""

import re
from pathlib import Path

import pytest

hf = pytest.importorskip("transformers", reason="transformers isn't installed")

from transformers_models import names  # noqa: E402 (after the skip)
from transformers_sweep import PAGE, documented, examine, summary  # noqa: E402

OUTCOMES = documented()
BUILT = sorted(name for name, outcome in OUTCOMES.items() if outcome.verdict != "not built")
ROOT = Path(__file__).parents[1]


def test_the_table_is_of_this_version() -> None:
    """`python tests/transformers_sweep.py` rewrites it."""
    text = PAGE.read_text(encoding="utf-8")
    (pinned,) = re.findall(r'"transformers==([\d.]+);', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.findall(r"^transformers \d.*$", text, re.MULTILINE) == [summary(list(OUTCOMES.values()), pinned)]
    assert list(OUTCOMES) == names()


def test_enough_models_are_built_and_none_is_wrong() -> None:
    assert len(BUILT) >= 300
    assert not [outcome for outcome in OUTCOMES.values() if outcome.verdict == "wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_model(name: str) -> None:
    assert examine(name) == OUTCOMES[name]
