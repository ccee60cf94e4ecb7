"""Runs cases and compares with float64. The rule is the project's: the largest error of a result is at most twice that
of plain torch in the same dtype, plus 1e-6.

For a gradient, plain torch is attention written with operations of that dtype, as in the project's own tests. `strict`
is the error against the bound that torch's math SDPA gives, which computes 16-bit types in float32 and rounds once.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unit_products import PRODUCTS

from . import standalone
from .gpu import Gpu
from .reference import Unit

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Of 8-bit caches: the dtype, and what the largest number of a token becomes.
QUANTIZED = {"int8": (torch.int8, 127), "e4m3": (torch.float8_e4m3fn, 448), "e5m2": (torch.float8_e5m2, 57344)}
REPEATS = 50
CHUNK = 1 << 28


class Problem:
    """Tensors of a case, on the GPU. Outputs are filled with NaN before a run."""

    def __init__(self, gpu: Gpu, entry: dict[str, Any]) -> None:
        self.gpu, self.entry, self.case, self.device = gpu, entry, entry["case"], gpu.device
        case = self.case
        self.dtype = DTYPES[case["dtype"]]
        self.value_dim = case["value_dim"] or case["head_dim"]
        self.random = torch.Generator(gpu.device).manual_seed(1)
        self.inputs: dict[str, Tensor] = {}
        self.group = case["query_heads"] // case["key_heads"]
        if case["cache"]:
            self._make_cache()
        else:
            self._make_dense()
        if case["sinks"]:
            self.inputs["sinks"] = self._normal(case["query_heads"])
        if case["alibi"]:
            self.inputs["alibi_slopes"] = (
                torch.rand(case["query_heads"], generator=self.random, device=self.device) / 50
            )
        if case["dropout_p"]:
            self.inputs["rng_state"] = torch.tensor([1234567, 42], device=self.device)

    def _normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if torch.Size(shape).numel() > CHUNK:  # no float32 copy of all
            x = torch.empty(shape, dtype=dtype, device=self.device)
            for part in x.view(-1).split(CHUNK):
                part.copy_(torch.randn(part.shape, generator=self.random, device=self.device))
            return x
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype)

    def _rows(self, heads: int, length: int, dim: int) -> Tensor:
        """[B,H,L,D], maybe [B,L,H,D] or packed [T,H,D] in memory."""
        if self.case["interleaved"] or self.case["sequences"]:
            x = torch.empty(self.case["batch"], length, heads, dim, dtype=self.dtype, device=self.device).transpose(
                1, 2
            )
            for head in range(heads):
                x[:, head] = self._normal(self.case["batch"], length, dim, dtype=self.dtype)
            return x
        return self._normal(self.case["batch"], heads, length, dim, dtype=self.dtype)

    def _make_dense(self) -> None:
        case = self.case
        heads, length, keys = case["query_heads"], case["query_length"], case["key_length"]
        self.inputs |= {
            "query": self._rows(heads, length, case["head_dim"]),
            "key": self._rows(case["key_heads"], keys, case["head_dim"]),
            "value": self._rows(case["key_heads"], keys, self.value_dim),
        }
        if case["backward"]:
            self.inputs["grad_out"] = self._rows(heads, length, self.value_dim)
        if case["grad_lse"]:
            self.inputs["grad_lse"] = self._normal(case["batch"], heads, length)
        if case["bias"] != "none":
            own = (case["batch"], heads, length, keys)
            sizes = [size or full for size, full in zip(case["bias_sizes"], own, strict=True)]
            if case["bias"] == "blocks":
                packed = standalone.block_mask(length, keys)
                self.inputs["bias"], self.dense_mask = packed.data.to(self.device), packed.to_dense()[0].to(self.device)
            elif case["bias"] == "mask":
                self.inputs["bias"] = self._mask(*sizes[2:]).expand(sizes).contiguous()
            else:
                self.inputs["bias"] = self._normal(
                    *sizes, dtype=torch.float32 if case["bias"] == "float32" else self.dtype
                )
        if case["sequences"]:
            self.inputs |= {"query_starts": self._starts(length), "key_starts": self._starts(keys)}
            if length == keys:  # as in training: the same lengths
                self.inputs["key_starts"] = self.inputs["query_starts"]

    def _starts(self, total: int) -> Tensor:
        """Of sequences of very different lengths."""
        weights = torch.rand(self.case["sequences"], generator=self.random, device=self.device, dtype=torch.float64)
        weights **= 3
        starts = (weights.cumsum(0) / weights.sum() * total).round().int()
        starts[-1] = total
        return torch.cat([starts.new_zeros(1), starts])

    def _mask(self, rows: int, columns: int) -> Tensor:
        """Blocks that are hidden, blocks that are seen, and mixed ones; a row sees something."""
        mask = torch.empty(rows, columns, dtype=torch.bool, device=self.device)
        j = torch.arange(columns, device=self.device, dtype=torch.int32)[None]
        for first in range(0, rows, 4096):
            i = torch.arange(first, min(first + 4096, rows), device=self.device, dtype=torch.int32)[:, None]
            mask[first : first + 4096] = ((i // 64 + j // 128) % 3 == 0) | ((i * 7 + j * 3) % 512 == 0)
        return mask

    def _make_cache(self) -> None:
        case = self.case
        batch, rows = case["sequences"] or case["batch"], case["page_size"] or case["key_length"]
        pages = batch * (case["key_length"] // rows)
        heads, length, dim = case["query_heads"], case["query_length"], case["head_dim"]
        if case["sequences"]:
            self.inputs |= {"query": self._rows(heads, length, dim), "query_starts": self._starts(length)}
        else:
            self.inputs["query"] = self._normal(batch, heads, length, dim, dtype=self.dtype)
        for side, dim in (("key", case["head_dim"]), ("value", self.value_dim)):
            shape = (pages, case["key_heads"], rows, dim)
            if case["cache"] == "same_dtype":
                self.inputs[side] = self._normal(*shape, dtype=self.dtype)
                continue
            x = self._normal(*shape, dtype=torch.float16)
            dtype, largest = QUANTIZED[case["cache"]]
            scale = x.abs().amax(-1).float() / largest
            x = x / scale[..., None]
            self.inputs[side] = (x.round() if dtype == torch.int8 else x).to(dtype)
            self.inputs[f"{side}_scale"] = scale
        lengths = torch.randint(1, case["key_length"] + 1, (batch,), generator=self.random, device=self.device).int()
        lengths[0] = case["key_length"]
        self.inputs["key_lengths"] = lengths
        if case["page_size"]:
            order = torch.randperm(pages, generator=self.random, device=self.device).int()
            self.inputs["block_table"] = order.view(batch, -1)

    def run(self) -> dict[str, Tensor]:
        """Forward, and backward if there is one: the results."""
        case, nan = self.case, float("nan")
        heads = (case["batch"], case["query_heads"], case["query_length"])

        def poisoned(*shape: int) -> Tensor:
            return torch.full(shape, nan, device=self.device)

        def like(x: Tensor, dim: int) -> Tensor:
            y = torch.empty_strided((*x.shape[:3], dim), [step // x.shape[3] * dim for step in x.stride()[:3]] + [1],
                                    dtype=self.dtype, device=self.device)  # fmt: skip
            return y.fill_(nan)

        results = {"out": like(self.inputs["query"], self.value_dim), "lse": poisoned(*heads)}
        tensors = {**self.inputs, **results}
        if case["backward"] and self.dtype != torch.float32:
            tensors["correction"] = torch.full_like(results["out"], nan, dtype=torch.float16)
        forward = self.entry["forward"]
        if forward["splits"] > 1:
            entries = case["sequences"] or case["batch"]
            parts = (forward["splits"], entries, case["query_heads"], forward["split_queries"])
            tensors["partial_lse"] = poisoned(*parts)
            tensors["partial_out"] = poisoned(*parts, self.value_dim)
        self.gpu.run(forward, tensors)
        if not case["backward"]:
            return results
        grads = {
            f"grad_{name}": like(self.inputs[name], self.inputs[name].shape[3]) for name in ("query", "key", "value")
        }
        tensors |= {"statistics": poisoned(*heads, 2), **grads}
        if case["alibi"]:
            tensors["grad_alibi"] = poisoned(*heads)
        if case["bias"] in ("float32", "same_dtype"):
            grads["grad_bias"] = tensors["grad_bias"] = poisoned(*self.inputs["bias"].shape)
        self.gpu.run(self.entry["backward"], tensors)
        if case["alibi"]:
            grads["grad_alibi"] = tensors["grad_alibi"].sum((0, 2))
        if case["sinks"]:  # as csrc/ops/gradients.cpp makes it
            lse, delta = tensors["statistics"].unbind(-1)
            share = torch.exp2(self.inputs["sinks"][:, None] * 1.4426950408889634 - lse)
            grads["grad_sinks"] = -(share * delta).sum((0, 2))
        return {**results, **grads}

    # -- the same by unit: what one key head of one batch entry or sequence has

    def units(self) -> Iterator[tuple[Unit, Any]]:
        """Units, and a function that takes a unit's part of a result."""
        case = self.case
        places = [(b, g) for b in range(case["sequences"] or case["batch"]) for g in range(case["key_heads"])]
        wanted = case["heads_checked"]
        if wanted and wanted < len(places):
            places = [places[round(i * (len(places) - 1) / (wanted - 1))] for i in range(wanted)]
        starts = {name: self.inputs[name].tolist() for name in ("query_starts", "key_starts") if name in self.inputs}
        for b, g in places:
            heads = slice(g * self.group, (g + 1) * self.group)
            batch, queries, keys = b, slice(None), slice(None)
            if case["sequences"]:
                batch = 0
                queries = slice(*starts["query_starts"][b : b + 2])
            if "key_starts" in starts:
                keys = slice(*starts["key_starts"][b : b + 2])
            unit = Unit(
                self.inputs["query"][batch, heads, queries],
                *(self._cached(b, g) if case["cache"] else (self.inputs[x][batch, g, keys] for x in ("key", "value"))),
                scale=case["head_dim"] ** -0.5,
                **{name: case[name] for name in ("window_left", "window_right", "softcap", "dropout_p")},
            )
            if case["bias"] == "blocks":
                unit.bias = self.dense_mask
            elif "bias" in self.inputs:
                bias = self.inputs["bias"]
                bias = bias[batch if bias.shape[0] > 1 else 0]
                unit.bias = bias[heads] if bias.shape[0] > 1 else bias
            unit.sinks = self.inputs["sinks"][heads] if case["sinks"] else None
            unit.slopes = self.inputs["alibi_slopes"][heads] if case["alibi"] else None
            unit.rng_state = self.inputs.get("rng_state")
            unit.heads = b * case["query_heads"] + torch.arange(heads.start, heads.stop, device=self.device)
            if case["backward"]:
                unit.grad_out = self.inputs["grad_out"][batch, heads, queries]
                unit.grad_lse = self.inputs["grad_lse"][batch, heads, queries] if case["grad_lse"] else None

            def take(name: str, x: Tensor, batch: int = batch, g: int = g, heads: slice = heads,
                     queries: slice = queries, keys: slice = keys) -> Tensor:  # fmt: skip
                if name in ("grad_key", "grad_value"):
                    return x[batch, g, keys]
                return x[batch, heads, queries]

            yield unit, take

    def _cached(self, batch: int, head: int) -> tuple[Tensor, Tensor]:
        """Live keys and values of a batch entry or sequence."""
        length = int(self.inputs["key_lengths"][batch])
        found = []
        for side in ("key", "value"):
            pages = (
                self.inputs["block_table"][batch].long()
                if "block_table" in self.inputs
                else torch.tensor([batch], device=self.device)
            )
            raw = self.inputs[side]
            part = raw.view(torch.uint8) if raw.dtype in FLOAT8 else raw
            rows = part[pages, head].flatten(0, 1)[:length]
            if f"{side}_scale" in self.inputs:
                scale = self.inputs[f"{side}_scale"][pages, head].flatten(0, 1)[:length]
                rows = (rows.view(raw.dtype) if raw.dtype in FLOAT8 else rows).double() * scale.double()[:, None]
            found.append(rows)
        return found[0], found[1]


def check_appended(problem: Problem) -> dict[str, Any]:
    """The bits that torch's operations give, of which each rounds; nothing else has changed."""
    start, case, inputs = time.monotonic(), problem.case, problem.inputs
    shape = (case["batch"], case["key_heads"], case["new_tokens"])
    rows = {side: problem._normal(*shape, dim, dtype=problem.dtype) for side, dim in
            (("key", case["head_dim"]), ("value", problem.value_dim))}  # fmt: skip
    lengths = inputs["key_lengths"].clamp_(max=case["key_length"] - case["new_tokens"])
    tensors = inputs | {f"new_{side}": x for side, x in rows.items()} | {"new_lengths": torch.empty_like(lengths)}
    expected = {"new_lengths": lengths + case["new_tokens"]}
    if case["rotary"]:
        angles = problem._normal(case["key_length"] + case["query_length"], case["rotary"] // 2)
        tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        tensors |= tables | {"out": torch.empty_like(inputs["query"])}
        expected["out"] = rotated(inputs["query"], lengths, *tables.values(), case["interleaved"])
        rows["key"] = rotated(rows["key"], lengths, *tables.values(), case["interleaved"])
    tokens = lengths.long()[:, None] + torch.arange(case["new_tokens"], device=problem.device)
    entries = torch.arange(case["batch"], device=problem.device)[:, None]
    if case["page_size"]:
        entries = inputs["block_table"].long().gather(1, tokens // case["page_size"])
        tokens = tokens % case["page_size"]
    for side, x in rows.items():
        if case["cache"] in QUANTIZED:
            dtype, most = QUANTIZED[case["cache"]]
            # By a tensor: torch multiplies by the reciprocal of a number there.
            scale = (x.float().abs().amax(-1) / lengths.new_tensor(most, dtype=torch.float32)).clamp_min(
                torch.finfo(torch.float32).tiny
            )
            x = x.float() / scale[..., None]
            x = (x.round() if dtype == torch.int8 else x).clamp(-most, most).to(dtype)
            expected[f"{side}_scale"] = inputs[f"{side}_scale"].clone()
            expected[f"{side}_scale"][entries, :, tokens] = scale.transpose(1, 2)
        expected[side] = bits(inputs[side]).clone()
        expected[side][entries, :, tokens] = bits(x).transpose(1, 2)
    problem.gpu.run(problem.entry["forward"], tensors)
    differing = [name for name, x in expected.items() if not torch.equal(bits(tensors[name]), x)]
    seconds = [round(time.monotonic() - start, 3), 0]
    return {"name": problem.entry["name"], "passes": not differing, "differing": differing, "seconds": seconds}


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype in FLOAT8 else x


def rotated(x: Tensor, starts: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Of x [B,H,L,D] whose rows have positions from `starts` [B] on."""
    positions = starts.long()[:, None] + torch.arange(x.shape[2], device=x.device)
    c, s = (table[positions][:, None] for table in (cos, sin))
    half = cos.shape[1]
    pair = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    a, b = (x[..., part].float() for part in pair)
    y = x.clone()
    y[..., pair[0]], y[..., pair[1]] = (a * c - b * s).to(x.dtype), (a * s + b * c).to(x.dtype)
    return y


def largest(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; equal infinities differ by 0, and NaN is an infinite error."""
    difference = (actual.double() - expected.double()).abs()
    difference = difference.masked_fill(actual.double() == expected.double(), 0)
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def accumulate(target: dict[str, list[float]], name: str, values: Sequence[float]) -> None:
    old = target.setdefault(name, [0.0] * len(values))
    target[name] = [max(x, y) for x, y in zip(old, values, strict=True)]


def check(problem: Problem) -> dict[str, Any]:
    """Errors by result: ours, that of plain torch, and of torch's math SDPA; over all units that are checked."""
    start = time.monotonic()
    got = problem.run()
    ran = time.monotonic() - start
    half = problem.dtype != torch.float32
    errors: dict[str, list[float]] = {}
    sums: dict[str, list[Tensor]] = {}
    for unit, take in problem.units():
        exact = unit.evaluate(torch.float64)
        wide = unit.evaluate(torch.float32, problem.dtype)
        narrow = unit.evaluate(problem.dtype) if half and unit.grad_out is not None else wide
        for name, x in exact.items():
            if name in ("grad_sinks", "grad_alibi", "grad_bias"):
                sums.setdefault(name, []).append(torch.stack([y[name].double() for y in (exact, wide, narrow)]))
                continue
            ours = largest(take(name, got[name]), x)
            plain = wide if name in ("out", "lse") else narrow
            accumulate(errors, name, (ours, largest(plain[name], x), largest(wide[name], x)))
    for name, parts in sums.items():
        x, wide_x, narrow_x, z = gathered(problem, name, parts, got[name])
        accumulate(errors, name, (largest(z, x), largest(narrow_x, x), largest(wide_x, x)))
    unwritten = [name for name, x in got.items() if x.isnan().any()]
    ratios = {name: error / (2 * plain + 1e-6) for name, (error, plain, _) in errors.items()}
    strict = {name: error / (2 * plain + 1e-6) for name, (error, _, plain) in errors.items()}
    return {
        "name": problem.entry["name"],
        "passes": not unwritten and all(ratio <= 1 for ratio in ratios.values()),
        "unwritten": unwritten,
        "of_bound": ratios,
        "strict": strict,
        "errors": errors,
        "seconds": [round(ran, 3), round(time.monotonic() - start - ran, 3)],
    }


def check_unit_product(gpu: Gpu, entry: dict[str, Any]) -> dict[str, Any]:
    """The bits of the matrix unit, in its order of sums."""
    start = time.monotonic()
    (product,) = (each for each in PRODUCTS if each.name == entry["case"]["unit_product"])
    differing = set()
    for seed in range(REPEATS):
        *matrices, expected = product.problem(seed)
        operands = [torch.from_numpy(x).to(gpu.device) for x in matrices]
        places = torch.empty(sum(x.size for x in matrices), 2, dtype=torch.int32, device=gpu.device)
        gpu.launch(product.name, [], (1, 1, 1), 32, dict(enumerate([*operands, places])))
        differing |= set() if (operands[2].cpu().numpy() == expected).all() else {f"seed {seed}"}
    return {
        "name": entry["name"],
        "passes": not differing,
        "differing": sorted(differing),
        "seconds": [round(time.monotonic() - start, 3), 0],
    }


def verdict(problem: Problem) -> dict[str, Any]:
    return check_appended(problem) if problem.case["new_tokens"] else check(problem)


def check_entry(gpu: Gpu, entry: dict[str, Any]) -> dict[str, Any]:
    if entry["case"]["unit_product"]:
        return check_unit_product(gpu, entry)
    problem = Problem(gpu, entry)
    return repeats(problem) if entry["case"]["group"] == "repeat" else verdict(problem)


def gathered(problem: Problem, name: str, parts: list[Tensor], got: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What units share, summed over them: exact, wide, narrow, ours."""
    case = problem.case
    stacked = torch.stack(parts, 1)  # [3, units, ...], a unit being (batch, key head)
    if name != "grad_bias":
        whole = stacked.unflatten(1, (case["batch"], case["key_heads"])).sum(1).flatten(1)
        return whole[0], whole[1], whole[2], got
    by_head = stacked.unflatten(1, (case["batch"], case["key_heads"]))  # [3, B, Hkv, G or 1, ...]
    by_head = by_head.flatten(2, 3) if got.shape[1] > 1 else by_head.sum(2)
    whole = by_head.sum(1, keepdim=True) if got.shape[0] == 1 else by_head
    return whole[0], whole[1], whole[2], got


def repeats(problem: Problem) -> dict[str, Any]:
    """The same bits every time."""
    start = time.monotonic()
    first = problem.run()
    differing: set[str] = set()
    for _ in range(REPEATS - 1):
        for name, x in problem.run().items():
            if not torch.equal(x.contiguous().view(torch.uint8), first[name].contiguous().view(torch.uint8)):
                differing.add(name)
    return {
        "name": f"{problem.entry['name']}, {REPEATS} times",
        "passes": not differing,
        "differing": sorted(differing),
        "seconds": [round(time.monotonic() - start, 3), 0],
    }


def line_of(result: dict[str, Any]) -> str:
    state = "ok  " if result["passes"] else "FAIL"
    if "error" in result:
        return f"{state} {result['name']} | {result['error']}"
    ratios = " ".join(
        f"{name.replace('grad_', 'd')} {ratio:.2f}/{result['strict'][name]:.2f}"
        for name, ratio in result.get("of_bound", {}).items()
    )
    odd = result.get("differing") or result.get("unwritten")
    return f"{state} {result['name']} | {ratios}{f' NaN or differing: {odd}' if odd else ''} | {result['seconds']} s"


def run(directory: Path, groups: Sequence[str] | None, report: Path | None) -> int:
    """Every case of the groups; prints a line for each, and returns 1 if one fails."""
    data = json.loads((directory / "plans.json").read_text())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    gpu = Gpu(directory, data["arguments"])
    results: list[dict[str, Any]] = []
    for entry in data["entries"]:
        if groups and entry["case"]["group"] not in groups:
            continue
        try:
            results.append(check_entry(gpu, entry))
        except (RuntimeError, KeyError, FileNotFoundError) as error:
            traceback.print_exc(limit=-3)
            results.append({"name": entry["name"], "passes": False, "error": str(error).splitlines()[0]})
            if "cu" in str(error)[:2]:  # the context is lost
                break
        torch.cuda.empty_cache()
        sys.stdout.write(line_of(results[-1]) + "\n")
        sys.stdout.flush()
        if report is not None:
            report.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}))
    failed = sum(not result["passes"] for result in results)
    sys.stdout.write(f"{len(results) - failed} of {len(results)} pass, {gpu.launches} launches\n")
    return 1 if failed else 0
