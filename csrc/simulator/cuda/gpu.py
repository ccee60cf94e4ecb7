"""Runs plans of mfa on an NVIDIA GPU: the kernels as PTX, launched through the driver API on tensors of torch.

Needs torch with CUDA, libcuda, the PTX files of translate_cuda.py and the extension module mfa._native.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ARGUMENTS = 31  # of metal/params.h


def load_native(path: Path) -> Any:
    """mfa._native by itself, without the package."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def enumerators(header: Path, name: str) -> dict[str, int]:
    """`kQuery = 0` ... of an enumeration in metal/params.h."""
    text = header.read_text()
    body = text[text.index(f"enum {name}") :]
    return {found[1]: int(found[2]) for found in re.finditer(r"k(\w+) = (\d+)", body[: body.index("};")])}


class Gpu:
    """Kernels of some PTX files."""

    def __init__(self, ptx: Sequence[Path], header: Path) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes torch's context current
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._arguments = {_snake(name): index for name, index in enumerators(header, "Argument").items()}
        self._constants = enumerators(header, "FunctionConstant")
        self._modules = [self._load(path) for path in ptx]
        self._functions: dict[str, tuple[Any, Any]] = {}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()}")

    def _load(self, path: Path) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), path.read_bytes() + b"\0")
        return module

    def function(self, name: str) -> tuple[Any, Any]:
        """A kernel, and the address of its module's function constants."""
        if name not in self._functions:
            for module in self._modules:
                function, constants, size = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_size_t()
                if self._driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()) == 0:
                    self._call(
                        "cuModuleGetGlobal_v2",
                        ctypes.byref(constants),
                        ctypes.byref(size),
                        module,
                        b"mfa_function_constants",
                    )
                    self._functions[name] = (function, constants)
                    break
            else:
                raise KeyError(f"no PTX file has a kernel {name}")
        return self._functions[name]

    def launch(
        self,
        kernel: str,
        constants: Sequence[int],
        grid: Sequence[int],
        group: Sequence[int],
        arguments: Mapping[str, torch.Tensor],
    ) -> None:
        """`constants`: indices of those that are true; `arguments`: by name, as in metal/params.h (query, grad_out, ...)."""
        function, address = self.function(kernel)
        values = bytearray(64)
        for index in constants:
            values[index] = 1
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call("cuMemcpyHtoD_v2", address, bytes(values), ctypes.c_size_t(64))
        buffers = (ctypes.c_void_p * ARGUMENTS)()
        for name, tensor in arguments.items():
            buffers[self._arguments[name]] = tensor.data_ptr()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(buffers))
        sizes = [ctypes.c_uint(x) for x in (*grid, *group)]
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_uint(0), stream, parameters, None)
        torch.cuda.synchronize()  # before the constants change

    def run(self, plan: Any, arguments: Mapping[str, torch.Tensor]) -> None:
        """Every launch of a plan, in order."""
        params = torch.frombuffer(bytearray(bytes(plan.params)), dtype=torch.uint8).cuda()
        for launch in plan.launches:
            first = torch.tensor(launch.unit, dtype=torch.int32, device="cuda")
            on = [self._constants[_camel(name)] for name, value in launch.constants.items() if value]
            self.launch(
                launch.kernel, on, launch.grid, launch.group, {**arguments, "params": params, "first_unit": first}
            )


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


def _camel(name: str) -> str:
    """is_aligned -> Aligned, is_varlen -> IsVarlen: as FunctionConstant spells it."""
    return {"is_aligned": "Aligned", "is_exact_head": "ExactHead"}.get(
        name, "".join(part.capitalize() for part in name.split("_"))
    )
