"""csrc/metal on other machines than the usual one: devices that can't, no metallib, a torch without MPS."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from driver import build, process

import mfa
from mfa import __main__, _library, _metal, _native

pytestmark = [pytest.mark.mps, pytest.mark.usefixtures("stand_in")]
M1, M5 = ("1", "7", "15", "0"), ("1", "10", "26", "2")  # present, family, system


def probe(folder: Path, *device: str) -> dict[str, Any]:
    """What a new process reports with `folder`'s libmfa, if it has one."""
    environment = {"MFA_CACHE_DIR": str(folder / "cache")}
    if (folder / "libmfa.so").exists():
        environment["MFA_LIBRARY_UNDER_TEST"] = str(folder / "libmfa.so")
    report: dict[str, Any] = json.loads(process.run("backend_probe", *device, **environment))
    assert report["findings"] == []
    return report


@pytest.fixture(name="bare")
def copy_without_metallib(tmp_path: Path) -> Path:
    shutil.copy(_library.path_of("mfa"), tmp_path)
    return tmp_path


@pytest.fixture(name="device")
def restore_device(stand_in: Any) -> Iterator[Any]:
    yield stand_in.DRIVER.library.mfa_driver_set_device
    stand_in.DRIVER.library.mfa_driver_set_device(1, 7, 15, 0)


@pytest.mark.parametrize(
    ("present", "family", "system", "reason"),
    [
        (0, 7, 15, "this machine has no GPU that Metal can use"),
        (1, 7, 13, "mfa needs macOS 14 or later, and this is"),
        (1, 6, 15, "mfa needs an Apple GPU of family 7 (M1) or later, and this is"),
    ],
)
def test_a_device_that_cannot(device: Any, present: int, family: int, system: int, reason: str) -> None:
    device(present, family, system, 0)
    info = mfa.device_info()
    assert info.family is None
    assert info.why_not is not None
    assert reason in info.why_not


def test_an_op_without_a_gpu_says_so(tmp_path: Path) -> None:
    report = probe(tmp_path, "0", "7", "15", "0")
    assert report["result"] == "attention on MPS tensors needs Metal, but this machine has no GPU that Metal can use"


def test_kernels_come_from_source_without_a_metallib(bare: Path) -> None:
    report = probe(bare, *M1)
    assert report["result"] < 1e-5
    assert report["info"]["metallib"] == "compiled from source at run time"
    assert report["info"]["notes"][0] == f"there is no {bare / 'mfa.metallib'}"
    assert "compiled from source when they are first used" in report["info"]["notes"][1]


@pytest.mark.parametrize("first", ["combine_bf16_t128", "tile_map_of_keys_s8", "mask_blocks_f32_s4"])
def test_one_source_is_compiled_for_a_kernel(first: str, bare: Path) -> None:
    library = str(bare / "libmfa.so")
    report = json.loads(process.run("sources_case", first, MFA_LIBRARY_UNDER_TEST=library, MFA_CACHE_DIR=""))
    assert report["findings"] == []
    sources = [f'#line 1 "{path.name}"' for path in sorted((build.REPOSITORY / "metal").glob("*.metal"))]
    assert len(report["compiled"][first]) == 1
    assert sorted(line for lines in report["compiled"].values() for line in lines) == sources  # each once in all


def test_a_kernel_in_no_source_is_named(bare: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        process.run("sources_case", "no_such_kernel", MFA_LIBRARY_UNDER_TEST=str(bare / "libmfa.so"), MFA_CACHE_DIR="")
    assert "kernel no_such_kernel is in none of the sources that mfa carries" in failure.value.stderr


def test_kernels_run_on_torchs_gpu(tmp_path: Path) -> None:
    """Where it isn't the system's default, which Metal's validation would notice in every launch."""
    report = probe(tmp_path, *M1, "2")
    assert report["result"] < 1e-5
    assert report["info"]["name"] == "Apple M1 (software driver, second)"
    assert report["info"]["why_not"] == []
    assert report["info"]["notes"] == [
        "torch uses Apple M1 (software driver, second), which is not the system's default GPU, Apple M1 (software "
        "driver): mfa's kernels run where torch's tensors are"
    ]


def test_no_default_gpu_is_needed(tmp_path: Path) -> None:
    report = probe(tmp_path, "2", *M1[1:])
    assert report["result"] < 1e-5
    assert report["info"]["why_not"] == []


def test_nothing_leaks(stand_in: Any) -> None:
    class Missing:
        kernel = "no_such_kernel"
        constants: ClassVar[dict[str, bool]] = {}

    def everything() -> None:
        _metal.info()
        mfa.precompile(64, dtype=torch.float32)
        with pytest.raises(RuntimeError):
            _metal.precompile([Missing()])  # type: ignore[list-item]
        stand_in.DRIVER.library.mfa_driver_raise_at(b"setComputeFunction:")
        mfa.clear_cache()
        with pytest.raises(RuntimeError):
            mfa.precompile(64, dtype=torch.float32)
        mfa.clear_cache()

    everything()
    before = stand_in.DRIVER.live()
    for _ in range(3):
        everything()
    assert len(stand_in.DRIVER.live()) == len(before), stand_in.DRIVER.live()[len(before) :]


def test_a_cache_path_that_is_no_text_is_only_noted(tmp_path: Path) -> None:
    cache = os.fsdecode(bytes(tmp_path) + b"/\xff")
    report = json.loads(process.run("backend_probe", *M1, MFA_CACHE_DIR=cache))
    assert report["result"] < 1e-5
    assert report["info"]["archive"] == ""
    assert any("is not UTF-8" in note for note in report["info"]["notes"])


@pytest.mark.parametrize("selector", ["dispatchThreadgroups:threadsPerThreadgroup:", "setComputeFunction:"])
def test_what_foundation_raises_is_an_error_of_the_op(selector: str, stand_in: Any) -> None:
    mfa.clear_cache()
    tensors = [torch.randn(1, 2, 20, 64, device="mps") for _ in range(3)]
    stand_in.DRIVER.library.mfa_driver_raise_at(selector.encode())
    with pytest.raises(RuntimeError, match="Metal raised an exception of Objective-C"):
        mfa.attention(*tensors)
    exact = torch.nn.functional.scaled_dot_product_attention(*(tensor.cpu() for tensor in tensors))
    torch.testing.assert_close(mfa.attention(*tensors).cpu(), exact)


def test_what_foundation_raises_is_an_error_in_python(stand_in: Any) -> None:
    mfa.clear_cache()
    stand_in.DRIVER.library.mfa_driver_raise_at(b"setComputeFunction:")
    with pytest.raises(RuntimeError, match="Metal raised an exception of Objective-C"):
        mfa.precompile(64, dtype=torch.float32)
    stand_in.DRIVER.library.mfa_driver_raise_at(b"registryID")
    assert mfa.device_info().why_not == "Metal raised an exception of Objective-C"
    assert mfa.device_info().why_not is None


def test_a_damaged_metallib_is_not_used(bare: Path) -> None:
    (bare / "mfa.metallib").write_text("MTLB?")
    report = probe(bare, *M1)
    assert report["result"] < 1e-5
    assert "can't be loaded: Invalid library file" in report["info"]["notes"][0]


@pytest.mark.parametrize(
    ("device", "why_not"),
    {
        M5: "",
        M1: "this GPU has none",
        ("1", "10", "26", "1"): "it needs macOS 26.2 or later, and this is ",
        (*M5, "1", "p"): "this GPU is a phone's",
    }.items(),
)
def test_the_matrix_unit_is_for_m5_and_macos_26_2(device: tuple[str, ...], why_not: str, bare: Path) -> None:
    libraries = [bare / "mfa_metal4.metallib", bare / "mfa.metallib"]
    for file in libraries:
        shutil.copy(_library.metallib().with_name(file.name), file)
    report = probe(bare, *device)
    assert report["result"] < 1e-5
    info = report["info"]
    assert info["metallib"] == ", ".join(map(str, libraries[bool(why_not) :]))
    assert info["generation"] == (13 if device == M1 else 17)
    assert info["planned_family"] == ("apple7" if device == M1 else "apple9" if why_not else "apple10")
    assert info["why_no_unit"].startswith(why_not)
    assert bool(info["why_no_unit"]) == bool(why_not)
    assert report["uses_matrix_unit"] == (why_not == "")


def test_m5_runs_m3s_kernels_from_source(bare: Path) -> None:
    """Without metallibs."""
    info = probe(bare, *M5)["info"]
    assert (info["family"], info["planned_family"]) == ("apple10", "apple9")
    missing = f"there is no {bare / 'mfa_metal4.metallib'}"
    assert info["why_no_unit"] == missing
    assert info["notes"][0] == f"the matrix unit is not used: {missing}"


def test_a_torch_without_mps_is_named() -> None:
    """libmfa finds nothing of torch's Metal stream in this process: the stand-in device is not loaded."""
    program = (
        "from ctypes import CDLL, RTLD_GLOBAL\n"
        f"CDLL({str(_library.path_of('mfa_driver'))!r}, mode=RTLD_GLOBAL).mfa_driver_set_device(1, 7, 15, 0)\n"
        "from mfa import _library, _metal\n"
        f"_library.path_of = lambda name: {str(_library.path_of('mfa'))!r}\n"
        "print(*_metal.info()['why_not'], sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (reason,) = done.stdout.splitlines()
    assert reason.startswith(f"torch {torch.__version__.split('+')[0]} has no at::mps::getCurrentMPSStream(), ")


def test_precompile_compiles_what_attention_uses() -> None:
    mfa.clear_cache()
    assert mfa.precompile(64, dtype=torch.float32, is_causal=True, training=True) > 3
    compiled = (_metal.info() or {})["pipelines_compiled"]
    tensors = [torch.randn(1, 2, 200, 64, device="mps", requires_grad=True) for _ in range(3)]
    mfa.attention(*tensors, is_causal=True).sum().backward()
    tensors = [torch.randn(1, heads, length, 64, device="mps") for heads, length in ((16, 1), (1, 600), (1, 600))]
    mfa.attention(tensors[0][:, :4], *tensors[1:], enable_gqa=True)
    mfa.attention(*tensors, enable_gqa=True)
    assert (_metal.info() or {})["pipelines_compiled"] == compiled


def test_info_shows_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.info()
    backend = _metal.info() or {}
    printed = capsys.readouterr().out
    for name, fact in (("family", "apple7"), ("name", backend["name"]), ("archive", backend["archive"])):
        assert f"{name:12} {fact}\n" in printed
    assert f"{'mps tensors':12} yes\n" in printed


def test_precompile_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.float64"):
        mfa.precompile(64, dtype=torch.float64)
    launch = _native.plan(head_dim=64, value_dim=64, query_length=8, key_length=8).launches[0]

    class Renamed:
        kernel = "no_such_kernel"
        constants = launch.constants

    with pytest.raises(RuntimeError, match=r"kernel no_such_kernel is missing from .*metallib"):
        _metal.precompile([Renamed()])  # type: ignore[list-item]
