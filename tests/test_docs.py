"""docs/: snippets and examples run, links lead somewhere, drawings are what their script draws."""

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
DRAW = runpy.run_path(str(DOCS / "figures" / "draw.py"))


def name(page: Path) -> str:
    return page.name


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def runs_here(code: str) -> bool:
    """transformers and diffusers need Python 3.11."""
    return all(find_spec(library) for library in re.findall(r"^from (transformers|diffusers)\b", code, re.MULTILINE))


@pytest.mark.simulator
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_run(page: Path) -> None:
    torch.manual_seed(0)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if runs_here(snippet):
            exec(compile(snippet, page.name, "exec"), {})


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_example_runs(example: Path) -> None:
    """Each asserts what it shows."""
    code = example.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 40
    if not runs_here(code):
        pytest.skip("transformers isn't installed; it needs Python 3.11")
    torch.manual_seed(0)
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("figure", DRAW["FIGURES"])
def test_drawings_are_current(figure: str) -> None:
    """`python docs/figures/draw.py` rewrites them."""
    assert (DOCS / "figures" / f"{figure}.svg").read_text(encoding="utf-8") == DRAW["svg"](figure)


def test_the_drawn_layout_is_that_of_the_kernels() -> None:
    """metal/fragment.h: row and column of a lane."""
    for lane in range(32):
        row, column = ((lane // 4) & 4) + (lane // 2) % 4, ((lane // 4) & 2) * 2 + (lane % 2) * 2
        assert DRAW["lane_of"](row, column) == lane
