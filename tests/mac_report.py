"""make mac: tests and times mfa on this Mac, and writes a JSON report to attach to an issue.

Each part runs in a process of its own, so that one that crashes is part of the report and not its end. The report holds
no name of the user or of the machine.
"""

import argparse
import getpass
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOUR = 3600
# What Metal itself can check. Both slow a GPU down many times, so these runs are not the timed ones.
API_VALIDATION = {"MTL_DEBUG_LAYER": "1"}
SHADER_VALIDATION = {"MTL_DEBUG_LAYER": "1", "MTL_SHADER_VALIDATION": "1"}
# dtype, B, Hq, Hkv, Lq, Lk, D, causal: prefill at each head dimension, GQA, long, a decoding step.
SHAPES = [
    ("float16", 1, 16, 16, 2048, 2048, 64, False),
    ("float16", 1, 16, 16, 2048, 2048, 64, True),
    ("float16", 1, 32, 8, 4096, 4096, 128, True),
    ("bfloat16", 1, 32, 8, 4096, 4096, 128, True),
    ("float32", 1, 16, 16, 2048, 2048, 64, True),
    ("float16", 1, 8, 8, 2048, 2048, 256, True),
    ("float16", 1, 8, 8, 16384, 16384, 64, True),
    ("float16", 1, 32, 8, 1, 8192, 128, False),
    ("float16", 2, 10, 10, 4096, 4096, 64, False),  # an image model
]

# Of M5's matrix unit, in the order in which each answer is good for the next: see mac_unit/questions.py.
UNIT_QUESTIONS = ("layout", "adder", "overlap", "spills", "queries", "unroll", "barrier", "block", "simdgroups")
UNIT_QUESTIONS += ("rounding", "l1", "mlx")


def anonymous(value: Any) -> Any:
    """A JSON value without the user's and the machine's name, at any depth, in keys too."""
    if isinstance(value, dict):
        return {anonymous(key): anonymous(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [anonymous(item) for item in value]
    if not isinstance(value, str):
        return value
    folders = {str(ROOT): "<mfa>", str(Path.home().resolve()): "~", str(Path.home()): "~"}
    for folder, name in folders.items():
        value = value.replace(folder, name)
    names = {platform.node(): "<host>", platform.node().split(".")[0]: "<host>", getpass.getuser(): "<user>"}
    for secret, name in names.items():
        if secret:
            value = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", name, value)
    return value


def write(report: dict[str, Any], path: Path) -> None:
    """The only way out of this program, so that nothing leaves it with a name."""
    path.write_text(json.dumps(anonymous(report), indent=1) + "\n")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it doesn't exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_cores() -> int | None:
    # Neither Metal nor sysctl knows the number.
    found = re.search(r'"gpu-core-count" = (\d+)', output_of("ioreg", "-rd1", "-c", "AGXAccelerator") or "")
    return int(found[1]) if found else None


def machine() -> dict[str, Any]:
    import torch

    toolchain = output_of("sh", str(ROOT / "cmake" / "metal_toolchain.sh"))
    environment = ["env", f"TOOLCHAINS={toolchain}"] if toolchain else []
    return {
        "model": output_of("sysctl", "-n", "hw.model"),
        "chip": output_of("sysctl", "-n", "machdep.cpu.brand_string"),
        "memory_bytes": output_of("sysctl", "-n", "hw.memsize"),
        "gpu_cores": gpu_cores(),
        "macos": output_of("sw_vers", "-productVersion"),
        "macos_build": output_of("sw_vers", "-buildVersion"),
        "power": (output_of("pmset", "-g", "batt") or "").split("\n")[0],  # on battery, chips run slower
        "low_power_mode": re.search(r"lowpowermode\s+1", output_of("pmset", "-g") or "") is not None,
        "metal_compiler": output_of(*environment, "xcrun", "-sdk", "macosx", "metal", "--version"),
        "xcode": output_of("xcodebuild", "-version"),
        "python": sys.version,
        "torch": torch.__version__,
        "mps": torch.backends.mps.is_available(),
        "source": output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "packages": output_of(sys.executable, "-m", "pip", "list", "--format=freeze"),
    }


def backend() -> dict[str, Any]:
    import dataclasses

    import mfa
    from mfa import _metal

    return {"device_info": dataclasses.asdict(mfa.device_info()), "metal": _metal.info()}


def first_call() -> float:
    """Seconds of the first attention of this process: loading, compiling or finding the pipeline, running."""
    import torch

    import mfa

    query = torch.randn(1, 8, 512, 64, device="mps", dtype=torch.float16)
    torch.mps.synchronize()
    start = time.perf_counter()
    mfa.attention(query, query, query)
    torch.mps.synchronize()
    return time.perf_counter() - start


def first_calls() -> dict[str, Any]:
    """With an empty archive, and in a second process with what the first has left there."""
    with tempfile.TemporaryDirectory() as cache:
        return {name: part("first-call", {"MFA_CACHE_DIR": cache}) for name in ("cold", "archived")}


def seconds(function: Callable[[], object]) -> float | str:
    """The median, or why it can't be run."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("f(); torch.mps.synchronize()", globals={"f": function, "torch": torch})
    try:
        return timer.blocked_autorange(min_run_time=1).median
    except (RuntimeError, NotImplementedError) as error:  # out of memory, or not supported
        return str(error)[:500]


def timings(
    dtype: str, B: int, Hq: int, Hkv: int, Lq: int, Lk: int, D: int, causal: bool
) -> dict[str, float | str | int | bool]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import mfa

    torch.manual_seed(0)
    shapes = [(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D)]
    inputs = [torch.randn(shape, device="mps", dtype=getattr(torch, dtype)) for shape in shapes]
    learned = [tensor.clone().requires_grad_() for tensor in inputs]
    options = {"is_causal": causal, "enable_gqa": Hq != Hkv}
    row = {"dtype": dtype, "B": B, "Hq": Hq, "Hkv": Hkv, "Lq": Lq, "Lk": Lk, "D": D, "causal": causal}
    for name, attention in {"mfa": mfa.attention, "torch": scaled_dot_product_attention}.items():
        row[f"{name}_forward"] = seconds(partial(attention, *inputs, **options))
        if Lq > 1:
            row[f"{name}_training"] = seconds(partial(train, attention, learned, options))
    torch.mps.empty_cache()
    return row


def train(attention: Callable[..., Any], inputs: list[Any], options: dict[str, bool]) -> None:
    import torch

    torch.autograd.grad(attention(*inputs, **options).sum(), inputs)


def benchmark() -> list[dict[str, Any]]:
    """Seconds of mfa and of torch's own attention: forward, and forward with backward."""
    return [timings(*shape) for shape in SHAPES]


def unit(device: str = "mps", length: int = 4096) -> list[dict[str, Any]] | None:
    """On M5, TFLOP/s of the forward pass: every kernel for the matrix unit, torch's own, and what each of the cost
    model's views predicts. D 64 against D 128 tells which of them is right; None where there is no such unit."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import mfa
    from mfa import _library, _native
    from mfa.bench import kernels, model
    from mfa.bench.chips import CHIPS

    info = mfa.device_info()
    if info.family != "apple10":
        return None
    chip = CHIPS["m5-max"]._replace(cores=info.cores or gpu_cores())
    table, rows = kernels.load(), []
    for instance in _native.catalogue():
        if not instance.path.startswith("unit") or instance.kind != "forward":
            continue
        problem = model.Problem(1, 32, length, instance.head_dim)
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[instance.dtype]
        dims = (instance.head_dim, instance.head_dim, instance.value_dim)
        inputs = [torch.randn(1, 32, length, dim, dtype=dtype, device=device) for dim in dims]
        row: dict[str, Any] = {"kernel": instance.name}
        _library.prefer_instance(instance.name)
        for name, attention in {"mfa": mfa.attention, "torch": scaled_dot_product_attention}.items():
            taken = seconds(partial(attention, *inputs))
            row[name] = taken if isinstance(taken, str) else problem.operations(2) / taken / 1e12
        _library.prefer_instance(None)
        for view, each in model.VIEWS.items():
            prediction = model.predict(table[instance.name], problem, chip, model.tensor_bytes(problem, 4), view=each)
            row[f"predicted_{view}"] = problem.operations(2) / prediction.seconds / 1e12
        rows.append(row)
    return rows


def unit_question(name: str) -> dict[str, Any] | None:
    """On M5, one of the design's open questions about the matrix unit; also where mfa doesn't use it."""
    import mfa

    info = mfa.device_info()
    if info.family != "apple10":
        return None
    from mac_unit import questions

    return questions.ask(name, info.cores or gpu_cores())


def registers() -> dict[str, Any]:
    """Of every pipeline, by Apple's own compiler: {chip: {pipeline: [registers, spill bytes, code bytes]}}.

    Those for the matrix unit on any Mac, if Xcode's SDK was new enough for them.
    """
    import mac_registers

    from mfa import _library

    metallib = _library.metallib()
    if not metallib.exists():
        raise ValueError("this build has no metallib: it needs Xcode's Metal toolchain")
    unit_metallib = metallib.with_name("mfa_metal4.metallib")
    return mac_registers.report(metallib, unit_metallib if unit_metallib.exists() else None)


def pytest(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Counts, and the text of every failure.

    Pipelines are archived in a folder of this run's own: those that Metal validates must not reach the user's archive.
    """
    with tempfile.TemporaryDirectory() as temporary:
        environment = {**os.environ, "MFA_CACHE_DIR": str(Path(temporary) / "cache"), **environment}
        xml = Path(temporary) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", *arguments]
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * HOUR)
        report: dict[str, Any] = {"exit": done.returncode, "seconds": round(time.monotonic() - start, 1)}
        if not xml.exists():  # the process was killed
            return {**report, "output": (done.stdout + done.stderr)[-20_000:]}
        suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert suite is not None
    report |= {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    report["failed"] = [
        {"test": f"{case.get('classname')}.{case.get('name')}", "text": (problem.text or "")[-4000:]}
        for case in suite.iter("testcase")
        for problem in [*case.findall("failure"), *case.findall("error")]
    ]
    return report


PARTS: dict[str, Callable[[], Any]] = {
    "machine": machine,
    "backend": backend,
    "first-calls": first_calls,
    "benchmark": benchmark,
    "unit": unit,
    **{f"unit-{name}": partial(unit_question, name) for name in UNIT_QUESTIONS},
    "registers": registers,
    "tests": lambda: pytest(["-m", "not mps", "-n", "auto"], {}),
    "mps-tests": lambda: pytest(["-m", "mps"], {}),
    "mps-tests-api-validation": lambda: pytest(["-m", "mps and not slow"], API_VALIDATION),
    "mps-tests-shader-validation": lambda: pytest(["-m", "mps and not slow"], SHADER_VALIDATION),
}
INNER = {"first-call": first_call}


def part(name: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a part in a process of its own: {"result": ...}, or {"error": ...}."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode == 0:
        return {"result": json.loads(done.stdout.splitlines()[-1])}
    text = (done.stdout + done.stderr)[-10_000:].strip()
    return {"error": text or "no output", "exit": done.returncode}


def verdict(name: str, outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return f"FAIL {name} (exit {outcome['exit']}): {outcome['error'].splitlines()[-1]}"
    result = outcome["result"]
    if isinstance(result, dict) and "tests" in result:
        failed = result["failures"] + result["errors"]
        counts = f"{result['tests']} tests, {failed} failed, {result['skipped']} skipped"
        return f"{'FAIL' if result['exit'] else 'ok  '} {name}: {counts}"
    answer = result.get("answer") if isinstance(result, dict) else None
    return f"ok   {name}: {answer}" if answer else f"ok   {name}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mac", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "mac-report.json")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--part", choices=[*PARTS, *INNER], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps({**PARTS, **INNER}[arguments.part]()))
        return
    report: dict[str, Any] = {"format": 1}
    for name in PARTS:
        if name in arguments.skip:
            continue
        print(f"...  {name}", flush=True)
        report[name] = part(name)
        print(verdict(name, report[name]), flush=True)
        # After every part, so that a machine that hangs leaves what was found before.
        write(report, arguments.output)
        if name == "machine" and not report[name].get("result", {}).get("mps"):
            sys.exit("make mac needs a Mac with an Apple GPU: torch finds no mps device here")
    print(f"\nThe report is {arguments.output}: please attach it to an issue, whatever it says.")


if __name__ == "__main__":
    main()
