"""What only the software driver knows, for tests that run on Linux alone."""

import sys
from typing import Any

import pytest


@pytest.fixture(name="stand_in")
def loaded_stand_in() -> Any:
    """The plugin driver.stand_in, whose DRIVER counts and can be steered."""
    if sys.platform != "linux":
        pytest.skip("only the software driver counts, and can be steered")
    from driver import stand_in

    return stand_in
