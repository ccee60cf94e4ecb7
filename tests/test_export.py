"""What torch.export and AOTInductor write to disk, loaded in another process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdpa_cases import check_nothing_active, qkv  # noqa: F401 (a fixture)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import mfa
from mfa import sdpa

pytestmark = pytest.mark.slow  # AOTInductor compiles C++

LOADERS = {
    "program": "torch.export.load({path!r}).module()",
    "package": "torch._inductor.aoti_load_package({path!r})",
}
RUN = """
import sys, torch
{first}
inputs, expected = torch.load(sys.argv[1])
torch.testing.assert_close({loader}(*inputs), expected)
print("mfa" in sys.modules)
"""


class Own(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mfa.attention(query, key, value, is_causal=True, softcap=3.0)


class Routed(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True)


def written(form: str, model: nn.Module, folder: Path) -> str:
    """The path of a model as a program or a package, beside its arguments and result."""
    path, inputs = folder / "model.pt2", qkv()
    torch.save((inputs, model(*inputs)), folder / "expected.pt")
    program = torch.export.export(model, inputs)
    if form == "program":
        torch.export.save(program, path)
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return str(path)


def loaded(form: str, path: str, first: str) -> subprocess.CompletedProcess[str]:
    code = RUN.format(first=first, loader=LOADERS[form].format(path=path))
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(path).with_name("expected.pt"))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", LOADERS)
def test_needs_import_mfa_in_the_loading_process(form: str, tmp_path: Path) -> None:
    path = written(form, Own(), tmp_path)
    done = loaded(form, path, "import mfa")
    assert done.returncode == 0, done.stderr
    done = loaded(form, path, "")
    assert done.returncode != 0
    assert "attention_forward" in done.stderr
    assert "mfa" in done.stderr


def test_an_exported_call_of_sdpa_is_routed_where_it_runs(tmp_path: Path) -> None:
    with sdpa.enabled(cpu=True):
        path = written("program", Routed(), tmp_path)
    assert loaded("program", path, "").stdout == "False\n"
    enable = "import logging, mfa.sdpa; logging.basicConfig(level='DEBUG'); mfa.sdpa.enable(cpu=True)"
    done = loaded("program", path, enable)
    assert done.returncode == 0
    assert "scaled_dot_product_attention by mfa" in done.stderr


@pytest.mark.parametrize("enabled", [False, True])
def test_a_package_has_the_attention_that_it_was_compiled_with(enabled: bool, tmp_path: Path) -> None:
    """As what torch.compile has compiled."""
    if enabled:
        with sdpa.enabled(cpu=True):
            path = written("package", Routed(), tmp_path)
    else:
        path = written("package", Routed(), tmp_path)
    done = loaded("package", path, "")
    assert ("mfa::attention_forward" in done.stderr) == enabled
    assert (done.returncode != 0) == enabled
