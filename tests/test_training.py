"""A small GPT trained with mfa.attention, beside the same one trained with F.scaled_dot_product_attention."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from conftest import SIMULATOR
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import mfa
from mfa import _native as native

TEXT = """\
A key was cut for every door in the old house, and every key was hung on a numbered nail. Each morning the porter read
the list of questions that the guests had left, walked along the wall, and weighed how well each key might answer each
question. Most of them did not fit at all. Some fitted a little, and he took a little of what lay behind their doors.
One or two fitted well, and of those he took the most. By noon he had mixed what he took, and every guest had a cup of
it, no larger and no smaller than the others. Nobody was allowed to ask about rooms that were built after their own, so
the first guest only ever knew one room, and the last guest could know them all. When the house grew, the porter grew
slow, because there were more keys than he could hold in his hands. So he learned to carry a tray of them at a time,
to remember the best fit so far, and to forget the tray before he fetched the next. The guests never noticed.
"""
HEADS, KEY_HEADS, DIM, LAYERS, CONTEXT, BATCH = 4, 2, 8, 2, 33, 4
ATTENTION: dict[str, Callable[..., Tensor]] = {"mfa": mfa.attention, "torch": scaled_dot_product_attention}
VOCABULARY = sorted(set(TEXT))
TOKENS = torch.tensor([VOCABULARY.index(character) for character in TEXT])


class Block(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        width = HEADS * DIM
        self.attention = ATTENTION[attention]
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv = nn.Linear(width, (HEADS + 2 * KEY_HEADS) * DIM)
        self.project = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, DIM)).transpose(1, 2)
        query, key, value = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        out = self.attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.project(out.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class GPT(nn.Module):
    """Predicts characters; `forward` gives the loss."""

    def __init__(self, attention: str, is_checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * DIM
        self.embed = nn.Embedding(len(VOCABULARY), width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList([Block(attention) for _ in range(LAYERS)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY)))
        self.is_checkpointed = is_checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1]) + self.position(torch.arange(tokens.shape[1] - 1, device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.fixture(params=["cpu", SIMULATOR])
def kernels(request: pytest.FixtureRequest) -> AbstractContextManager[object]:
    return mfa.simulate() if request.param == "simulator" else nullcontext()


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(TOKENS) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([TOKENS[start : start + CONTEXT] for start in starts.tolist()])


def train(model: nn.Module, steps: int, each: Callable[[Tensor], None]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _, tokens in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        each(loss.detach())
        optimizer.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bound(plain: Tensor, expected: Tensor) -> float:
    """Twice the error of torch in float32, plus a rounding of the largest number."""
    rounding = torch.finfo(torch.float32).eps * float(expected.abs().max())
    return 2 * oracle.largest_error(plain, expected) + rounding


@pytest.mark.simulator
def test_steps_in_the_simulator() -> None:
    """Loss, and gradient of every parameter, are as near to float64 as torch's; each run trains weights of its own."""

    def run(attention: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        model = GPT(attention).to(dtype)
        history: list[dict[str, Tensor]] = []
        train(model, 3, lambda loss: history.append({"loss": loss, **gradients(model)}))
        return history

    with mfa.simulate(checks=("races", "bounds", "uninitialised")) as simulation:
        found = run("mfa", torch.float32)
    launched = [launch.kernel.split("_f32")[0] for launch in simulation.launches]
    # Few rows; in float32 nothing is left for the backward pass that decode couldn't.
    assert launched.count("decode") == launched.count("backward_dkdv") == 3 * LAYERS
    with sdpa_kernel(SDPBackend.MATH):
        plain, expected = run("torch", torch.float32), run("torch", torch.float64)
    for ours, theirs, exact in zip(found, plain, expected, strict=True):
        assert ours.keys() == {"loss", *dict(GPT("mfa").named_parameters())}
        for name, result in ours.items():
            assert oracle.largest_error(result, exact[name]) <= bound(theirs[name], exact[name]), name


def test_loss_curves_overlap() -> None:
    """200 steps on the CPU: the curve in float32 stays as near to float64 as torch's."""

    def curve(attention: str, dtype: torch.dtype) -> Tensor:
        losses: list[Tensor] = []
        train(GPT(attention).to(dtype), 200, losses.append)
        return torch.stack(losses)

    ours = curve("mfa", torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        theirs, exact = curve("torch", torch.float32), curve("torch", torch.float64)
    assert oracle.largest_error(ours, exact) <= bound(theirs, exact)
    assert exact[-20:].mean() < 0.7 * exact[0], "the model learns nothing"


def test_checkpointing(kernels: AbstractContextManager[object]) -> None:
    """The forward pass is computed again and gives the same bits."""
    tokens = next(batches())
    found = []
    with kernels:
        for is_checkpointed in (False, True):
            model = GPT("mfa", is_checkpointed)
            model(tokens).backward()
            found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, tokens: torch.func.functional_call(model, parameters, (tokens,))


def test_func_grad(kernels: AbstractContextManager[object]) -> None:
    model, tokens = GPT("mfa"), next(batches())
    with kernels:
        model(tokens).backward()
        found = torch.func.grad(loss_of(model))(dict(model.named_parameters()), tokens)
    torch.testing.assert_close(found, gradients(model), rtol=0, atol=0)


def test_vmap_over_grad(kernels: AbstractContextManager[object]) -> None:
    """Gradients per sample."""
    model, tokens = GPT("mfa"), next(batches())
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    grad = torch.func.grad(lambda parameters, row: loss_of(model)(parameters, row[None]))
    exact = GPT("torch").double()
    with kernels:
        found = torch.func.vmap(grad, in_dims=(None, 0))(parameters, tokens)
        one_by_one = [grad(parameters, row) for row in tokens]
    for index, row in enumerate(tokens):
        exact.zero_grad()
        exact(row[None]).backward()
        for name, expected in gradients(exact).items():
            error = oracle.largest_error(found[name][index], expected)
            assert error <= bound(one_by_one[index][name], expected), name


def test_compiled_step(kernels: AbstractContextManager[object]) -> None:
    """Forward, backward and update in one graph."""
    torch._dynamo.reset()
    model, tokens = GPT("mfa"), next(batches())
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(parameters: dict[str, Tensor], tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grads, loss = torch.func.grad_and_value(loss_of(model))(parameters, tokens)
        return {name: parameter - 0.1 * grads[name] for name, parameter in parameters.items()}, loss

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with kernels:
        expected = step(parameters, tokens)
        found = compiled(parameters, tokens)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected)


def test_compiled_model_and_optimizer(kernels: AbstractContextManager[object]) -> None:
    """The usual loop: loss, `backward` and optimizer, each without a graph break, trains as the eager one does."""
    torch._dynamo.reset()
    histories = []
    with kernels:
        for is_compiled in (False, True):
            model = GPT("mfa")
            history: list[dict[str, Tensor]] = []
            run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
            train(run, 2, lambda loss, model=model, history=history: history.append(gradients(model)))  # type: ignore[misc]
            histories.append(history)
    torch.testing.assert_close(histories[1], histories[0])


@pytest.mark.parametrize("mode", ["automatic", "five_gemm", "seven_gemm"])
@pytest.mark.parametrize("family", ["apple7", "apple8", "apple9", "apple10"])
def test_memory(family: str, mode: str) -> None:
    """At 16384 keys all that there is, scratch and inputs too, is at most 1.5x of what must be, and 64 MiB."""
    heads, length, dim = 8, 16384, 64
    query, key, value = (
        torch.empty(1, heads, length, dim, dtype=torch.float16, device="meta").requires_grad_() for _ in range(3)
    )
    scale, *others = dim**-0.5, None, None, 0.0, 0.0, None, None
    op = torch.ops.mfa.attention_forward_with_correction  # what training calls
    out, lse, correction = op(query, key, value, None, None, None, scale, *others, False)
    assert correction.nbytes == out.nbytes
    grad_out = torch.empty_like(out)
    grads = torch.autograd.grad(out, (query, key, value), grad_out)
    delta = torch.empty_like(lse)

    sizes = {"query_heads": heads, "key_heads": heads, "query_length": length, "key_length": length}
    problem = {**sizes, "head_dim": dim, "value_dim": dim, "family": family, "dtype": "f16", "has_correction": True}
    forward, backward = native.plan(**problem), native.plan_backward(**problem, mode=mode)
    assert backward.scratch_bytes <= 64 << 20
    statistics = 2 * lse.nbytes  # what the backward pass keeps of a row: its lse and delta
    scratch = forward.mask_class_bytes + forward.scratch_bytes + backward.scratch_bytes
    tensors = (query, key, value, out, lse, correction, grad_out, *grads)
    peak = sum(tensor.nbytes for tensor in tensors) + statistics + scratch
    essential = sum(tensor.nbytes for tensor in (query, key, value, out, *grads, lse, delta))
    assert peak <= 1.5 * essential + (64 << 20)
