"""Which calls ATen's own kernels compute faster than mfa: the rows of policy.json, and what they say of a call.

A row is a prediction, with its sources, or what `python -m mfa bench --autotune` measured and printed. ATen has such
kernels for plain inference only: no gradients, no dropout, D = Dv.
"""

import functools
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import device
from .._checks.sizes import is_known
from .._checks.tensors import dtype_name


@dataclass(frozen=True)
class Row:
    """A kernel of ATen, the machines that have it, and the calls in which it beats mfa."""

    kernel: str
    family: str  # of the GPU: apple7 (M1) ... apple10 (M5)
    matrix_unit: bool  # whether mfa uses M5's
    torch: str  # this version or later, as of macOS
    macos: str
    unless: str | None  # an environment variable that turns the kernel off
    dtype: list[str]
    head_dim: list[int]
    query_length: list[int | None]  # from, to; None is open
    is_causal: list[bool]
    mask: list[str]  # of Call.mask
    times_as_fast: float
    basis: Literal["prediction", "measurement"]
    source: str

    def __str__(self) -> str:
        """As policy.json has it."""
        fields = (f'    "{name}": {json.dumps(value)}' for name, value in asdict(self).items())
        return "  {\n" + ",\n".join(fields) + "\n  }"


class Machine(NamedTuple):
    family: str | None
    matrix_unit: bool
    torch: tuple[int, ...]
    macos: tuple[int, ...]
    variables: frozenset[str] = frozenset()  # that the environment has


class Call(NamedTuple):
    """What of a call of F.scaled_dot_product_attention decides which kernel ATen has for it, and how fast that is."""

    dtype: str
    head_dim: int
    value_dim: int
    query_length: int
    is_causal: bool
    mask: str  # none, bool, query's dtype, or other
    is_plain: bool  # neither gradients nor dropout are wanted


def rows() -> list[Row]:
    """Those of policy.json."""
    return [Row(**row) for row in json.loads(Path(__file__).with_name("policy.json").read_text(encoding="utf-8"))]


def has(machine: Machine, row: Row) -> bool:
    """Whether the row is about this machine."""
    return (
        (machine.family, machine.matrix_unit) == (row.family, row.matrix_unit)
        and machine.torch >= version(row.torch)
        and machine.macos >= version(row.macos)
        and row.unless not in machine.variables
    )


def faster(call: Call, machine: Machine, table: list[Row]) -> Row | None:
    """The row by which ATen computes the call faster, if there is one."""
    return next((row for row in table if has(machine, row) and _is_of(call, row)), None)


def reason_for_aten(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> str | None:
    """Why a call that mfa takes is left to ATen on this machine, or None. It is for `mps` tensors only."""
    table = rows_here()
    if not table or query.device.type != "mps":
        return None
    tensors = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    call = Call(
        dtype_name(query.dtype),
        query.shape[-1],
        value.shape[-1],
        query.shape[-2],
        is_causal,
        _kind(attn_mask, query),
        is_plain=dropout_p == 0 and not trains,
    )
    row = faster(call, machine(), table)
    if row is None:
        return None
    return (
        f"its {row.kernel} is {row.times_as_fast:g} times as fast as mfa on this GPU, by {row.basis}; "
        'mfa.sdpa.enable(prefer="mfa") takes such calls all the same'
    )


@functools.cache
def machine() -> Machine:
    """This one."""
    info = device.device_info()
    versions = version(torch.__version__), version(platform.mac_ver()[0])
    return Machine(info.family, info.uses_matrix_unit, *versions, frozenset(os.environ))


def version(text: str) -> tuple[int, ...]:
    """Major and minor, to compare; () of nothing."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


@functools.cache
def rows_here() -> list[Row]:
    """Almost always none, so that a call doesn't pay for the rest."""
    return [row for row in rows() if has(machine(), row)]


def _is_of(call: Call, row: Row) -> bool:
    return (
        (call.is_plain and call.mask in row.mask)
        and (call.dtype in row.dtype and call.is_causal in row.is_causal)
        and (call.head_dim == call.value_dim and call.head_dim in row.head_dim)
        and _is_within(call.query_length, *row.query_length)
    )


def _is_within(length: int | torch.SymInt, first: int | None, last: int | None) -> bool:
    """False for a length that torch.compile doesn't know: data decide about it."""
    return (first is None or is_known(length >= first)) and (last is None or is_known(length <= last))


def _kind(mask: Tensor | None, query: Tensor) -> str:
    if mask is None:
        return "none"
    if mask.dtype == torch.bool:
        return "bool"
    return "query's dtype" if mask.dtype == query.dtype else "other"
