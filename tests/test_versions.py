"""Versions that several files state: each equals the one place that decides it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
TORCH = (ROOT / "tests" / "torch_versions.txt").read_text().split()
OLDEST, NEWEST = TORCH[0], TORCH[-1]


def found(pattern: str, *files: Path) -> list[str]:
    return [match for file in files for match in re.findall(pattern, file.read_text(encoding="utf-8"))]


def test_torch_versions_ascend() -> None:
    numbers = [tuple(map(int, version.split("."))) for version in TORCH]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("file", "pattern", "expected"),
    [
        ("Makefile", r"^TORCH \?= torch==(.*)$", None),
        (".github/workflows/linux.yml", r"\{ python: .*, torch: torch==([\d.]+) \}", TORCH),
        (".github/workflows/linux.yml", r"MFA_WHEEL_TORCH: ([\d.]+) ([\d.]+) ", [(OLDEST, NEWEST)]),
        (".github/workflows/macos.yml", r"install torch==([\d.]+)", [NEWEST]),
        (".github/release-constraints.txt", r"^torch==(.*)$", [OLDEST]),
    ],
)
def test_torch_is_of_the_list(file: str, pattern: str, expected: list[str] | None) -> None:
    versions = found(f"(?m){pattern}", ROOT / file)
    if expected is None:  # any of it
        assert len(versions) == 1
        assert versions[0] in TORCH
    else:
        assert versions == expected


def test_the_oldest_torch_is_the_one_that_we_compile_for() -> None:
    major, minor, _ = OLDEST.split(".")
    assert set(found(r'"torch>=([\d.]+)"', ROOT / "pyproject.toml")) == {f"{major}.{minor}"}
    assert found(r"Torch >= ([\d.]+): the ops use its stable ABI", ROOT / "README.md") == [f"{major}.{minor}"]
    native = [*ROOT.glob("CMakeLists.txt"), *ROOT.glob("cmake/*.cmake"), *ROOT.glob("tests/driver/*.py")]
    targets = found(r"TORCH_TARGET_VERSION=(0x\w+?)(?:ULL)?\b", *native)
    assert {int(target, 16) for target in targets} == {int(major) << 56 | int(minor) << 48}


@pytest.mark.parametrize("package", ["ziglang", "mlx-metal"])
def test_what_counts_depend_on_is_pinned_once(package: str) -> None:
    """Another version may count differently, or lack a header."""
    python = [*(ROOT / "cmake").glob("*.py"), *(ROOT / "tests" / "mac_check").glob("*.py")]
    files = [ROOT / "pyproject.toml", ROOT / "Makefile", *WORKFLOWS.glob("*.yml"), *python]
    (pin,) = found(rf"{package} *([=<>~]=[\d.]+)", *files)
    assert pin.startswith("==")


def test_mlx_is_the_one_that_gives_metal_cpp() -> None:
    (version,) = found(r"mlx-metal==([\d.]+)", ROOT / "pyproject.toml")
    files = [ROOT / "tests" / "test_fidelity_mlx.py", ROOT / "tests" / "gpu_check" / "others.py"]
    assert found(r'VERSION = "(.*)"', *files) == [version, version]
    assert set(found(r"mlx-metal ([\d.]+\d)", ROOT / "docs" / "performance.md")) == {version}
