"""What the macOS wheel must look like. A cross-built one has no metallib, and no stub of _native: both need a Mac."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

NAME = re.compile(r"torch_mfa-[\w.]+-cp310-abi3-macosx_14_0_arm64\.whl")
BINARIES = {"mfa/libmfa.dylib", "mfa/_native.abi3.so"}
# Of the simulator and of Linux.
FOREIGN = re.compile(r"simulator.*\.(so|dylib)|kernels_\w+\.(so|dylib)|\.so\.|linux|\.(h|cpp|metal)$")


def faults(folder: Path) -> list[str]:
    (path,) = folder.glob("*.whl")
    result = []
    if not NAME.fullmatch(path.name):
        result.append(f"its name is {path.name}")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        tags = Parser().parsestr(wheel.read(f"{info}/WHEEL").decode())
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    if tags.get_all("Tag") != ["cp310-abi3-macosx_14_0_arm64"] or tags["Root-Is-Purelib"] != "false":
        result.append(f"WHEEL says {tags.get_all('Tag')}, purelib {tags['Root-Is-Purelib']}")
    native = {name for name in names if re.search(r"\.(so|dylib|a)$", name)}
    if native != BINARIES:
        result.append(f"its binaries are {sorted(native)}, not {sorted(BINARIES)}")
    result += [f"it contains {name}" for name in sorted(names) if FOREIGN.search(name)]
    result += [f"it lacks {name}" for name in ("mfa/__init__.py", "mfa/py.typed") if name not in names]
    result += [f"it lacks a licence in {info}"] * (not any("/licenses/" in name for name in names))
    requirements = metadata.get_all("Requires-Dist") or []
    if metadata["Name"] != "torch-mfa" or metadata["Requires-Python"] != ">=3.10":
        result.append(f"METADATA says {metadata['Name']}, Python {metadata['Requires-Python']}")
    if not any(re.fullmatch(r"torch>=2\.10", requirement) for requirement in requirements):
        result.append(f"it requires {requirements}: torch must be >=2.10, without an upper bound")
    # Which Python symbols the extension uses; and what does not belong into a wheel.
    return result + tool_faults("abi3audit", "--strict", path) + tool_faults("check_wheel_contents", path)


def tool_faults(*command: object) -> list[str]:
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True)
    return [done.stdout + done.stderr] if done.returncode else []
