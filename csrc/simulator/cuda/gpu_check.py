"""The accuracy suite at full size, on an NVIDIA GPU. Prints one line per case, and exits with 1 if one fails.

    python csrc/simulator/cuda/gpu_check.py --native build/_native.abi3.so --ptx DIR [--small] [--json report.json]

The rule is that of the project: the error against float64 is at most twice that of the same composition of torch in the
same dtype, plus 1e-6. Times say nothing about Apple GPUs: an 8x8x8 MMA is emulated by 24 shuffles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu import Gpu, load_native

HEADER = Path(__file__).parents[3] / "metal" / "params.h"
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
BLOCK = 1024  # rows of the reference at a time


def reference(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, right: int | None, dtype: torch.dtype
) -> Any:
    """out, lse and gradients of one batch, in blocks of rows, in `dtype`; k, v with query heads."""
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, grad))
    length, keys = q.shape[1], k.shape[1]
    out, lse, dq = torch.empty(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device), [], torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
    for first in range(0, length, BLOCK):
        rows = slice(first, min(first + BLOCK, length))
        score = q[:, rows] @ k.transpose(1, 2) * scale
        if right is not None:
            i = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + keys - length
            score = score.masked_fill(torch.arange(keys, device=q.device)[None] > i + right, float("-inf"))
        lse.append(torch.logsumexp(score.double(), -1))
        p = torch.softmax(score, -1)
        out[:, rows] = p @ v
        dp = grad[:, rows] @ v.transpose(1, 2)
        ds = p * (dp - (grad[:, rows] * out[:, rows]).sum(-1, keepdim=True))
        dq[:, rows] = ds @ k * scale
        dk += (ds.transpose(1, 2) @ q[:, rows] * scale).double()
        dv += (p.transpose(1, 2) @ grad[:, rows]).double()
    return out, torch.cat(lse, 1), dq, dk.to(dtype), dv.to(dtype)


class Case:
    def __init__(self, gpu: Gpu, native: Any, **fields: Any) -> None:
        self.gpu, self.native = gpu, native
        self.family = fields.pop("family", "apple7")
        self.mode = fields.pop("mode", "automatic")
        self.backward = fields.pop("backward", True)
        self.dtype = fields.pop("dtype", "f16")
        self.batch, self.heads, self.key_heads, self.length, self.keys, self.dim = (
            fields.pop(name) for name in ("batch", "heads", "key_heads", "length", "keys", "dim")
        )
        self.causal = fields.pop("causal", False)
        assert not fields
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(DTYPES[self.dtype])

        self.q = draw(self.batch, self.heads, self.length, self.dim)
        self.k, self.v = (draw(self.batch, self.key_heads, self.keys, self.dim) for _ in range(2))
        self.grad = draw(*self.q.shape)
        self.scale = self.dim**-0.5

    def __str__(self) -> str:
        size = f"B{self.batch} H{self.heads}/{self.key_heads} L{self.length}x{self.keys} D{self.dim}"
        return f"{self.dtype} {size}{' causal' if self.causal else ''} {self.family} {self.mode}"

    def run(self) -> dict[str, Tensor]:
        fields = {
            "family": self.family,
            "dtype": self.dtype,
            "batch": self.batch,
            "query_heads": self.heads,
            "key_heads": self.key_heads,
            "query_length": self.length,
            "key_length": self.keys,
            "head_dim": self.dim,
            "value_dim": self.dim,
            "scale": self.scale,
        }
        if self.causal:
            fields["window_right"] = 0
        rows = (self.batch, self.heads, self.length)
        tensors = {
            "query": self.q,
            "key": self.k,
            "value": self.v,
            "out": torch.full_like(self.q, float("nan")),
            "lse": torch.full(rows, float("nan"), device="cuda"),
        }
        self.gpu.run(self.native.plan(**fields), tensors)
        if not self.backward:
            return tensors
        plan = self.native.plan_backward(**fields, mode=self.mode)
        tensors |= {
            "grad_out": self.grad,
            "statistics": torch.full((*rows, 2), float("nan"), device="cuda"),
            "grad_query": torch.full_like(self.q, float("nan")),
            "grad_key": torch.full_like(self.k, float("nan")),
            "grad_value": torch.full_like(self.v, float("nan")),
            "score_gradient": torch.full((max(plan.scratch_bytes, 16),), 255, dtype=torch.uint8, device="cuda"),
        }
        self.gpu.run(plan, tensors)
        return tensors

    def check(self) -> dict[str, Any]:
        start = time.time()
        got = self.run()
        group = self.heads // self.key_heads
        worst: dict[str, float] = {}
        fine = True
        names = ["out", "lse", "grad_query", "grad_key", "grad_value"] if self.backward else ["out", "lse"]
        for b in range(self.batch):
            for g in range(self.key_heads):  # one group at a time: the reference needs memory
                heads = slice(g * group, (g + 1) * group)
                inputs = (
                    self.q[b, heads],
                    self.k[b, g : g + 1].expand(group, -1, -1),
                    self.v[b, g : g + 1].expand(group, -1, -1),
                    self.grad[b, heads],
                )
                right = 0 if self.causal else None
                exact = reference(*inputs, self.scale, right, torch.float64)
                plain = reference(*inputs, self.scale, right, DTYPES[self.dtype])
                for name, x, y in zip(names, exact, plain, strict=False):
                    if name in ("grad_key", "grad_value"):
                        x, y, z = x.sum(0), y.double().sum(0), got[name][b, g]
                    else:
                        z = got[name][b, heads]
                    error = (z.double() - x).abs().max().item()
                    bound = 2 * (y.double() - x).abs().max().item() + (1e-6 if name != "lse" else 1e-5)
                    fine &= error <= bound
                    worst[name] = max(worst.get(name, 0.0), error / bound)
        return {"case": str(self), "passes": fine, "of_bound": worst, "seconds": round(time.time() - start, 1)}


def cases(gpu: Gpu, native: Any, small: bool) -> list[Case]:
    table: list[dict[str, Any]] = []
    for dim in (64, 128, 256):
        for dtype in ("f16", "bf16", "f32"):
            for causal in (False, True):
                table.append(
                    dict(dtype=dtype, batch=1, heads=2, key_heads=1, length=300, keys=417, dim=dim, causal=causal)
                )
    for family in ("apple7", "apple9"):
        for mode in ("five_gemm", "seven_gemm"):
            table.append(
                dict(batch=2, heads=4, key_heads=2, length=512, keys=512, dim=64, causal=True, family=family, mode=mode)
            )
    if not small:
        for dim in (64, 128):
            for causal in (False, True):
                table.append(dict(batch=4, heads=8, key_heads=8, length=2048, keys=2048, dim=dim, causal=causal))
        table.append(dict(batch=1, heads=4, key_heads=2, length=8192, keys=8192, dim=128, causal=True, dtype="bf16"))
        table.append(dict(batch=1, heads=2, key_heads=1, length=32768, keys=32768, dim=64, causal=True))
        table.append(
            dict(batch=1, heads=2, key_heads=2, length=131072, keys=131072, dim=64, causal=True, backward=False)
        )
    return [Case(gpu, native, **fields) for fields in table]


def repeats(case: Case, times: int) -> bool:
    """Bitwise the same result every time."""
    first = case.run()
    for _ in range(times):
        again = case.run()
        if any(not torch.equal(first[name].view(torch.uint8), again[name].view(torch.uint8)) for name in first):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy of the Metal kernels on an NVIDIA GPU.")
    parser.add_argument("--native", type=Path, required=True, help="mfa._native")
    parser.add_argument("--ptx", type=Path, required=True, help="directory of .ptx files")
    parser.add_argument("--small", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    gpu = Gpu(sorted(options.ptx.glob("*.ptx")), HEADER)
    native = load_native(options.native)
    results = []
    for case in cases(gpu, native, options.small):
        result = case.check()
        results.append(result)
        ratios = " ".join(f"{name} {ratio:.2f}" for name, ratio in result["of_bound"].items())
        print(
            "ok  " if result["passes"] else "FAIL", result["case"], "| error / bound:", ratios, f"{result['seconds']} s"
        )
    if not options.small:
        case = Case(gpu, native, batch=2, heads=8, key_heads=4, length=1500, keys=1700, dim=64, causal=True)
        same = repeats(case, 50)
        results.append({"case": f"{case}, 50 times, bitwise", "passes": same})
        print("ok  " if same else "FAIL", results[-1]["case"])
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1))
    return 0 if all(result["passes"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
