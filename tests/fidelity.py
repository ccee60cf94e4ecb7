"""Other people's attention kernels on the simulator: what the fidelity tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import decode, encode

TYPES = {"f32": ("float", 3e-6), "f16": ("half", 2e-3), "bf16": ("bfloat", 2e-2)}  # MSL scalar, largest error


def prefill_header() -> Path:
    """Torch's own prefill kernel. Skips the test where there is none."""
    path = Path(torch.__file__).parent / "include/ATen/native/mps/kernels/PrefillAttention.h"
    if not path.exists():
        pytest.skip(f"torch {torch.__version__} has no {path.name}, which came with 2.13")
    return path


def fetch(project: str, version: str, *options: str) -> Path:
    """A wheel for macOS, from the index into a cache. Skips the test if the index can't be reached."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mfa"
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not any(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", f"{project}=={version}", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", "macosx_14_0_arm64", *options, "--dest", str(cache), "--quiet"]
        environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}  # what this machine installs is another matter
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            pytest.skip(f"{project}=={version} can't be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return next(cache.glob(pattern))


@dataclass(frozen=True)
class Problem:
    """Dense [B,H,L,D]."""

    dtype: str
    dim: int
    length_q: int
    length_k: int
    heads: int = 1
    group: int = 1  # query heads per key head
    causal: str = ""  # "upper" or "lower": the corner that the diagonal starts in
    batch: int = 1

    def tensors(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        heads_k = self.heads // self.group
        shapes = [(self.heads, self.length_q), (heads_k, self.length_k), (heads_k, self.length_k)]
        q, k, v = (encode(generator.standard_normal((self.batch, *shape, self.dim)), self.dtype) for shape in shapes)
        return q, k, v

    def reference(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in float64; `mask` is added to the scores."""
        q, k, v = (decode(x, self.dtype) for x in (q, k, v))
        k, v = (np.repeat(x, self.group, axis=1) for x in (k, v))
        scores = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(self.dim)
        if self.causal:
            offset = self.length_k - self.length_q if self.causal == "lower" else 0
            hidden = np.arange(self.length_k) > np.arange(self.length_q)[:, None] + offset
            scores = np.where(hidden, -np.inf, scores)
        if mask is not None:
            scores = scores + mask
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        return np.einsum("bhij,bhjd->bhid", weights / total, v), (largest + np.log(total))[..., 0]

    @property
    def name(self) -> str:
        shape = f"{self.dtype}-d{self.dim}-{self.length_q}x{self.length_k}-h{self.heads}g{self.group}"
        return shape + (f"-{self.causal}" if self.causal else "")


def strides(x: np.ndarray) -> list[int]:
    """Batch, head and row strides in elements."""
    return [stride // x.itemsize for stride in x.strides[:3]]


def error(got: np.ndarray, dtype: str, expected: np.ndarray) -> float:
    return float(np.abs(decode(got, dtype) - expected).max())
