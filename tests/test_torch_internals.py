"""Names that torch doesn't document: all are in mfa/_torch.py, which says what each is for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfa

PACKAGE = Path(mfa.__file__).parent


def private_names(source: str) -> list[str]:
    """What `source` uses of torch under a name that starts with an underscore; ops have schemas instead."""
    tree = ast.parse(source)
    modules, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
            modules |= {alias.asname or "torch" for alias in node.names if alias.name in paths}
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "torch":
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {alias.asname or alias.name for alias in node.names}
        else:
            continue
        found += [path for path in paths if "._" in path]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            root, *attributes = path.split(".")
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if is_private and (node.attr == "_schema" or (root in modules and attributes[0] != "ops")):
                found.append(path)
    return found


@pytest.mark.parametrize(
    "use",
    [
        "import torch\ntorch._C._is_tracing()",
        "import torch.nn.attention as a\na._names()",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch._functorch.utils import enable",
        "from torch.autograd.function import _SingleLevelFunction as Function",
        "def returns(op):\n    return op._schema.returns",
    ],
)
def test_a_use_is_found(use: str) -> None:
    assert private_names(use)


def test_none_is_used_elsewhere() -> None:
    found = {str(path.relative_to(PACKAGE)): private_names(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert found.pop("_torch.py")
    assert {path: names for path, names in found.items() if names} == {}


def test_the_op_behind_an_overload() -> None:
    """attention.py takes it where there is one, to save time on the host."""
    assert callable(torch.ops.mfa.attention_forward.default._op)


@pytest.mark.parametrize("name", ["torch._C._after_autograd_keyset", "torch.autograd.function._SingleLevelFunction"])
def test_a_torch_without_one_is_refused(name: str) -> None:
    code = f"import torch, torch.autograd.function\ndel {name}\nimport mfa"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ImportError: torch {torch.__version__} lacks an internal that mfa needs: " in done.stderr
    assert repr(name.split(".")[-1]) in done.stderr
