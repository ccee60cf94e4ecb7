"""Attention and its gradients on the best device there is, beside float64: what `python -m mfa demo` prints."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import device_info, simulator
from .attention import attention

_Window = tuple[int | None, int | None]


class Case(NamedTuple):
    """One line of the table."""

    dtype: torch.dtype
    dim: int
    lengths: tuple[int, int]
    heads: tuple[int, int] = (4, 4)  # query, key
    is_causal: bool = False
    window: _Window = (None, None)

    @property
    def masking(self) -> str:
        parts = ["causal"] if self.is_causal else []
        if self.window != (None, None):
            parts.append("window " + " ".join("open" if side is None else str(side) for side in self.window))
        return ", ".join(parts) or "dense"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = zip((self.heads[0], *[self.heads[1]] * 2), (self.lengths[0], *[self.lengths[1]] * 2), strict=True)
        query, key, value = (torch.randn(1, h, n, self.dim, generator=generator).to(self.dtype) for h, n in shapes)
        return query, key, value

    def visible(self) -> Tensor:
        """bool [Lq,Lk]: what the case's masks let a query see."""
        rows, columns = torch.arange(self.lengths[0])[:, None], torch.arange(self.lengths[1])[None, :]
        distance = columns - rows - (self.lengths[1] - self.lengths[0])
        left, right = self.window
        seen = torch.ones(self.lengths, dtype=torch.bool)
        seen &= torch.tensor(True) if left is None else distance >= -left
        seen &= torch.tensor(True) if right is None else distance <= right
        return seen & (columns <= rows) if self.is_causal else seen


HALF, BFLOAT = torch.float16, torch.bfloat16
CASES = (
    Case(HALF, 64, (256, 256)),
    Case(HALF, 64, (256, 256), is_causal=True),
    Case(HALF, 128, (200, 333), window=(64, 0)),
    Case(HALF, 64, (128, 256), heads=(8, 2), is_causal=True),
    Case(BFLOAT, 64, (256, 256), is_causal=True),
    Case(BFLOAT, 256, (64, 128), window=(100, 20)),
    Case(torch.float32, 64, (256, 256), is_causal=True),
    Case(torch.float32, 80, (77, 131)),
)


class Error(NamedTuple):
    """The largest error against float64, and what is allowed."""

    found: float
    allowed: float  # twice that of torch's math path in the same dtype, plus 1e-6, or 4e-6 for gradients

    @property
    def is_good(self) -> bool:
        return self.found <= self.allowed  # a NaN isn't


class Result(NamedTuple):
    """What a case gave."""

    forward: Error
    backward: Error  # of the gradient of query, key or value that is nearest to its limit
    kernel: str  # of the forward pass, which only the simulator knows
    mma: int | None  # 8x8x8 multiply-accumulates of both passes, which only the simulator counts


def differentiate(function: Callable[..., Tensor], tensors: Iterable[Tensor], **terms: Any) -> list[Tensor]:
    """The output, and the gradients of the tensors for a random one of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, **terms)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every other dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def run(case: Case, device: str) -> Result:
    """Computes a case on `mps`, the `simulator` or the `cpu`, by float64 and by torch's math path."""
    tensors = case.tensors()
    terms: dict[str, Any] = {"attn_mask": case.visible(), "enable_gqa": case.heads[0] != case.heads[1]}
    with sdpa_kernel(SDPBackend.MATH):
        expected = differentiate(scaled_dot_product_attention, [tensor.double() for tensor in tensors], **terms)
        plain = differentiate(scaled_dot_product_attention, tensors, **terms)
    asked: dict[str, Any] = {**terms, "attn_mask": None, "is_causal": case.is_causal, "window": case.window}
    kernel, mma = "", None
    if device == "simulator":
        with simulator.simulate() as simulation:
            results = differentiate(attention, tensors, **asked)
        kernel, mma = simulation.launches[0].kernel, simulation.counters.mma
    else:
        results = [result.cpu() for result in differentiate(attention, [x.to(device) for x in tensors], **asked)]

    def error(result: Tensor, exact: Tensor) -> float:
        return float((result.double() - exact).abs().max())

    forward, *backward = (
        Error(error(ours, exact), 2 * error(theirs, exact) + (4e-6 if index > 0 else 1e-6))
        for index, (ours, theirs, exact) in enumerate(zip(results, plain, expected, strict=True))
    )
    worst = max(backward, key=lambda error: error.found / error.allowed if error.is_good else math.inf)
    return Result(forward, worst, kernel, mma)


def table() -> Iterator[str]:
    """The table, line by line as it is computed; the last line is the verdict."""
    why_no_gpu = device_info().why_not
    why_no_simulator = simulator.why_not()
    if why_no_gpu is None:
        device = "mps"
        yield f"On {device_info().name}."
    elif why_no_simulator is None:
        device = "simulator"
        yield f"In the simulator, as on apple7 (M1). Not on a GPU: {why_no_gpu}."
    else:
        device = "cpu"
        yield f"On the CPU. Nothing can run the kernels. GPU: {why_no_gpu}. Simulator: {why_no_simulator}."
    yield ""
    line = "{:9} {:>4} {:>5} {:>5} {:>6}  {:20} {:>9} {:>9} {:>9} {:>9}  {:5} {:>10}  {}"
    errors = ("error", "allowed", "gradient", "allowed")
    yield line.format("dtype", "D", "Lq", "Lk", "heads", "mask", *errors, "", "MMAs", "forward kernel")
    failed = 0
    for case in CASES:
        result = run(case, device)
        good = result.forward.is_good and result.backward.is_good
        failed += not good
        yield line.format(
            str(case.dtype).removeprefix("torch."),
            case.dim,
            *case.lengths,
            "/".join(map(str, case.heads)),
            case.masking,
            *(f"{number:.2e}" for number in (*result.forward, *result.backward)),
            "ok" if good else "WRONG",
            "" if result.mma is None else f"{result.mma:,}",
            result.kernel,
        )
    yield ""
    yield "error: the largest against float64. allowed: twice that of torch's math path in the same dtype, plus 1e-6."
    yield "gradient: the same, plus 4e-6, for that of query, key or value, whichever is nearest to its limit."
    if failed:
        yield f"{failed} of {len(CASES)} are wrong."
        raise SystemExit(1)
