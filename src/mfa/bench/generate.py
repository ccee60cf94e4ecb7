"""A language model of transformers: prefill, and tokens per second, with mfa beside torch's own attention.

Without a checkpoint, a small Llama of random weights: its times say little, and that it runs says something.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..simulator import FAMILIES, simulate
from . import machine

IMPLEMENTATIONS = ("mfa", "sdpa")
# Heads as in many models of 8 billion parameters, and little else.
TINY = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}


class Row(NamedTuple):
    """Medians, of a batch of prompts of one length."""

    model: str
    dtype: str
    batch: int
    prompt: int
    tokens: int  # generated, of each prompt
    implementation: str
    prefill_ms: float
    tokens_per_second: float  # of the whole batch, prefill aside

    def __str__(self) -> str:
        problem = f"{self.model} {self.dtype} B{self.batch} prompt {self.prompt} tokens {self.tokens}"
        times = f"prefill {self.prefill_ms:10.2f} ms {self.tokens_per_second:10.2f} tokens/s"
        return f"{problem:60} {self.implementation:6} {times}"


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa bench --suite generate", description=__doc__)
    parser.add_argument("--checkpoint", help="a name or folder of a model for transformers; default: random weights")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 1024], metavar="L", help="lengths, in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="to generate, for each prompt (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts (default %(default)s)")
    parser.add_argument(
        "--device",
        choices=["mps", "cpu", "simulator"],
        help="default: mps if our kernels run on it, or else cpu. simulator: counts of what our kernels do, no times",
    )
    parser.add_argument("--family", choices=FAMILIES, default="apple7", help="that is simulated (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with the environment")
    options = parser.parse_args(command_line)
    if options.tokens < 2:
        parser.error("--tokens: it must be at least 2; the first is prefill's")
    device = options.device or machine.best_device()
    environment = machine.environment(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    model = load(options.checkpoint, getattr(torch, options.dtype), "cpu" if device == "simulator" else device)
    prompts = [prompt_of(model, options.batch, length) for length in options.prompts]
    if device == "simulator":
        for prompt in prompts:
            print(counts(model, prompt, options.tokens, options.family))
        return
    rows = []
    for row in timed(model, prompts, options.tokens, options.repeats, device):
        print(row, flush=True)
        rows.append(row)
    if options.json:
        report = {"environment": environment, "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def load(checkpoint: str | None, dtype: torch.dtype, device: str) -> Any:
    """A causal language model, in evaluation mode."""
    import transformers

    from ..transformers import register

    register()
    if checkpoint is None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TINY, max_position_embeddings=1 << 17)
        model = transformers.LlamaForCausalLM(config).to(dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model.eval().to(device)


def prompt_of(model: Any, batch: int, length: int) -> torch.Tensor:
    """int64 [B,L], random."""
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Just so many tokens, whatever they are."""
    terms = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out: torch.Tensor = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **terms)
    return out


def timed(model: Any, prompts: Sequence[torch.Tensor], tokens: int, repeats: int, device: str) -> Iterator[Row]:
    """The implementations take turns, so that what else the machine does meets both."""
    name = model.config.name_or_path or "tiny Llama"
    for prompt in prompts:
        seconds: dict[tuple[str, int], list[float]] = {}
        for repeat in range(repeats + 1):
            for implementation in IMPLEMENTATIONS:
                model.set_attn_implementation(implementation)
                for count in (1, tokens):
                    time_taken = clocked(lambda: generate(model, prompt, count), device)  # noqa: B023 (called here)
                    if repeat > 0:  # the first warms up
                        seconds.setdefault((implementation, count), []).append(time_taken)
        for implementation in IMPLEMENTATIONS:
            first, all_of_them = (statistics.median(seconds[implementation, count]) for count in (1, tokens))
            rate = prompt.shape[0] * (tokens - 1) / max(all_of_them - first, 1e-9)
            dtype = str(model.dtype).removeprefix("torch.")
            yield Row(name, dtype, prompt.shape[0], prompt.shape[1], tokens, implementation, 1e3 * first, rate)


def clocked(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has done it."""
    start = time.perf_counter()
    call()
    if device == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def counts(model: Any, prompt: torch.Tensor, tokens: int, family: str) -> str:
    """What a token costs in the simulator: launches, and bytes beside those of the keys and values of all layers."""
    model.set_attn_implementation("mfa")
    with simulate(family) as prefill:
        generate(model, prompt, 1)
    with simulate(family) as whole:
        generate(model, prompt, tokens)
    steps = tokens - 1
    launches = (len(whole.launches) - len(prefill.launches)) / steps
    read = (whole.counters.device_read_bytes - prefill.counters.device_read_bytes) / steps
    config = model.config.get_text_config()
    keys = prompt.shape[1] + tokens / 2  # on average
    width = config.num_key_value_heads * config.head_dim * 2 * model.dtype.itemsize
    cached = prompt.shape[0] * keys * width * config.num_hidden_layers
    return (
        f"B{prompt.shape[0]} prompt {prompt.shape[1]} tokens {tokens}: per token {launches:.1f} launches, "
        f"{read:,.0f} bytes read, {read / cached:.2f} of keys and values"
    )
