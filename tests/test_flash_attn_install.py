"""mfa.flash_attn.install(): modules and metadata under flash-attn's name, and who looks for them."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfa import flash_attn


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_install() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")
    try:
        assert flash_attn.install()
        assert flash_attn.install()
        module = importlib.import_module("flash_attn")
        assert module.flash_attn_func is flash_attn.flash_attn_func
        assert module.__version__.startswith("2.8")
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        assert interface.flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
        padding = importlib.import_module("flash_attn.bert_padding")

        states = torch.randn(2, 4, 3, requires_grad=True)
        mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
        tokens, indices, starts, longest, used = padding.unpad_input(states, mask)
        assert (starts.tolist(), longest, used.tolist()) == ([0, 2, 6], 4, [2, 4])
        padded = padding.pad_input(tokens, indices, 2, 4)
        torch.testing.assert_close(padded, states * mask[..., None])
        (gradient,) = torch.autograd.grad(padded.sum(), states)
        torch.testing.assert_close(gradient, mask[..., None].float().expand(2, 4, 3))

        # Three sequences, two of them in one row.
        lengths = torch.tensor([[2, 1, 0, 0], [3, 0, 0, 0]])
        tokens, indices, starts, longest = padding.unpad_input_for_concatenated_sequences(states, lengths)
        assert (indices.tolist(), starts.tolist(), longest) == ([0, 1, 2, 4, 5, 6], [0, 2, 3, 6], 3)
        torch.testing.assert_close(tokens, torch.cat((states[0, :3], states[1, :3])))

        layers = importlib.import_module("flash_attn.layers.rotary")
        assert layers.apply_rotary_emb is flash_attn.rotary.apply_rotary_emb
        assert importlib.import_module("flash_attn.ops.triton.rotary").apply_rotary is flash_attn.rotary.apply_rotary
        cute = importlib.import_module("flash_attn.cute")
        assert cute.flash_attn_func is flash_attn.cute.flash_attn_func
        assert importlib.import_module("flash_attn.cute.interface").flash_attn_func is cute.flash_attn_func
        three = importlib.import_module("flash_attn_interface")
        assert three.flash_attn_with_kvcache is flash_attn.flash_attn_3.flash_attn_with_kvcache
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.modules")
    finally:
        flash_attn.uninstall()
    for name in ("flash_attn", "flash_attn_interface"):
        assert not [module for module in sys.modules if module.split(".")[0] == name]
        assert importlib.util.find_spec(name) is None


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_metadata() -> None:
    """What libraries ask before they import: by either spelling, and by the package's name."""
    everything = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    torchs = importlib.metadata.version("torch")
    try:
        flash_attn.install()
        for name in ("flash_attn", "flash-attn", "Flash.Attn"):
            assert importlib.metadata.version(name) == flash_attn.__version__
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash_attn"]
        now = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
        assert now - everything == {"flash_attn"}
        distribution = importlib.metadata.distribution("flash-attn")
        assert distribution.files is None
        assert distribution.requires is None
        assert importlib.metadata.version("torch") == torchs
    finally:
        flash_attn.uninstall()
    assert "flash_attn" not in importlib.metadata.packages_distributions()
    for name in ("flash_attn", "flash-attn"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_their_flash_back_ends(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} isn't installed")
    command = [sys.executable, str(Path(__file__).with_name("flash_backends.py")), library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_install_leaves_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flash_attn.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not flash_attn.install()
    assert "flash_attn is installed" in caplog.text
    try:
        assert importlib.import_module("flash_attn").real
    finally:
        del sys.modules["flash_attn"]
