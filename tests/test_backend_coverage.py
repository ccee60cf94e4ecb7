"""How much of csrc/metal the tests on the stand-in device run."""

import pytest
from driver import coverage

pytestmark = [pytest.mark.simulator, pytest.mark.slow]


def test_nine_lines_in_ten_run() -> None:
    lines = coverage.measure()
    assert len(lines.covered) > 300
    assert lines.share >= 0.9, lines.missed
