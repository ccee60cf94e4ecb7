"""Times flash_attention against F.scaled_dot_product_attention: `python -m mfa.mps_flash_attn.benchmark --help`.

On the best device there is. A comparison says which torch it is against, since torch's own attention has changed much
from release to release.
"""

import argparse
import html
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from .. import device, sdpa
from ._attention import flash_attention

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_SUITES: dict[str, dict[str, Any]] = {
    "quick": {
        "seq_lengths": [1024, 4096],
        "dtypes": ["float16"],
        "batch_sizes": [1],
        "head_dims": [64],
        "include_window": False,
    },
    "standard": {
        "seq_lengths": [512, 1024, 2048, 4096],
        "dtypes": ["float16", "bfloat16"],
        "batch_sizes": [1, 4],
        "head_dims": [64, 128],
    },
    "full": {
        "seq_lengths": [256, 512, 1024, 2048, 4096, 8192],
        "dtypes": ["float32", "float16", "bfloat16"],
        "batch_sizes": [1, 2, 4, 8],
        "head_dims": [32, 64, 128],
    },
}
_WINDOWS = (2048, 4096)


@dataclass
class BenchmarkConfig:
    """One problem: self-attention of one length."""

    batch_size: int = 1
    num_heads: int = 8
    seq_len: int = 1024
    head_dim: int = 64
    dtype: str = "float16"
    is_causal: bool = False
    window_size: int = 0
    warmup_runs: int = 5
    benchmark_runs: int = 20
    backward: bool = False  # forward and backward, with gradients of query, key and value

    def __str__(self) -> str:
        text = f"B={self.batch_size} H={self.num_heads} N={self.seq_len} D={self.head_dim} {self.dtype}"
        text += " causal" if self.is_causal else ""
        text += f" window={self.window_size}" if self.window_size else ""
        return text + (" backward" if self.backward else "")


@dataclass
class BenchmarkResult:
    """What was measured; None is what wasn't."""

    config: BenchmarkConfig
    mfa_time_ms: float | None = None  # mean of benchmark_runs
    sdpa_time_ms: float | None = None
    mfa_memory_mb: float | None = None  # what the driver had to add for the first call; MPS only
    sdpa_memory_mb: float | None = None
    speedup: float | None = None
    memory_reduction: float | None = None
    max_diff: float | None = None
    rel_diff_percent: float | None = None  # mean difference over mean size
    mfa_error: str | None = None
    sdpa_error: str | None = None


def get_dtype(dtype_str: str) -> torch.dtype:
    """float16, fp16, ... as a dtype. Raises ValueError for another name."""
    try:
        return _DTYPES[dtype_str.lower()]
    except KeyError:
        raise ValueError(f"dtype is {dtype_str!r}; it must be one of {', '.join(_DTYPES)}") from None


def get_memory_mb() -> float:
    """What Metal's driver has allocated; 0 without an MPS device."""
    if not torch.backends.mps.is_available():
        return 0.0
    torch.mps.synchronize()
    return torch.mps.driver_allocated_memory() / 2**20


def run_benchmark(config: BenchmarkConfig) -> BenchmarkResult:
    """Both sides, SDPA only without a window. An error of either is in the result."""
    result = BenchmarkResult(config)
    where = "mps" if device.is_available() else "cpu"
    torch.manual_seed(42)
    shape = (config.batch_size, config.num_heads, config.seq_len, config.head_dim)
    inputs = query, key, value = [
        torch.randn(shape, device=where, dtype=get_dtype(config.dtype), requires_grad=config.backward) for _ in range(3)
    ]
    ours, result.mfa_time_ms, result.mfa_memory_mb, result.mfa_error = _measure(
        lambda: flash_attention(query, key, value, is_causal=config.is_causal, window_size=config.window_size),
        inputs,
        config,
    )
    if config.window_size:
        return result
    theirs, result.sdpa_time_ms, result.sdpa_memory_mb, result.sdpa_error = _measure(
        lambda: scaled_dot_product_attention(query, key, value, is_causal=config.is_causal), inputs, config
    )
    if result.mfa_time_ms and result.sdpa_time_ms:
        result.speedup = result.sdpa_time_ms / result.mfa_time_ms
    if result.mfa_memory_mb and result.sdpa_memory_mb:
        result.memory_reduction = result.sdpa_memory_mb / result.mfa_memory_mb
    if ours is not None and theirs is not None:
        difference = (ours.float() - theirs.float()).abs()
        result.max_diff = difference.max().item()
        result.rel_diff_percent = 100 * (difference.mean() / theirs.float().abs().mean()).item()
    return result


def _measure(
    call: Callable[[], Tensor], inputs: Sequence[Tensor], config: BenchmarkConfig
) -> tuple[Tensor | None, float | None, float | None, str | None]:
    """Output, milliseconds, megabytes and error."""

    def run() -> Tensor:
        out = call()
        if config.backward:
            torch.autograd.grad(out.sum(), inputs)
        return out

    try:
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
        before = get_memory_mb()
        out = run().detach()
        memory = get_memory_mb() - before if out.device.type == "mps" else None
        for _ in range(config.warmup_runs - 1):
            run()
        timer = Timer("run()", globals={"run": run})  # waits for the device
        return out, 1e3 * timer.timeit(config.benchmark_runs).mean, memory, None
    except (RuntimeError, ValueError, TypeError) as error:
        return None, None, None, str(error)


def run_suite(
    seq_lengths: list[int] | None = None,
    dtypes: list[str] | None = None,
    batch_sizes: list[int] | None = None,
    head_dims: list[int] | None = None,
    num_heads_list: list[int] | None = None,
    include_causal: bool = True,
    include_window: bool = True,
    include_backward: bool = False,
    verbose: bool = True,
) -> list[BenchmarkResult]:
    """Every combination; `verbose` prints each. Windows are timed from 4096 tokens on."""
    seq_lengths = [512, 1024, 2048, 4096, 8192] if seq_lengths is None else seq_lengths
    dtypes = ["float16", "bfloat16"] if dtypes is None else dtypes
    batch_sizes = [1, 4] if batch_sizes is None else batch_sizes
    head_dims = [64, 128] if head_dims is None else head_dims
    heads = [8] if num_heads_list is None else num_heads_list
    causal = (False, True) if include_causal else (False,)
    configs = [
        BenchmarkConfig(batch, head, length, dim, dtype, is_causal=is_causal, backward=backward)
        for dtype, batch, head, dim, length in product(dtypes, batch_sizes, heads, head_dims, seq_lengths)
        for backward in ((False, True) if include_backward else (False,))
        for is_causal in causal
    ]
    if include_window:
        configs += [
            BenchmarkConfig(batch, 8, length, 64, dtype, is_causal=True, window_size=window)
            for dtype, batch, length, window in product(dtypes, batch_sizes[:1], seq_lengths, _WINDOWS)
            if length >= 4096 and window < length
        ]
    results = []
    for number, config in enumerate(configs, start=1):
        results.append(run_benchmark(config))
        if verbose:
            _say(f"[{number}/{len(configs)}] {config}: {_summary(results[-1])}")
    return results


def _summary(result: BenchmarkResult) -> str:
    if result.mfa_time_ms is None:
        return f"error: {result.mfa_error}"
    text = f"mfa {result.mfa_time_ms:.2f} ms"
    if result.sdpa_error is not None:
        return f"{text}, SDPA error: {result.sdpa_error}"
    return text if result.speedup is None else f"{text}, SDPA {result.sdpa_time_ms:.2f} ms, {result.speedup:.2f}x"


def compare_vs_sdpa(
    seq_lengths: list[int] | None = None, dtype: str = "float16", verbose: bool = True
) -> dict[str, Any]:
    """Speedups over lengths, of one batch entry, 8 heads and D 64."""
    results = run_suite(
        seq_lengths, [dtype], [1], [64], [8], include_causal=False, include_window=False, verbose=verbose
    )
    speedups = [result.speedup for result in results if result.speedup is not None]
    faster = [result.config.seq_len for result in results if (result.speedup or 0) > 1]
    return {
        "average_speedup": statistics.mean(speedups) if speedups else 0,
        "max_speedup": max(speedups, default=0),
        "min_speedup": min(speedups, default=0),
        "crossover_seq_len": faster[0] if faster else None,
        "num_tests": len(results),
        "results": results,
    }


def generate_report(
    results: list[BenchmarkResult], output_path: str | Path, title: str = "MPS Flash Attention Benchmark Report"
) -> None:
    """Writes an HTML page with a table of the results."""

    def cell(number: float | None, form: str, error: str | None = None) -> str:
        return f"<td>{html.escape(error or '-') if number is None else format(number, form)}</td>"

    rows = "\n".join(
        f"<tr><td>{html.escape(str(result.config))}</td>"
        + cell(result.mfa_time_ms, ".2f", result.mfa_error)
        + cell(result.sdpa_time_ms, ".2f", result.sdpa_error)
        + cell(result.speedup, ".2f")
        + cell(result.max_diff, ".2e")
        + cell(result.rel_diff_percent, ".3f")
        + "</tr>"
        for result in results
    )
    headings = ("problem", "mfa, ms", "SDPA, ms", "speedup", "largest difference", "difference, %")
    heading = "".join(f"<th>{name}</th>" for name in headings)
    page = f"""<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font-family: sans-serif }} td, th {{ padding: 0.2em 1em; text-align: right }}</style></head>
<body><h1>{html.escape(title)}</h1>
<p>{html.escape(_machine())}</p>
<table><tr>{heading}</tr>
{rows}
</table></body></html>
"""
    Path(output_path).write_text(page, encoding="utf-8")


def _machine() -> str:
    """The device, and what SDPA is: ATen's, or ours."""
    info = device.device_info()
    name = info.name if info.why_not is None else f"CPU ({info.why_not})"
    return f"{name}, torch {info.torch}" + (", SDPA routed to mfa" if sdpa.is_enabled() else "")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mfa.mps_flash_attn.benchmark", description=__doc__)
    parser.add_argument("--suite", choices=list(_SUITES), default="standard", help="how much to run")
    parser.add_argument("--output", metavar="FILE", help="write an HTML report")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--seq-lengths", type=int, nargs="+", metavar="N", help="instead of the suite's lengths")
    parser.add_argument("--dtypes", nargs="+", metavar="T", help="instead of the suite's: float16, bfloat16, float32")
    parser.add_argument("--backward", action="store_true", help="time training steps too")
    options = parser.parse_args(arguments)
    suite = dict(_SUITES[options.suite], include_backward=options.backward)
    if options.seq_lengths:
        suite["seq_lengths"] = options.seq_lengths
    if options.dtypes:
        suite["dtypes"] = options.dtypes
    _say(_machine())
    results = run_suite(**suite)
    if options.output:
        generate_report(results, options.output)
    if options.json:
        text = json.dumps([asdict(result) for result in results], indent=2)
        Path(options.json).write_text(text, encoding="utf-8")
    speedups = [result.speedup for result in results if result.speedup is not None]
    if speedups:
        _say(f"speedup: {min(speedups):.2f} ... {max(speedups):.2f}, mean {statistics.mean(speedups):.2f}")
    failed = sum(result.mfa_error is not None or result.sdpa_error is not None for result in results)
    if failed:
        _say(f"errors in {failed} of {len(results)}")


if __name__ == "__main__":
    main()
