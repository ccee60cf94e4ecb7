"""What comes of attn_implementation="mfa" in each of transformers' models, against eager attention in float32.

python tests/transformers_sweep.py    # rewrites the table in docs/transformers.md; takes minutes
"""

import copy
import multiprocessing
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers_models import arguments, difference, make, model_class, names, paddings, results

import mfa.transformers

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"
HEADER = "| configuration | model | result | compared with eager attention, or why not |\n|---|---|---|---|\n"
VERDICTS = ("equal", "not called", "refused", "wrong", "not built")
TOLERANCE = 1e-4  # of the largest number; what goes wrong is off by a tenth and more
FEW_TOKENS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    name: str
    model: str
    verdict: str
    detail: str

    def row(self) -> str:
        return f"| {self.name} | {self.model} | {self.verdict} | {self.detail} |\n"


Run = Callable[[Any], list[Tensor]]


def runs(model: Any) -> dict[str, Run]:
    """What there is to compare, each from a model to tensors."""
    found: dict[str, Run] = {"unpadded": torch.no_grad()(results)}
    last = None
    if "input_ids" in arguments(model):
        for padding, last in paddings():
            found[padding] = lambda model, mask=last: torch.no_grad()(results)(model, mask)
    found["gradients"] = lambda model: gradients(model, last)
    if last is not None and model.can_generate() and model.main_input_name == "input_ids":
        found["generate"] = generated
        found["generate static"] = lambda model: generated(model, cache_implementation="static", disable_compile=True)
    return found


def gradients(model: Any, mask: Tensor | None) -> list[Tensor]:
    """Of all parameters, behind each other."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    parts = [x for x in results(model, mask) if x.requires_grad]
    torch.autograd.backward(parts, [torch.randn(x.shape, generator=generator) for x in parts])
    return [torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def generated(model: Any, **options: Any) -> list[Tensor]:
    """Logits and tokens, greedily, behind a prompt that is padded at its left."""
    _, mask = next(paddings())
    options = {"output_logits": True, "return_dict_in_generate": True, **FEW_TOKENS, **options}
    out = model.generate(**arguments(model), attention_mask=mask, **options)
    return [torch.stack(out.logits), out.sequences.double()]


def ways(reference: Any) -> Iterator[Callable[[], Any]]:
    """Of asking for a model like `reference` with our attention."""

    def built() -> Any:
        config = copy.deepcopy(reference.config)  # which the model would change
        model = type(reference)._from_config(config, attn_implementation="mfa").eval().float()
        model.load_state_dict(reference.state_dict())
        return model

    def changed() -> Any:
        model = copy.deepcopy(reference)
        model.set_attn_implementation("mfa")
        return model

    yield built
    yield changed


def count_calls() -> list[None]:
    """Grows by an element for each call of our attention."""
    calls: list[None] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return mfa.transformers.attention(*args, **kwargs)

    mfa.transformers.register()
    hf.AttentionInterface.register("mfa", attention)
    return calls


def sentence(error: Exception) -> str:
    """As a table's cell."""
    return " ".join(f"{type(error).__name__}: {error}".replace("|", "/").replace("*", "").split())[:160]


def examine(name: str) -> Outcome:
    """Compares in all ways; a model that can't be built with our attention must be right when it's switched to it."""
    title = ""
    try:
        title = model_class(name).__name__
        reference = make(name)
        expected = {"unpadded": torch.no_grad()(results)(reference)}
    except Exception as error:  # of any kind
        return Outcome(name, title, "not built", sentence(error))
    asked = runs(reference)
    for run, function in list(asked.items()):
        try:
            expected[run] = function(reference)
        except Exception:  # not even with eager attention
            del asked[run]
    refusals = []
    calls = count_calls()
    try:
        for way in ways(reference):
            try:
                model = way()
                found = {run: difference(function(model), expected[run]) for run, function in asked.items()}
            except NotImplementedError as error:
                refusals.append(sentence(error))
                continue
            wrong = [f"{run} {error:.1e}" for run, error in found.items() if not error <= TOLERANCE]
            if wrong:
                return Outcome(name, title, "wrong", ", ".join(wrong))
            if not refusals:
                return Outcome(name, title, "equal" if calls else "not called", ", ".join(found))
    finally:
        mfa.transformers.register()
    return Outcome(name, title, "refused", refusals[0])


def documented() -> dict[str, Outcome]:
    """The page's table."""
    rows = re.findall(r"^\| (\S+) \| (\S*) \| (.*?) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {row[0]: Outcome(*row) for row in rows if row[2] in VERDICTS}


def summary(outcomes: list[Outcome], version: str) -> str:
    counts = [f"{sum(outcome.verdict == verdict for outcome in outcomes)} {verdict}" for verdict in VERDICTS]
    return f"transformers {version}: {', '.join(counts)}."


def quietly(name: str) -> Outcome:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    return examine(name)


if __name__ == "__main__":
    asked = sys.argv[1:] or names()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = documented() | dict(zip(asked, pool.map(quietly, asked), strict=True))
    outcomes = [found[name] for name in names()]
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"^transformers \d.*$", summary(outcomes, hf.__version__), text, count=1, flags=re.MULTILINE)
    PAGE.write_text(text[: text.index(HEADER)] + HEADER + "".join(o.row() for o in outcomes), encoding="utf-8")
