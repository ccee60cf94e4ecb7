"""What the tests of mfa.sdpa share: inputs, and fixtures to import."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa import sdpa

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, name="nothing_active")
def check_nothing_active() -> Iterator[None]:
    assert not sdpa.is_enabled()
    yield
    sdpa.disable()


@pytest.fixture(name="routed")
def count_routed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each call that mfa took."""
    calls: list[tuple[Any, ...]] = []
    original = sdpa.attention

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(sdpa, "attention", count)
    return calls


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def qkv(device: str = "cpu", grad: bool = False) -> Inputs:
    torch.manual_seed(0)
    shape = {"device": device, "grad": grad}
    return random(2, 4, 20, 16, **shape), random(2, 4, 30, 16, **shape), random(2, 4, 30, 24, **shape)


def skip_unless_taken(*arguments: Any, **options: Any) -> None:
    """Skips, with the reasons, what the device can't do yet and therefore leaves to ATen."""
    reasons = sdpa.not_supported_reasons(*arguments, **options)
    if reasons:
        pytest.skip("; ".join(reasons))
