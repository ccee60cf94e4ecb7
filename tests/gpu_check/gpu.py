"""Launches compiled pipelines on an NVIDIA GPU through the driver API, on tensors of torch. Needs torch and libcuda."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUFFERS = 31


class Gpu:
    """Pipelines of a directory, each loaded when it is first used."""

    device = "cuda"

    def __init__(self, directory: Path, arguments: Mapping[str, int]) -> None:
        torch.zeros(1, device="cuda")  # makes torch's context current
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._directory = directory
        self._arguments = arguments
        self._functions: dict[str, ctypes.c_void_p] = {}
        self.launches = 0

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()}")

    def _function(self, pipeline: str, kernel: str) -> ctypes.c_void_p:
        if pipeline not in self._functions:
            file = self._directory / f"{pipeline}.cubin"
            image = file.read_bytes() if file.exists() else (self._directory / f"{pipeline}.ptx").read_bytes() + b"\0"
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), image)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
            self._functions[pipeline] = function
        return self._functions[pipeline]

    def launch(
        self,
        kernel: str,
        constants: Sequence[int],
        grid: Sequence[int],
        threads: int,
        buffers: Mapping[int, Tensor],
    ) -> None:
        """On torch's current stream. `constants`: indices of those that are true; `buffers` by index."""
        function = self._function("-".join([kernel, *map(str, constants)]), kernel)
        block = (ctypes.c_void_p * BUFFERS)()
        for index, tensor in buffers.items():
            block[index] = tensor.data_ptr()
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        sizes = [ctypes.c_uint(x) for x in (*grid, threads, 1, 1)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_uint(0), stream, parameters, None)
        self.launches += 1

    def run(self, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Every launch of a plan, in order; `tensors` by their names in metal/params.h: query, grad_out, ..."""
        made = {"params": torch.frombuffer(bytearray.fromhex(plan["params"]), dtype=torch.uint8).cuda()}
        for name, size in (("score_gradient", "scratch"), ("tile_map", "tile_map"), ("mask_classes", "mask_class")):
            if plan[f"{size}_bytes"]:
                made[name] = torch.full((plan[f"{size}_bytes"],), 255, dtype=torch.uint8, device="cuda")
        buffers = {self._arguments[name]: tensor for name, tensor in {**tensors, **made}.items()}
        for launch in plan["launches"]:
            unit = torch.tensor(launch["unit"], dtype=torch.int32, device="cuda")
            buffers[self._arguments["first_unit"]] = unit
            self.launch(launch["kernel"], launch["constants"], launch["grid"], launch["group"][0], buffers)
        torch.cuda.synchronize()  # before what was made here is freed
