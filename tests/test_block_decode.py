"""Few queries with block_mask: decode walks the lists, and its parts share what is listed."""

from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import test_attention
import torch
from conftest import Device
from gpu_check import plans
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from simulator_engine import Library
from strategies import DTYPES, TIMES
from test_block_attention import Blocked, through_blocks  # noqa: F401 (a fixture)
from torch import Tensor

import mfa
from mfa import _library
from mfa import _native as native

pytestmark = pytest.mark.simulator
BLOCK = 128


@st.composite
def few_queries(draw: st.DrawFn) -> Blocked:
    """Every feature that decode takes; mostly so many keys that they are split, heads with lists of their own."""
    key_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 3), (1, 8), (1, 40))))
    head_dim = draw(st.sampled_from((8, 33, 64, 96, 128, 256, 320)))
    bound = st.none() | st.integers(-20, 700)
    return Blocked(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.sampled_from((1, 2))),
        key_heads=key_heads,
        group=group,
        query_length=min(draw(st.sampled_from((1, 1, 2, 3, 8, 17, 100))), 128 // group),
        key_length=draw(st.integers(512, 900) | st.integers(1, 300)),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from((head_dim, 40))),
        layouts=draw(st.tuples(*[st.sampled_from(("contiguous", "transposed"))] * 3)),
        window=draw(st.just((None, None)) | st.tuples(bound, bound)),
        is_causal=False,
        scale=None,
        softcap=draw(st.sampled_from((0.0, 0.0, 30.0))),
        bias=("bool", (False, False, False, False)),
        has_sinks=draw(st.booleans()),
        alibi=draw(st.sampled_from((None, "heads"))),
        seed=draw(st.integers(0, 2**16)),
        density=draw(st.sampled_from((0.0, 0.1, 0.3, 0.9, 2.0))),
        alike=(draw(st.booleans()), draw(st.booleans())),
        block=(draw(st.sampled_from((16, 128))), draw(st.sampled_from((16, 48, 128)))),
    )


@pytest.mark.parametrize("family", ["apple7", "apple9"])
def test_random_masks(family: str, through_blocks: list[tuple[int, int]]) -> None:  # noqa: F811
    @seed(0)
    @settings(max_examples=6 * TIMES)
    @given(few_queries())
    def holds(problem: Blocked) -> None:
        through_blocks.append(problem.block)
        test_attention.check(problem, Device("simulator", family))

    holds()


def inputs(heads: int, key_heads: int, rows: int, keys: int, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (1, heads, rows, dim), (1, key_heads, keys, dim), (1, key_heads, keys, dim)
    query, key, value = (torch.randn(shape, dtype=torch.float16) for shape in shapes)
    return query, key, value


def packed(listed: list[int], rows: int, keys: int) -> mfa.PackedBlockMask:
    """Whole blocks of keys, for every query."""
    seen = torch.zeros(keys // BLOCK, dtype=torch.bool)
    seen[listed] = True
    return mfa.PackedBlockMask.of(lambda b, h, q, k: seen[k // BLOCK], (1, 1, rows, keys))


def test_mla() -> None:
    """Latents that are both key and value, under as many lists as heads: more than a SIMD-group has lanes."""
    query, key = torch.randn(1, 40, 1, 576), torch.randn(1, 1, 700, 576)
    shown = torch.rand(40, 6) < 0.3
    mask = mfa.PackedBlockMask.of(lambda b, h, q, k: shown[h, k // BLOCK] & (k % 50 > 3), (1, 40, 1, 700))
    tensors = query, key, key[..., :512]
    with mfa.simulate(checks=("races", "bounds")) as sim:
        out = mfa.attention(*tensors, enable_gqa=True, block_mask=mask)
    assert sim.launches[0].kernel.startswith("decode")
    expected, plain = (f(*tensors, bias=mask.to_dense())[0] for f in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)


def run(tensors: tuple[Tensor, ...], **terms: Any) -> tuple[list[str], Any]:
    with mfa.simulate() as sim:
        mfa.attention(*tensors, enable_gqa=True, **terms)
    return [launch.kernel.split("_")[0] for launch in sim.launches], sim.launches


@pytest.mark.parametrize(("heads", "rows", "dim"), [(4, 1, 64), (8, 8, 64), (8, 2, 320)])
def test_hidden_blocks_cost_nothing(heads: int, rows: int, dim: int) -> None:
    """Two of sixteen blocks: an eighth of the products, of the bytes, and of what parts write."""
    keys = 16 * BLOCK
    tensors = inputs(heads, 1, rows, keys, dim)
    names, whole = run(tensors)
    kernels, found = run(tensors, block_mask=packed([3, 11], rows, keys))
    assert names == kernels == ["decode", "combine"]
    assert found[0].grid == whole[0].grid
    assert found[0].counters.mma * 8 == whole[0].counters.mma
    parts, groups = found[0].grid[1], found[0].grid[0] * found[0].grid[1]
    threads = found[0].group[0]
    # Of its query, each group reads what it did; and of its lists, the header, where they lie in it, and two entries.
    own = tensors[0].nbytes * parts * (4 if dim > 256 else 1) + groups * threads * 4 * 80
    assert found[0].counters.device_read_bytes <= whole[0].counters.device_read_bytes / 8 + own
    # A part that saw nothing writes that alone, and combine reads no more of it.
    busy = min(parts, 2 * BLOCK // (16 if dim > 256 else 32))
    assert found[0].counters.device_write_bytes == heads * rows * 4 * (busy * dim + parts)
    lacking = heads * rows * (parts - busy) * dim * 4
    assert found[1].counters.device_read_bytes == whole[1].counters.device_read_bytes - lacking


@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (8, 8)])
@pytest.mark.parametrize("left", [None, 1000])
@pytest.mark.parametrize("listed", [[0, 8], [15], [2, 3, 5, 11], [*range(1, 16, 2)], [*range(16)]], ids=len)
def test_parts_share_what_is_listed(heads: int, rows: int, left: int | None, listed: list[int]) -> None:
    """Each has as many steps as another, or one more: by the products of the parts before it, and of its own."""
    keys = 16 * BLOCK
    tensors, mask = inputs(heads, 1, rows, keys), packed(listed, rows, keys)
    fields: dict[str, Any] = {} if left is None else {"window_left": left}
    fields |= {"dtype": "f16", "query_heads": heads, "query_length": rows, "key_length": keys, "head_dim": 64}
    plan = native.plan(**fields, value_dim=64, bias="blocks", bias_words=len(mask.data), scale=0.125)
    launch, names = plan.launches[0], plans.enumerators("Argument")
    made = {"params": np.frombuffer(bytearray(bytes(plan.params)), np.uint8), "bias": mask.data.numpy()}
    made |= {name: tensor.numpy() for name, tensor in zip(("query", "key", "value"), tensors, strict=True)}
    sizes = {"out": 4 * heads * rows * 64, "partial_out": plan.partial_out_bytes, "partial_lse": plan.partial_lse_bytes}
    made |= {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
    library = Library(_library.path_of("mfa_kernels_count"))
    tiles, parts, _ = launch.grid
    products = [0] + [
        library.dispatch(
            launch.kernel,
            grid=(tiles, part + 1, 1),
            group=launch.group,
            arguments={names[name]: x for name, x in made.items()},
            constants={plans.CONSTANTS[name]: value for name, value in launch.constants.items()},
        )["mma"]
        for part in range(parts)
    ]
    assert parts > 1
    step = {1: 64, 8: 8 * 64}[heads]  # of a tile: 32 keys, twice 8 x 4 products for each eight rows
    own = [(after - before) // (tiles * step) for before, after in pairwise(products)]
    assert sum(own) == 4 * sum(left is None or block >= 8 for block in listed)
    assert max(own) - min(own) <= 1


def test_a_mask_that_hides_everything() -> None:
    tensors = inputs(8, 1, 1, 2048)
    with mfa.simulate(checks=("uninitialised",)) as sim:
        out, lse = mfa.attention(*tensors, enable_gqa=True, return_lse=True, block_mask=packed([], 1, 2048))
    assert (sim.counters.mma, out.count_nonzero()) == (0, 0)
    assert (lse == -torch.inf).all()


def test_which_problems_decode_takes() -> None:
    for heads, rows, expected in ((8, 1, "decode"), (8, 16, "decode"), (8, 17, "forward"), (1, 129, "forward")):
        tensors = inputs(heads, 1, rows, 1024)
        assert run(tensors, block_mask=packed([1, 3], rows, 1024))[0][0] == expected
        assert run(tensors)[0][0] == expected  # as without a mask
    query, key, value = inputs(8, 1, 1, 1024)
    assert run((query.requires_grad_(), key, value), block_mask=packed([1, 3], 1, 1024))[0][0] == "forward"


def test_contents_that_no_mask_has_read_nothing_else() -> None:
    """As in test_block_attention."""
    tensors = inputs(6, 1, 3, 1000, 16)
    good = mfa.PackedBlockMask.of(lambda b, h, q, k: (k // 50 + h) % 3 > 0, (1, 6, 3, 1000))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        data = good.data.clone()
        where = torch.randint(16, len(data), (12,), generator=generator)
        data[where] = torch.randint(-(2**31), 2**31, (12,), generator=generator, dtype=torch.int64).to(torch.int32)
        with mfa.simulate(checks=("bounds",)):
            mfa.attention(*tensors, enable_gqa=True, block_mask=mfa.PackedBlockMask(data, good.shape))
