"""mfa.precompile and mfa.clear_cache where there is no Metal; tests/mps has the rest."""

from collections.abc import Callable

import pytest

import mfa
from mfa import _metal, mps_flash_attn

CALLS: dict[str, Callable[[], object]] = {
    "precompile": lambda: mfa.precompile(64),
    "clear_cache": mfa.clear_cache,
    "mps_flash_attn.precompile": mps_flash_attn.precompile,
    "mps_flash_attn.clear_cache": mps_flash_attn.clear_cache,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "this build of mfa has no Metal backend"),
        ({"why_not": ["this machine has no GPU that Metal can use"]}, "this machine has no GPU that Metal can use"),
    ],
    ids=["no backend", "no GPU"],
)
def test_one_sentence_without_metal(name: str, info: object, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_metal, "info", lambda: info)
    with pytest.raises(RuntimeError) as error:
        CALLS[name]()
    assert str(error.value) == f"mfa's Metal kernels can't run here: {reason}"
