"""Continuous batching of transformers with attn_implementation="mfa": the tokens that generate gives."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Device

hf = pytest.importorskip("transformers", reason="transformers isn't installed")

from transformers.generation.continuous_batching import initialization  # noqa: E402 (after the skip)

import mfa.transformers  # noqa: E402

mfa.transformers.register()

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Gemma3Text": {"sliding_window": 8},
    "GptOss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
LENGTHS = (13, 3, 20, 1)
NEW = 10


def model_of(name: str) -> Any:
    config = getattr(hf, f"{name}Config")(**SIZES, **HEADS, **TOKENS, **OPTIONS[name])
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # random weights are small: let attention matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def one_by_one(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What eager attention makes of each prompt alone."""
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def together(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    generation = hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    sizes = {"num_blocks": 64, "max_batch_tokens": 32, "page_size": 16, **options}
    results = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=hf.ContinuousBatchingConfig(**sizes)
    )
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize("name", OPTIONS)
def test_generate_batch_equals_generate(name: str, device: Device) -> None:
    """Prompts of different lengths, one of them longer than what fits in a batch beside the others."""
    model = model_of(name)
    prompts = [torch.randint(3, 60, (length,)).tolist() for length in LENGTHS]
    expected = one_by_one(model, prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)  # different prompts say different things
    model.set_attn_implementation("mfa")
    model.to(device.type)
    with device.active():
        assert together(model, prompts) == expected
    assert model.config._attn_implementation == "mfa"


@pytest.mark.simulator
def test_steps_of_full_attention_read_the_pages() -> None:
    """A step of all requests is two launches per layer, on the pages that transformers keeps."""
    model = model_of("Llama")
    model.set_attn_implementation("mfa")
    prompts = [torch.randint(3, 60, (length,)).tolist() for length in LENGTHS]
    with mfa.simulate() as sim:
        together(model, prompts)
    steps = sim.launches[-4 * (NEW - 3) :]
    assert [launch.kernel.split("_")[0] for launch in steps] == ["append", "decode"] * (len(steps) // 2)
    assert all(launch.constants["is_paged"] for launch in steps)
    assert max(launch.grid[2] for launch in steps) == len(prompts)


def test_other_implementations_are_left_as_they_are() -> None:
    model = model_of("Llama")
    prompts = [[5, 6, 7]]
    expected = one_by_one(model, prompts)
    model.set_attn_implementation("sdpa")
    assert together(model, prompts) == expected
    config = hf.ContinuousBatchingConfig(max_blocks_per_request=4)
    initialization.ensure_decode_fast_path_is_available(model.config, config, False)
    assert config.max_blocks_per_request == 0
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        together(model, prompts)


@pytest.mark.slow
def test_the_server_takes_the_name(tmp_path: Path) -> None:
    """`python -m mfa.transformers serve` answers with what generate gives."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} isn't installed, which transformers[serving] needs")
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = model_of("Llama")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--attn-implementation", "mfa", "--continuous-batching", "--device", "cpu", "--port", str(port)]
    options += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    command = [sys.executable, "-m", "mfa.transformers", "serve", str(tmp_path), *options]
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        body = json.dumps({"model": str(tmp_path), "prompt": "w5 w6 w7", "max_tokens": NEW, "temperature": 0})
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        for _ in range(120):
            assert server.poll() is None
            try:
                answer = json.load(urllib.request.urlopen(request))
                break
            except urllib.error.URLError:
                time.sleep(1)
    finally:
        server.terminate()
        server.wait()
    expected = one_by_one(model, [[5, 6, 7]])[0]
    assert answer["choices"][0]["text"] == " ".join(f"w{token}" for token in expected)
