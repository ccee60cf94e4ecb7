"""What a call of inference takes on the host, in counts: the same in every run, unlike times (host_cost.py).

PYTHONPATH=tests python -m driver.host_counts        (measure() adds what has to be preloaded)
"""

import ctypes
import dis
import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

import mfa

from . import build, calls, control, process, stand_in

PACKAGE = str(Path(mfa.__file__).parent)
CALLED_IN_PYTHON = torch._ops.OpOverload.__call__.__code__  # torch's way into C++
GETTERS = {name for name, member in vars(torch._C.TensorBase).items() if inspect.isgetsetdescriptor(member)}


class Counts(NamedTuple):
    """Of one call."""

    functions: int  # of mfa in Python that run
    crossings: int  # from them to C++: ops, methods and attributes of tensors, builtins
    heap: int  # allocations by libmfa
    tensors: int  # allocated on the device
    messages: int  # to Metal's objects


def measure() -> dict[str, Counts]:
    """Of each of calls.calls(), in a new process."""
    report = json.loads(process.run("host_counts", LD_PRELOAD=str(build.heap())))
    return {name: Counts(*counts) for name, counts in report.items()}


@functools.cache
def getter_reads(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions that read a tensor's attribute (or one of that name)."""
    instructions = dis.get_instructions(code)
    return frozenset(each.offset for each in instructions if each.opname == "LOAD_ATTR" and each.argval in GETTERS)


def in_python(call: Callable[[], object]) -> tuple[int, int]:
    """Functions of mfa that run, and their crossings."""
    functions = crossings = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal functions, crossings
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        functions += event == "call"
        crossings += event == "opcode" and frame.f_lasti in getter_reads(frame.f_code)
        return trace

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal crossings
        from_us = frame.f_code.co_filename.startswith(PACKAGE)
        crossings += (event == "c_call" and from_us) or (event == "call" and frame.f_code is CALLED_IN_PYTHON)

    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        sys.settrace(None)
    return functions, crossings


def below_python(call: Callable[[], object]) -> tuple[int, int, int]:
    """Allocations of libmfa, tensors, messages."""
    heap = ctypes.CDLL(None)  # preloaded
    device = ctypes.CDLL(str(build.mps_device()))
    before = device.mfa_mps_allocation_count(), stand_in.DRIVER.library.mfa_driver_message_count()
    heap.mfa_heap_start()
    call()
    allocations = heap.mfa_heap_stop()
    after = device.mfa_mps_allocation_count(), stand_in.DRIVER.library.mfa_driver_message_count()
    return allocations, after[0] - before[0], after[1] - before[1]


def main() -> None:
    stand_in.DRIVER.library.mfa_driver_set_execution(control.EXECUTIONS["nothing"])
    report = {}
    with torch.inference_mode():
        for name, call in calls.calls().items():
            call()  # compiles
            report[name] = (*in_python(call), *below_python(call))
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
