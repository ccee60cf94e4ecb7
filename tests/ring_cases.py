"""What each process of a ring runs; test_merge.py starts them. Each case computes the whole itself, to compare with."""

import itertools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import torch
import torch.distributed as dist
from torch import Tensor

import mfa
from mfa import sdpa

CASES: list[Callable[[int, int], None]] = []


def case(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CASES.append(function)
    return function


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(lengths: tuple[int, int] = (24, 40), heads: tuple[int, int] = (4, 2), **options: Any) -> list[Tensor]:
    (length_q, length_k), (query_heads, key_heads) = lengths, heads
    sizes = ((query_heads, length_q, 16), (key_heads, length_k, 16), (key_heads, length_k, 8))
    return [normal(2, *size, seed=i, **options) for i, size in enumerate(sizes)]


def results(function: Any, inputs: list[Tensor], rows: slice = slice(None), dtype: Any = None) -> list[Tensor]:
    """Out, lse and the gradients of a sum of both, weighted by place, so that parts add up to the whole."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    seen = lse.isfinite()
    place = torch.arange(out.shape[2] if rows.stop is None else rows.stop)[rows].to(out.dtype)
    loss = (out * (place + 1).cos()[:, None]).sum() + torch.where(seen, lse * place.sin(), 0).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def check(index: int, actual: Tensor, plain: Tensor, expected: Tensor, rows: slice, what: object) -> None:
    """The numerics rule for these rows of result `index` of `results`; plain PyTorch's error is that of all rows."""
    own = expected if index > 4 else expected[:, :, rows]  # a sink has no rows
    assert actual.shape == own.shape, (what, actual.shape, own.shape)
    error, allowed = oracle.largest_error(actual, own), oracle.tolerance(plain, expected, gradient=index > 1)
    assert error <= allowed, (what, error, allowed)


def shares(length: int, parts: int, uneven: bool) -> list[slice]:
    """The rows of each process."""
    if uneven:  # the first has nothing, the last has most
        ends = [length * i * i // (parts * parts + 1) for i in range(parts)] + [length]
        ends = [0 if i < 2 else end for i, end in enumerate(ends)]
    else:
        ends = [length * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, as long": {"is_causal": True, "lengths": (32, 32)},
    "window": {"window": (9, 3)},
    "window of nothing for some": {"window": (-30, None)},
    "softcap": {"softcap": 3.0, "is_causal": True},
    "sinks": {"sinks": normal(4, seed=7), "is_causal": True},
    "float16": {"dtype": torch.float16, "is_causal": True},
    "float64": {"dtype": torch.float64, "window": (20, 0)},
    "scale": {"scale": -0.1},
}


@case
def part_of_a_sequence_each(rank: int, size: int) -> None:
    for name, options in OPTIONS.items():
        for uneven in (False, True):
            terms = dict(options)
            inputs = tensors(terms.pop("lengths", (24, 40)), dtype=terms.pop("dtype", torch.float32))
            sinks = terms.pop("sinks", None)
            queries = shares(inputs[0].shape[2], size, uneven)[rank]
            keys = shares(inputs[1].shape[2], size, uneven)[rank]
            own = [x[:, :, rows] for x, rows in zip(inputs, (queries, keys, keys), strict=True)]
            extra = [] if sinks is None else [sinks]

            def whole(*xs: Tensor, function: Any, terms: Any = terms) -> Any:
                return function(*xs[:3], sinks=xs[3] if len(xs) > 3 else None, **terms)

            def ring(*xs: Tensor, terms: Any = terms) -> Any:
                return mfa.context_parallel(*xs[:3], sinks=xs[3] if len(xs) > 3 else None, return_lse=True, **terms)

            actual = results(ring, own + extra, queries)
            expected = results(lambda *xs: whole(*xs, function=oracle.attention), inputs + extra, dtype=torch.float64)
            plain = results(lambda *xs: whole(*xs, function=oracle.composition), inputs + extra)
            if extra:
                dist.all_reduce(actual[5])
            parts = (queries, queries, queries, keys, keys, slice(None))
            for i, got in enumerate(actual):
                check(i, got, plain[i], expected[i], parts[i], (name, uneven, i, rank))


@case
def half_types_obey_the_rule(rank: int, size: int) -> None:
    """Parts are not rounded before they are merged or added up."""
    for dtype, is_causal in itertools.product((torch.float16, torch.bfloat16), (False, True)):
        inputs = [normal(1, 2, 192, 64, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
        rows = shares(192, size, uneven=False)[rank]
        own = [x[:, :, rows] for x in inputs]
        options = {"is_causal": is_causal}
        actual = results(lambda *xs: mfa.context_parallel(*xs, return_lse=True, **options), own, rows)  # noqa: B023
        whole = [lambda *xs, f=f: f(*xs, **options) for f in (oracle.attention, oracle.composition)]  # noqa: B023
        expected, plain = results(whole[0], inputs, dtype=torch.float64), results(whole[1], inputs)
        for i in (0, 2, 3, 4):
            check(i, actual[i], plain[i], expected[i], rows, (dtype, is_causal, i, rank))


@case
def the_same_again_bit_by_bit(rank: int, size: int) -> None:
    inputs = tensors()
    own = [x.chunk(size, dim=2)[rank] for x in inputs]
    first, second = (
        results(lambda *xs: mfa.context_parallel(*xs, is_causal=True, return_lse=True), own) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@case
def a_group_of_its_own(rank: int, size: int) -> None:
    """Half of the processes each; and groups of one."""
    for width in {1, size // 2}:
        groups = [dist.new_group(list(range(i, i + width))) for i in range(0, size, width)]
        inputs = tensors()
        own = [x.chunk(width, dim=2)[rank % width] for x in inputs]
        out = mfa.context_parallel(*own, group=groups[rank // width])
        rows = shares(inputs[0].shape[2], width, uneven=False)[rank % width]
        check(0, out, oracle.composition(*inputs)[0], oracle.attention(*inputs)[0], rows, width)


@case
def parts_that_do_not_fit(rank: int, size: int) -> None:
    own = tensors(heads=(4, 2 if rank == 0 else 1))
    try:
        mfa.context_parallel(*own)
    except ValueError as error:
        assert "key heads is 1 in process 1; it must be that of process 0, 2" in str(error)  # noqa: PT017
    else:
        raise AssertionError("not refused")


def gathered(values: list[Any]) -> list[Tensor]:
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in values]


def compare_dtensors(mesh: Any, placements: Any, function: Any, terms: dict[str, Any], inputs: list[Tensor]) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    sinks = normal(inputs[0].shape[1], seed=7)
    whole = [Replicate()] * mesh.ndim
    spread = [distribute_tensor(x, mesh, placements) for x in inputs] + [distribute_tensor(sinks, mesh, whole)]
    leaves = [x.detach().requires_grad_() for x in spread]
    out, lse = function(*leaves[:3], sinks=leaves[3], return_lse=True, **terms)
    assert out.placements == lse.placements == tuple(placements), (out.placements, lse.placements)
    loss = out.square().sum() + lse.sum()
    actual = gathered([out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)])
    pairs = []
    for reference, dtype in ((oracle.attention, torch.float64), (oracle.composition, torch.float32)):
        xs = [x.detach().clone().to(dtype).requires_grad_() for x in (*inputs, sinks)]
        out, lse = reference(*xs[:3], sinks=xs[3], **terms)
        pairs.append([out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum() + lse.sum(), xs)])
    for i, (got, expected, plain) in enumerate(zip(actual, *pairs, strict=True)):
        check(i, got, plain, expected, slice(None), (placements, i))


@case
def dtensors(rank: int, size: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    inputs = [torch.cat([x, x.flip(0).cos()])[:size] for x in tensors(heads=(8, 4))]
    for terms in ({"is_causal": True}, {"window": (9, 3), "softcap": 3.0}):
        for place in (Shard(0), Shard(1), Shard(2), Replicate()):
            compare_dtensors(mesh, [place], mfa.context_parallel, terms, inputs)
        # 24 = 7 + 7 + 7 + 3 rows
        odd = [x[:, :, :25] for x in inputs]
        compare_dtensors(mesh, [Shard(2)], mfa.context_parallel, terms, odd)
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "sequence"))
        for places in ([Shard(1), Shard(2)], [Shard(2), Shard(0)], [Replicate(), Shard(2)], [Shard(0), Shard(1)]):
            compare_dtensors(square, places, mfa.context_parallel, {"is_causal": True}, inputs)


@case
def dtensors_without_communication(rank: int, size: int) -> None:
    """mfa.attention itself, sharded by batch or heads, forward and backward."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (size,))
    inputs = [torch.cat([x, x.flip(0).cos()])[:size] for x in tensors(heads=(8, 4))]

    def attention(*xs: Tensor, **terms: Any) -> Any:
        return mfa.attention(*xs, enable_gqa=True, **terms)

    for place in (Shard(0), Shard(1)):
        compare_dtensors(mesh, [place], attention, {"is_causal": True}, inputs)
        leaves = [distribute_tensor(x, mesh, [place]).requires_grad_() for x in inputs]
        with CommDebugMode() as communication:
            out = attention(*leaves, is_causal=True)
            grads = torch.autograd.grad(out, leaves, grad_outputs=torch.ones_like(out))
        assert communication.get_total_counts() == 0, communication.get_comm_counts()
        assert all(grad.placements == (place,) for grad in grads)
    # One key head for all query heads: keys stay whole, and their gradients are sums.
    queries = distribute_tensor(inputs[0], mesh, [Shard(1)]).requires_grad_()
    from torch.distributed.tensor import Replicate

    keys, values = (distribute_tensor(x[:, :1], mesh, [Replicate()]).requires_grad_() for x in inputs[1:])
    with CommDebugMode() as communication:
        out = attention(queries, keys, values)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    grad = torch.autograd.grad(out.square().sum(), keys)[0].full_tensor()
    own = [inputs[0], *(x[:, :1].clone().requires_grad_() for x in inputs[1:])]
    expected = torch.autograd.grad(oracle.attention(*own)[0].square().sum(), own[1])[0]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@case
def dtensors_of_packed_sequences_and_caches(rank: int, size: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (size,))
    query, key, value = normal(9, 8, 16), normal(15, 4, 16, seed=1), normal(15, 4, 8, seed=2)
    layout = [torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 9], [0, 6, 15])]
    expected = mfa.attention_varlen(query, key, value, *layout, 5, 9, is_causal=True)
    spread = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in (query, key, value)]
    whole = [distribute_tensor(x, mesh, [Replicate()]) for x in layout]
    for starts in (whole, layout):  # plain ones are every process's
        with CommDebugMode() as communication:
            out = mfa.attention_varlen(*spread, *starts, 5, 9, is_causal=True)
            torch.autograd.grad(out, spread, grad_outputs=torch.ones_like(out))
        assert communication.get_total_counts() == 0, communication.get_comm_counts()
        torch.testing.assert_close(out.full_tensor(), expected)

    pages = normal(3, 4, 8, 16, seed=3), normal(3, 4, 8, 8, seed=4)
    table = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
    live = {"block_table": table, "seqused_k": torch.tensor([9, 5], dtype=torch.int32), "is_causal": True}
    expected = mfa.attention_varlen(query, *pages, layout[0], None, 5, 9, **live)
    spread = [distribute_tensor(x, mesh, [Shard(1)]) for x in (query, *pages)]
    with CommDebugMode() as communication:
        out = mfa.attention_varlen(*spread, layout[0], None, 5, 9, **live)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    torch.testing.assert_close(out.full_tensor(), expected)

    query, *caches = normal(size, 8, 1, 16), normal(size, 4, 20, 16, seed=1), normal(size, 4, 20, 8, seed=2)
    lengths = torch.tensor([3, 20, 7, 11][:size], dtype=torch.int32)
    expected = mfa.attention_with_kv_cache(query, *caches, cache_seqlens=lengths)
    for place, of_lengths in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        spread = [distribute_tensor(x, mesh, [place]) for x in (query, *caches)]
        live = distribute_tensor(lengths, mesh, [of_lengths])
        with CommDebugMode() as communication:
            out = mfa.attention_with_kv_cache(*spread, cache_seqlens=live)
        assert communication.get_total_counts() == 0, (place, communication.get_comm_counts())
        torch.testing.assert_close(out.full_tensor(), expected)


@case
def dtensors_through_sdpa(rank: int, size: int) -> None:
    """Routed as mfa.attention takes them: by batch or heads without communication, with gradients."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.nn.functional import scaled_dot_product_attention

    mesh = init_device_mesh("cpu", (size,))
    inputs = [normal(size, 2 * size, *sizes, seed=i) for i, sizes in enumerate([(12, 16), (20, 16), (20, 8)])]
    wide = [x.double().requires_grad_() for x in inputs]
    expected = oracle.attention(*wide, is_causal=True)[0]
    expected_grads = torch.autograd.grad(expected.square().sum(), wide)
    for place in (Shard(0), Shard(1)):
        spread = [distribute_tensor(x, mesh, [place]).requires_grad_() for x in inputs]
        routes = mock.patch.object(sdpa, "attention", wraps=sdpa.attention)
        with sdpa.enabled(cpu=True), CommDebugMode() as communication, routes as routed:
            out = scaled_dot_product_attention(*spread, is_causal=True)
            grads = torch.autograd.grad(out, spread, grad_outputs=(2 * out).detach())
        assert communication.get_total_counts() == 0, (place, communication.get_comm_counts())
        assert routed.call_count == 1
        assert out.placements == (place,)
        torch.testing.assert_close(out.full_tensor().double(), expected, rtol=1e-5, atol=1e-5)
        for grad, other in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad.full_tensor().double(), other, rtol=1e-4, atol=1e-4)


@case
def fsdp2_through_sdpa(rank: int, size: int) -> None:
    """A step of a layer whose parameters are sharded, with attention routed, is that of the whole layer without."""
    from torch.distributed.fsdp import fully_shard

    def step(layer: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
        layer(tokens).square().mean().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        return [getattr(x, "full_tensor", lambda x=x: x)().detach() for x in layer.parameters()]

    def layer() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    tokens = normal(size, 10, 32)
    expected = step(layer(), tokens)
    sharded = layer()
    fully_shard(sharded)
    with sdpa.enabled(cpu=True), mock.patch.object(sdpa, "attention", wraps=sdpa.attention) as routed:
        found = step(sharded, tokens[rank : rank + 1])
    assert routed.call_count == 1
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@case
def dtensors_that_are_refused(rank: int, size: int) -> None:
    import pytest
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    inputs = tensors(heads=(2 * size, 2 * size))
    spread = [distribute_tensor(x, mesh, [Shard(2)]) for x in inputs]
    whole = [distribute_tensor(x, mesh, [Replicate()]) for x in inputs]
    with pytest.raises(ValueError, match=r"key has placements .* it must have those of query"):
        mfa.context_parallel(spread[0], *whole[1:])
    with pytest.raises(TypeError, match="key is a tensor, and query is a DTensor"):
        mfa.context_parallel(spread[0], *inputs[1:])
    with pytest.raises(TypeError, match="value is a DTensor, and query is none"):
        mfa.context_parallel(*inputs[:2], spread[2])
    with pytest.raises(ValueError, match="group is given with DTensors"):
        mfa.context_parallel(*spread, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="each must be Shard\\(0\\)"):
        mfa.context_parallel(*(distribute_tensor(x, mesh, [Shard(3)]) for x in inputs))
    few = [distribute_tensor(x, mesh, [Shard(1)]) for x in tensors(heads=(2 * size, 1))]
    with pytest.raises(ValueError, match="key has 1 heads on"):
        mfa.context_parallel(*few)
    if size == 4:
        square = init_device_mesh("cpu", (2, 2))
        twice = [distribute_tensor(x, square, [Shard(2), Shard(2)]) for x in inputs]
        with pytest.raises(NotImplementedError, match="along one dimension of the mesh only"):
            mfa.context_parallel(*twice)


@case
def in_the_simulator(rank: int, size: int) -> None:
    if mfa.simulator.why_not() is not None:
        return
    inputs = tensors((16, 16), (2, 2))
    own = [x.chunk(size, dim=2)[rank] for x in inputs]
    rows = shares(16, size, False)[rank]
    with mfa.simulate():
        actual = results(lambda *xs: mfa.context_parallel(*xs, is_causal=True, return_lse=True), own, rows)
    expected = results(lambda *xs: oracle.attention(*xs, is_causal=True), inputs, dtype=torch.float64)
    plain = results(lambda *xs: oracle.composition(*xs, is_causal=True), inputs)
    for i, got in enumerate(actual):
        check(i, got, plain[i], expected[i], rows, i)


def main(rank: int, size: int, store: str, report: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    lines = []
    for function in CASES:
        try:
            function(rank, size)
        except Exception:
            lines.append(f"{function.__name__}\n{traceback.format_exc()}")
            break  # the others may wait for this process
    Path(f"{report}.{rank}").write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
