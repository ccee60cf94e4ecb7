"""The package on torch's `mps` device, from the dispatcher to Metal's encoder. On Linux through driver.stand_in."""

import ctypes
import gc
import threading
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import mfa
from mfa import _metal

pytestmark = [pytest.mark.mps, pytest.mark.usefixtures("mps")]


def qkv(length: int, head_dim: int = 64, requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, head_dim, device="mps", requires_grad=requires_grad) for _ in range(3)]


def reference(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(tensor.cpu() for tensor in tensors))


def test_slices_with_offsets() -> None:
    storage = torch.randn(3, 2, 50, 72, device="mps")
    query, key, value = (storage[i : i + 1, :, 5:45, 3:67] for i in range(3))
    assert query.storage_offset() > 0
    torch.testing.assert_close(mfa.attention(query, key, value).cpu(), reference(query, key, value))


@pytest.mark.slow
def test_offsets_beyond_4_gib() -> None:
    size = 3 * 2 * 40 * 64
    storage = torch.empty(2**30 + size, device="mps")
    tensors = storage[2**30 :].view(3, 1, 2, 40, 64).copy_(torch.randn(3, 1, 2, 40, 64)).unbind()
    torch.testing.assert_close(mfa.attention(*tensors).cpu(), reference(*tensors))


def test_backward_on_the_autograd_thread() -> None:
    tensors = qkv(40, requires_grad=True)
    mfa.attention(*tensors).square().sum().backward()
    copies = [tensor.detach().cpu().requires_grad_() for tensor in tensors]
    reference(*copies).square().sum().backward()
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor.grad.cpu(), copy.grad, atol=2e-4, rtol=1e-4)


def test_torch_trains_on_the_device() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(5, 3).to("mps"), torch.randn(4, 5, device="mps")
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_autocast() -> None:
    with torch.autocast("mps", dtype=torch.float16):
        assert mfa.attention(*qkv(20)).dtype == torch.float16


def test_lazy_execution_gives_the_same(stand_in: Any) -> None:
    tensors = qkv(33)
    stand_in.DRIVER.library.mfa_driver_set_execution(1)
    try:
        out = mfa.attention(*tensors)
        out = mfa.attention(out, *tensors[1:])
        torch.mps.synchronize()
    finally:
        stand_in.DRIVER.library.mfa_driver_set_execution(0)
    expected = reference(reference(*tensors), *tensors[1:])
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.usefixtures("stand_in")  # torch's own allocator rounds sizes up
@pytest.mark.parametrize("layout", ["contiguous", "heads last", "slices"])
def test_memory_is_only_the_results(layout: str) -> None:
    tensors = qkv(64)
    if layout == "heads last":
        tensors = [tensor.view(1, 64, 2, 64).transpose(1, 2) for tensor in tensors]
    elif layout == "slices":
        tensors = [tensor[:, :, 3:50] for tensor in tensors]
    mfa.attention(*tensors)
    gc.collect()
    before = torch.mps.current_allocated_memory()
    with torch.inference_mode():
        out, lse = mfa.attention(*tensors, return_lse=True)
    assert torch.mps.current_allocated_memory() - before == out.nbytes + lse.nbytes


def test_no_leaks_after_many_calls(stand_in: Any) -> None:
    tensors = qkv(8)
    driver = stand_in.DRIVER
    driver.library.mfa_driver_set_execution(2)
    try:
        with torch.inference_mode():
            for _ in range(10):
                mfa.attention(*tensors)
            before = driver.library.mfa_driver_live_count()
            for _ in range(10_000):
                torch.ops.mfa.attention_forward(*tensors, None, None, None, 0.125, None, None, 0.0, 0.0, None, None)
        assert driver.library.mfa_driver_live_count() == before
    finally:
        driver.library.mfa_driver_set_execution(0)


def test_threads_compile_each_pipeline_once(stand_in: Any) -> None:
    driver = stand_in.DRIVER
    failures: list[BaseException] = []
    _metal.clear_cache()
    driver.library.mfa_driver_forget_compilations()
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        try:
            start.wait()
            for call in range(6):
                length = 17 + 16 * ((seed + call) % 4)
                tensors = qkv(length, head_dim=(32, 64, 128)[call % 3])
                torch.testing.assert_close(mfa.attention(*tensors).cpu(), reference(*tensors))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    counts = [int(line.split(" ", 1)[0]) for line in driver.text("compilations")]
    assert all(count == 1 for count in counts)


def test_exception_reaches_python_and_the_next_call_works() -> None:
    tensors = qkv(16)
    with pytest.raises(RuntimeError, match="head dimension"):
        torch.ops.mfa.attention_forward(*qkv(16, head_dim=600), None, None, None, 0.1, None, None, 0.0, 0.0, None, None)
    torch.testing.assert_close(mfa.attention(*tensors).cpu(), reference(*tensors))


def test_the_op_refuses_what_it_leaves_to_the_kernel() -> None:
    query, key, value = qkv(16)
    op = torch.ops.mfa.attention
    with pytest.raises(RuntimeError, match="key has dtype float16; it must have that of query, float32"):
        op(query, key.half(), value)
    with pytest.raises(RuntimeError, match="query has dtype int32; it must be float16, bfloat16 or float32"):
        op(query.int(), key.int(), value.int())
    with pytest.raises(RuntimeError, match="value is on cpu; it must be on the device of query, mps:0"):
        op(query, key, value.cpu())
    with pytest.raises(RuntimeError, match="scale is nan; it must be a number"):
        op(query, key, value, scale=float("nan"))


def test_torch_op_inside_a_block_is_a_deadlock(stand_in: Any) -> None:
    library = stand_in.DRIVER.library
    library.mfa_driver_stream.restype = ctypes.c_void_p
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    errors: list[str] = []

    def work(_: int) -> None:
        try:
            torch.ones(3, device="mps").add_(1)
        except RuntimeError as error:
            errors.append(str(error))

    library.mfa_driver_stream_run(ctypes.c_void_p(library.mfa_driver_stream()), callback(work), None, None)
    library.mfa_driver_clear_findings()
    assert errors
    assert "never returns" in errors[0]


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, device="mps", dtype=torch.float64)


def test_views_share_memory_or_are_refused() -> None:
    tensor = torch.zeros(4, 6, device="mps")
    tensor.t()[1:3].add_(1)
    tensor.unfold(1, 2, 2)[0].add_(1)
    assert tensor.sum().item() == 8 + 6


@pytest.mark.usefixtures("stand_in")
def test_seeded_numbers_are_the_cpus() -> None:
    torch.manual_seed(3)
    on_mps = torch.randn(5, device="mps").cpu()
    torch.manual_seed(3)
    assert torch.equal(on_mps, torch.randn(5))
