"""What `make mac-check` checks must fail when it is wrong: broken binaries and wheels.

Most need the tools that `make mac-check` leaves in .cache/, which runs them at its end; they are skipped before.
"""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "mac-check"
COMPILER = CACHE / "tools" / "mac-c++"
OPS = CACHE / "unpacked" / "mfa" / "libmfa.dylib"
TORCH = CACHE / "torch-2.10.0" / "torch" / "lib" / "libtorch_cpu.dylib"
RPATHS = ("-Wl,-rpath,@loader_path", "-Wl,-rpath,@loader_path/../torch/lib")

lief = pytest.importorskip("lief", reason="make mac-check installs lief")
from mac_check import binary, compiler, wheel  # noqa: E402

needs_tools = pytest.mark.skipif(
    not (OPS.exists() and COMPILER.exists()), reason="the tools for macOS are missing: run `make mac-check`"
)


def link(folder: Path, source: str, *flags: object, name: str = "libmfa.dylib") -> Path:
    code, thing, output = folder / "x.cpp", folder / "x.o", folder / name
    code.write_text(source)
    subprocess.run([COMPILER, "-O2", "-fvisibility=hidden", "-c", code, "-o", thing], check=True)
    command = [COMPILER, "-dynamiclib", thing, *flags, "-install_name", f"@rpath/{name}", "-o", output]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


def uses(symbol: str) -> str:
    return f"""
        extern "C" char x asm("{symbol}");
        extern "C" __attribute__((visibility("default"))) char* mfa_x() {{ return &x; }}
    """


def doctored(tmp_path: Path, change: object) -> list[str]:
    """The faults of our library after `change` of its loader commands."""
    library = binary.arm64(OPS)
    change(library)  # type: ignore[operator]
    path = tmp_path / "libmfa.dylib"
    library.write(str(path))
    return binary.ops_faults(path)


@needs_tools
def test_ours_is_right(tmp_path: Path) -> None:
    assert binary.ops_faults(OPS) == []
    assert binary.extension_faults(OPS.with_name("_native.abi3.so")) == []


@needs_tools
def test_wrong_minimum_system(tmp_path: Path) -> None:
    def change(library: object) -> None:
        library.build_version.minos = [15, 0, 0]  # type: ignore[attr-defined]

    assert doctored(tmp_path, change) == ["the minimum macOS is [15, 0], not 14.0"]


@needs_tools
def test_wrong_rpath(tmp_path: Path) -> None:
    def change(library: object) -> None:
        next(iter(library.rpaths)).path = "/opt/x"  # type: ignore[attr-defined]

    assert any(fault.startswith("its rpaths are") and "/opt/x" in fault for fault in doctored(tmp_path, change))


@needs_tools
def test_unstable_import_and_export(tmp_path: Path) -> None:
    """The two unofficial functions may be looked up, not imported; and nothing is exported by accident."""
    source = """
        extern "C" char stream asm("__ZN2at3mps19getCurrentMPSStreamEv");
        __attribute__((visibility("default"))) char* leaked() { return &stream; }
    """
    faults = binary.ops_faults(link(tmp_path, source, TORCH, *RPATHS))
    assert "it imports __ZN2at3mps19getCurrentMPSStreamEv of torch, which is not in the stable ABI" in faults
    assert "it exports __Z6leakedv" in faults
    assert any("looks up" in fault for fault in faults)


@needs_tools
def test_other_library(tmp_path: Path) -> None:
    accelerate = CACHE / "sdk/System/Library/Frameworks/Accelerate.framework/Accelerate.tbd"
    symbol = next(name for name in accelerate.read_text().split("'") if name.startswith("_cblas_"))
    faults = binary.ops_faults(link(tmp_path, uses(symbol), accelerate, *RPATHS))
    assert any(fault.startswith("it links") and "Accelerate" in fault for fault in faults)


@needs_tools
@pytest.mark.parametrize("name", ["__ZN2at3mps19getCurrentMPSStreamEi", "_no_such_function"])
def test_link_is_strict(tmp_path: Path, name: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        link(tmp_path, uses(name), TORCH, *RPATHS)
    assert f"undefined symbol: {name}" in error.value.stderr


def repacked(tmp_path: Path, name: str, change: object) -> list[str]:
    (original,) = (CACHE / "dist").glob("*.whl")
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(tmp_path / name, "w") as target:
        for member in source.namelist():
            for new, content in change(member, source.read(member)):  # type: ignore[operator]
                target.writestr(new, content)
    return wheel.faults(tmp_path)


@needs_tools
def test_wheel_is_checked(tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> list[tuple[str, bytes]]:
        if name.endswith("libmfa.dylib"):
            return [(name, content), ("mfa/libmfa_simulator.dylib", b"")]
        if name.endswith("METADATA"):
            return [(name, content.replace(b"Requires-Dist: torch>=2.10", b"Requires-Dist: torch>=2.10,<3"))]
        return [] if name.endswith("py.typed") else [(name, content)]

    faults = "\n".join(repacked(tmp_path, "torch_mfa-0.1.0-cp310-abi3-linux_x86_64.whl", change))
    for text in ("its name is", "its binaries are", "libmfa_simulator.dylib", "upper bound", "it lacks mfa/py.typed"):
        assert text in faults


def test_links_are_translated() -> None:
    arguments = ["-arch", "arm64", "-bundle", "-Wl,-dead_strip", "-Wl,@/x/darwin-ld-cpython.sym", "-o", "a.so", "a.o"]
    translated = compiler.link_arguments(arguments, Path("/sdk"))
    assert translated[-4:] == ["/sdk/usr/lib/libpython.tbd", "-o", "a.so", "a.o"]
    assert "dynamic_lookup" not in " ".join(translated)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    (tmp_path / "a.h").write_text("#pragma once\nint a;\n")
    (tmp_path / "b.h").write_text('#pragma once\n#include "a.h"\nint b;\n')
    (tmp_path / "k.metal").write_text('#include <metal_stdlib>\n#include "b.h"\n#include "a.h"\nint k;\n')
    return tmp_path / "k.metal"


def test_embedded_source_compiles_by_itself(kernels: Path, tmp_path: Path) -> None:
    """Headers come once; messages keep the file and line of the original."""
    import embed_kernels

    text = embed_kernels.inline(kernels, set())
    assert text.count("int a;") == 1
    assert '#include "' not in text
    assert "#include <metal_stdlib>" in text
    compiler_found = shutil.which("c++") or shutil.which("g++")
    if compiler_found is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "k.cpp"
    source.write_text(text.replace("#include <metal_stdlib>", "") + "int k;\n")  # twice: an error at its line
    done = subprocess.run([compiler_found, "-c", source, "-o", tmp_path / "k.o"], capture_output=True, text=True)
    assert "k.metal:4:" in done.stderr
