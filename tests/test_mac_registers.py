"""tests/mac_registers.py over stand-ins for Apple's tools and for what its compiler writes; in `make mac-check`."""

import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("lief", reason="make mac-check installs lief")
flatbuffers = pytest.importorskip("flatbuffers", reason="make mac-check installs flatbuffers")
import mac_registers  # noqa: E402
from agx_check.emit import Pipeline  # noqa: E402
from agx_check.instances import CONSTANTS, pipelines, sources  # noqa: E402

from mfa.bench import kernels, registers  # noqa: E402

PIPELINE = Pipeline("forward_f16_d64_v64_staged_s8_r2_k32", 256, (CONSTANTS["aligned"], CONSTANTS["writes_lse"]))

ON_UNIT = next(each for each in pipelines(on_unit=True) if each.name == "forward_f16_d64_v64_unit_s4_r2_k32")


def macho(sections: Mapping[tuple[str, str], bytes]) -> bytes:
    """A 64-bit Mach-O for Apple's GPU, with a segment per section."""
    commands, contents = b"", b""
    first = 32 + 152 * len(sections)
    for (segment, section), data in sections.items():
        at, size = first + len(contents), len(data)
        names = segment.encode(), section.encode()
        commands += struct.pack("<II16sQQQQiiII", 0x19, 152, names[0], 0, size, at, size, 7, 7, 1, 0)
        commands += struct.pack("<16s16sQQ8I", names[1], names[0], 0, size, at, *[0] * 7)
        contents += data
    header = struct.pack("<IiiIIIII", 0xFEEDFACF, 0x1000013, 0, 1, len(sections), len(commands), 0, 0)
    return header + commands + contents


def metadata(values: Mapping[int, int]) -> bytes:
    """A table of 40 slots, absent where zero, in slot 0 of the root; a name before it moves everything."""
    builder = flatbuffers.Builder(0)
    builder.ForceDefaults(False)
    name = builder.CreateString("forward")
    builder.StartObject(40)
    for slot, value in values.items():
        builder.PrependUint32Slot(slot, value, 0)
    builder.PrependUOffsetTRelativeSlot(2, name, 0)
    info = builder.EndObject()
    builder.StartObject(3)
    builder.PrependUOffsetTRelativeSlot(0, info, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def gpu_binary(values: Mapping[int, int], code: bytes = b"\x0e" * 300) -> bytes:
    inner = {("__TEXT", "__text"): code, ("__GPU_METADATA", "__compute"): metadata(values)}
    return macho({("__TEXT", "__compute"): macho(inner)})


@pytest.mark.parametrize(("found", "spill"), [(110, 0), (128, 352), (1, 0)])
def test_registers_of_a_binary(found: int, spill: int) -> None:
    binary = gpu_binary({0: found, 1: 77, 14: spill, 31: 8})
    assert mac_registers.read(binary) == (found, spill, 300)


@pytest.mark.parametrize("values", [{}, {0: 100_000}, {1: 5}])
def test_another_layout_is_an_error(values: Mapping[int, int]) -> None:
    with pytest.raises(ValueError, match="another layout"):
        mac_registers.read(gpu_binary(values))


def test_a_binary_without_code_is_an_error() -> None:
    with pytest.raises(ValueError, match="section __TEXT,__compute"):
        mac_registers.read(macho({("__TEXT", "__vertex"): b"x"}))


def test_a_script_gives_every_constant_a_value() -> None:
    script = mac_registers.script(Path("/x/mfa.metallib"), PIPELINE)
    (special,) = script["libraries"]["specialized_functions"]
    values = {value["id"]["data"]: value["value"]["data"] for value in special["constant_values"]}
    assert values == {index: index in PIPELINE.constants for index in CONSTANTS.values()}
    assert special["function"] == f"alias:mfa#{PIPELINE.kernel}"
    assert script["pipelines"]["compute_pipelines"] == [{"compute_function": f"alias:pipeline#{PIPELINE.kernel}"}]
    assert script["libraries"]["paths"] == [{"label": "mfa", "path": "/x/mfa.metallib"}]


# As metal-tt and metal-lipo work: an archive holds code for several chips, one of which is taken out.
XCRUN = """#!{python}
import json, pathlib, shutil, sys
folder = pathlib.Path(__file__).parent
assert sys.argv[1:3] == ["-sdk", "macosx"], sys.argv
name, *arguments = sys.argv[3:]
if name == "--show-sdk-version":
    print("26.2")
elif name == "metal-tt":
    flag, family, *platform, script, output, archive = arguments
    assert (flag, platform, output) == ("-gpu-family", ["-platform_version", "macos", "26.2", "26.2"], "-o")
    libraries = json.loads(pathlib.Path(script).read_text())["libraries"]
    kernel = libraries["specialized_functions"][0]["function"]
    is_on_unit = libraries["paths"][0]["path"].endswith("mfa_metal4.metallib")
    assert is_on_unit == ("_unit_" in kernel)
    if family == "apple8" or is_on_unit and family != "apple10":
        sys.exit(f"unknown GPU family {{family}}")
    if "append" in kernel:
        sys.exit("cannot translate")
    pathlib.Path(archive).write_text(family)
elif arguments[1] == "-archs":
    family = pathlib.Path(arguments[0]).read_text()
    chips = dict(apple7="g13g g13s", apple9="g16s", apple10="g17p g17s")[family].split()
    print("air64", *("applegpu_" + chip for chip in chips))
else:
    archive, thin, chip, output, target = arguments
    assert (thin, output) == ("-thin", "-output")
    shutil.copy(folder / chip, target)
"""


@pytest.fixture
def xcode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "xcrun").write_text(XCRUN.format(python=sys.executable))
    (tmp_path / "xcrun").chmod(0o755)
    for chip, (found, spill) in {
        **{"g13g": (112, 0), "g13s": (110, 0), "g16s": (96, 64)},
        **{"g17p": (126, 0), "g17s": (120, 16)},
    }.items():
        (tmp_path / f"applegpu_{chip}").write_bytes(gpu_binary({0: found, 14: spill}))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_report(xcode: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each chip of each family; what can't be had is said, and stops nothing else."""
    chosen = [PIPELINE, Pipeline("append_f16_s4", 128, ())]
    monkeypatch.setattr(mac_registers, "pipelines", lambda *, on_unit=False: [ON_UNIT] if on_unit else chosen)
    libraries = xcode / "mfa.metallib", xcode / "mfa_metal4.metallib"
    found = mac_registers.report(*libraries, ("apple7", "apple8", "apple9", "apple10"))
    assert found == {
        "applegpu_g13g": {PIPELINE.name: (112, 0, 300)},
        "applegpu_g13s": {PIPELINE.name: (110, 0, 300)},
        "applegpu_g16s": {PIPELINE.name: (96, 64, 300)},
        "applegpu_g17p": {PIPELINE.name: (126, 0, 300), ON_UNIT.name: (126, 0, 300)},
        "applegpu_g17s": {PIPELINE.name: (120, 16, 300), ON_UNIT.name: (120, 16, 300)},
        "apple7": {"append_f16_s4": "cannot translate"},
        "apple8": {PIPELINE.name: "unknown GPU family apple8"},
        "apple9": {"append_f16_s4": "cannot translate"},
        "apple10": {"append_f16_s4": "cannot translate"},
    }
    assert ON_UNIT.name not in mac_registers.report(libraries[0], families=("apple10",))["applegpu_g17s"]


def test_the_model_takes_what_a_mac_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = pipelines()[0].name
    rows = {PIPELINE.name: (104, 0, 9000), other: (128, 40, 100)}
    path = tmp_path / "mac-report.json"
    path.write_text(json.dumps({"registers": {"result": {registers.CHIP: rows, "applegpu_g16s": {}}}}))
    monkeypatch.setattr(registers, "APPLE", tmp_path / "registers_apple.json")
    monkeypatch.setattr(sys, "argv", ["mac_registers", str(path)])
    mac_registers.main()
    before, after = registers.load(), registers.load(apple=registers.APPLE)
    assert after[PIPELINE.name] == before[PIPELINE.name]._replace(registers=104, stack=0, stack_bytes=0)
    assert after[other] == before[other]._replace(registers=128, stack=5, stack_bytes=80)
    assert {name for name in after if after[name] != before[name]} <= {PIPELINE.name, other}
    written = json.loads(registers.APPLE.read_text())
    assert written["sources"] == sources()
    registers.APPLE.write_text(json.dumps({**written, "sources": {**written["sources"], "forward": "changed since"}}))
    assert registers.load(apple=registers.APPLE) == before


def test_a_phones_registers_are_not_the_units() -> None:
    assert mac_registers.unit_chip(["applegpu_g17p", "applegpu_g16s", "apple10"]) is None
    assert mac_registers.unit_chip(["applegpu_g17g", "applegpu_g17s", "applegpu_g17d"]) == "applegpu_g17s"


def test_the_model_takes_what_a_mac_said_of_the_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of estimates, as long as the kernels do what they did; launches of dK and of dV apart."""
    apart = "backward_dkdv_bf16_d128_v128_unit_s4_r2_q16/dk"
    assert apart in {pipeline.name for pipeline in pipelines(on_unit=True)}
    chips = {
        registers.CHIP: {},
        "applegpu_g17p": {ON_UNIT.name: (1, 0, 1)},
        "applegpu_g17g": {ON_UNIT.name: (2, 0, 1)},
        "applegpu_g17s": {ON_UNIT.name: (101, 0, 9), apart: (128, 40, 9), "combine_f16_t128": (20, 0, 9)},
    }
    path = tmp_path / "mac-report.json"
    path.write_text(json.dumps({"registers": {"result": chips}}))
    monkeypatch.setattr(registers, "APPLE", tmp_path / "registers_apple.json")
    monkeypatch.setattr(registers.on_unit, "__defaults__", (registers.APPLE,))
    monkeypatch.setattr(sys, "argv", ["mac_registers", str(path)])
    before = kernels.load()
    mac_registers.main()
    after = kernels.load()
    assert after[ON_UNIT.name] == before[ON_UNIT.name]._replace(registers=101, stack=0, stack_bytes=0)
    assert after[apart] == before[apart]._replace(registers=128, stack=5, stack_bytes=80)
    changed = [name for name in after if after[name] != before[name]]
    said = capsys.readouterr().out.splitlines()
    assert sorted(changed) == sorted([ON_UNIT.name, apart]) == sorted(line.split(": ")[0] for line in said)
    estimate = before[ON_UNIT.name].registers
    assert f"{ON_UNIT.name}: {estimate} registers, 0 bytes of stack per step; Apple's: 101 registers, " in "\n".join(
        said
    )
    # A kernel that does something else since keeps its estimate.
    counted = kernels.counted()
    other = counted[ON_UNIT.name]._replace(load=counted[ON_UNIT.name].load + 1)
    monkeypatch.setattr(kernels, "counted", lambda path: {**counted, other.name: other})
    assert kernels.load()[ON_UNIT.name].registers == estimate
    assert kernels.load()[apart].registers == 128
