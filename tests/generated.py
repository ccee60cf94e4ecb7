"""What is generated from code in the README and in docs/: tables between `<!-- generated: name -->` and `<!-- end -->`.

`python tests/generated.py` rewrites them.
"""

import re
from dataclasses import asdict
from pathlib import Path

import torch
from agx_check import table as registers_table

import mfa
from mfa import support
from mfa.bench import kernels, model, model_decode, model_varlen, report
from mfa.bench.chips import CHIPS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("performance", "drop-ins", "registers")))
SECTION = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(\n?<!-- end -->)", re.DOTALL)

OPERATIONS = {
    "8x8x8 MMAs": lambda c: c["mma"],
    "threadgroup loads, per lane": lambda c: c["threadgroup_reads"],
    "threadgroup bytes read": lambda c: c["threadgroup_read_bytes"],
    "threadgroup bytes written": lambda c: c["threadgroup_write_bytes"],
    "device bytes read": lambda c: c["device_read_bytes"],
    "exp2, per lane": lambda c: c["exp"],
    "shuffles, reductions, votes": lambda c: c["shuffles"] + c["reductions"],
    "threadgroup barriers": lambda c: c["threadgroup_barriers"],
    "SIMD-group barriers": lambda c: c["simdgroup_barriers"],
}
MLX = {  # in the order of OPERATIONS, by D; test_mlx_counts counts them anew
    64: [16_384, 1_179_648, 2_359_296, 557_056, 557_056, 73_728, 4_096, 1_088, 4_096],
    128: [32_768, 2_621_440, 5_242_880, 1_114_112, 1_114_112, 81_920, 4_096, 2_112, 49_152],
}


def count(dim: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 256, dim, generator=generator).half() for _ in range(3))
    with mfa.simulate("apple7") as sim:
        mfa.attention(query, key, value, return_lse=True)
    return [of(asdict(sim.counters)) for of in OPERATIONS.values()]


def operations() -> str:
    """Our counts beside those of MLX."""
    lines = ["| | MLX, D 64 | mfa, D 64 | MLX, D 128 | mfa, D 128 |", "| --- | ---: | ---: | ---: | ---: |"]
    columns = zip(OPERATIONS, MLX[64], count(64), MLX[128], count(128), strict=True)
    return "\n".join(lines + [f"| {name} | " + " | ".join(f"{n:,}" for n in row) + " |" for name, *row in columns])


def pinned() -> dict[str, list[str]]:
    """The versions that the tests are made for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    others = {name: [version] for name, version in re.findall(r"\b(transformers|diffusers)==([\d.]+)", text)}
    return {"torch": (ROOT / "tests" / "torch_versions.txt").read_text().split(), **others}


def libraries() -> str:
    """What runs of each library; the models are those that the tests have."""
    import test_diffusers
    import test_flash_attn_signatures
    import test_mps_flash_attn
    import test_transformers

    models = ", ".join(test_transformers.CONFIGS)
    denoisers = ", ".join(test_diffusers.MODELS)
    functions = len(test_flash_attn_signatures.SIGNATURES), len(test_mps_flash_attn.SIGNATURES)
    versions = {name: ", ".join(numbers) for name, numbers in pinned().items()}
    rows = {
        f"torch {versions['torch']}, without what each lacks": "OpInfo's samples of SDPA in four dtypes, with "
        "gradients; ModuleInfo's of `nn.MultiheadAttention`, `nn.Transformer` and its layers; `varlen_attn`; "
        "`sdpa_kernel`, autocast, `torch.func`, `torch.compile`, `torch.export`, AOTInductor",
        f"transformers {versions['transformers']}": f"tiny random {models}: logits, padding left and right, a training "
        "step, `generate` with static, dynamic and sliding caches, `torch.compile`",
        f"diffusers {versions['diffusers']}": f"tiny random {denoisers}: outputs and gradients; DiTPipeline; "
        "`torch.compile`",
        "flash-attn 2.8.3, FlashAttention-3, flash-attn-4 4.0.0b36": "not themselves, they need CUDA: signatures and "
        f"conventions of {functions[0]} functions; diffusers' `flash` and `flash_varlen`; transformers' "
        "`flash_attention_2`, once it believes that there is CUDA",
        "timm 1.0.31, peft 0.21.2, trl 1.16.0": "attention models, a LoRA step, packed fine-tuning: outputs and "
        "gradients, or what is trained",
        "mps-flash-attn 0.6.3": f"not itself, it needs a Mac: signatures and conventions of {functions[1]} functions, "
        "the snippets and feature lists of its READMEs; the tests of 0.5.2's sdist, on CPU tensors",
    }
    return "\n".join(
        ["| library | what runs |", "| --- | --- |", *(f"| {name} | {what} |" for name, what in rows.items())]
    )


def predictions() -> str:
    """The cost model's, beside what it says of MLX's kernels."""
    table = kernels.of_float16()
    chips = [CHIPS[name] for name in ("m1", "m1-max", "m2-max", "m3-max", "m4-max")]
    lines = ["| | " + " | ".join(chip.name for chip in chips) + " |", "| --- |" + " ---: |" * len(chips)]
    for dim in report.HEAD_DIMS:
        dense, causal = report.shape(dim), report.shape(dim, causal=True)
        cells = []
        for chip in chips:
            ours = [
                report.utilisation(problem, 2, model.seconds(model.forward(table, problem, chip)), chip)
                for problem in (dense, causal)
            ]
            mlx = report.utilisation(dense, 2, report.steel(table, dense, chip).seconds, chip)
            cells.append(f"{ours[0]:.0%}, {ours[1]:.0%} ({mlx:.0%})")
        lines.append(f"| forward D {dim}: dense, causal (MLX dense) | " + " | ".join(cells) + " |")
    for dim in (64, 80, 128, 512):
        problem = report.shape(dim)
        times = [model.seconds(model.backward(table, problem, chip)) for chip in chips]
        cells = [f"{report.utilisation(problem, 5, time, chip):.0%}" for time, chip in zip(times, chips, strict=True)]
        lines.append(f"| backward D {dim} | " + " | ".join(cells) + " |")
    for dim in (64, 128):
        cells = [
            ", ".join(
                f"{model_decode.share(problem, model_decode.planned(table, problem, chip).seconds, chip):.0%}"
                for group in (1, 4, 8)
                for problem in [report.decoding(dim, group, 32768)]
            )
            for chip in chips
        ]
        lines.append(f"| decode D {dim}: 1, 4, 8 heads per key head, of the bandwidth | " + " | ".join(cells) + " |")
    for dim in (64, 128):
        problem = report.packed(dim)
        cells = [
            f"{report.packed_share(model_varlen.planned(table, problem, chip), problem, chip):.0%} "
            f"({report.equal_share(table, problem, chip):.0%})"
            for chip in chips
        ]
        lines.append(f"| varlen D {dim} (as many tokens in equal sequences) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def unit() -> str:
    """What a SIMD-group does per 16 queries and 32 keys on M5's matrix unit, MLX's beside ours."""
    table, chip = kernels.of_float16(), CHIPS["m5-max"]
    columns = [table[name.format(dim)] for dim in (64, 128) for name in UNIT_KERNELS]
    rows = {
        "products of 16x16x16": [k.unit_mma for k in columns],
        "float operations": [k.arithmetic for k in columns],
        "exp2": [k.exp for k in columns],
        "shuffles, votes": [k.shuffle for k in columns],
        "integer operations": [k.integer for k in columns],
        "loads": [k.load for k in columns],
        "issue slots": [round(sum(model.slots(k, chip))) for k in columns],
        "bytes from L1": [k.device_read // k.simdgroups for k in columns],
        "barriers": [k.barrier + k.fence for k in columns],
    }
    lines = ["| | MLX, D 64 | mfa, D 64 | MLX, D 128 | mfa, D 128 |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {name} | " + " | ".join(f"{n:,}" for n in row) + " |" for name, row in rows.items()]
    views = {"issue": "instructions beside products show", "l1": "L1 gives 64 bytes per clock"}
    for view, words in views.items():
        shares = []
        for kernel in columns:
            problem = report.shape(kernel.head_dim)
            moved = model.tensor_bytes(problem, 4)
            prediction = model.predict(kernel, problem, chip, moved, view=model.VIEWS[view])
            shares.append(f"{report.utilisation(problem, 2, prediction.seconds, chip):.0%}")
        lines.append(f"| share of the peak, if {words} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def unit_shares() -> str:
    """What the plan runs on M5's matrix unit, as a share of its peak, by both views."""
    table, chip = kernels.of_float16(), CHIPS["m5-max"]
    lines = ["| D | forward | backward | dBias alone |", "| ---: | ---: | ---: | ---: |"]
    for problem in map(report.shape, report.UNIT_DIMS):
        names = model.plan_backward(problem, chip)
        made = sum(map(model.products_of, names)) if report.on_unit(table, names) else 0
        dbias = table[f"backward_dbias_f16_d{problem.head_dim}_v{problem.head_dim}_unit_s4_k32"]
        moved = model.tensor_bytes(problem, 4)
        forward, backward, alone = [], [], []
        for view in model.VIEWS.values():
            seconds = model.seconds(model.forward(table, problem, chip, view=view))
            forward.append(f"{report.utilisation(problem, 2, seconds, chip):.0%}")
            if made:
                seconds = model.seconds(model.backward(table, problem, chip, view=view))
                backward.append(f"{report.utilisation(problem, made, seconds, chip):.0%}")
            seconds = model.predict(dbias, problem, chip, moved, view=view).seconds
            alone.append(f"{report.utilisation(problem, 2, seconds, chip):.0%}")
        of_made = f" of {made} products" if made else ""
        cells = (", ".join(forward), ", ".join(backward) + of_made, ", ".join(alone))
        lines.append(f"| {problem.head_dim} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


UNIT_KERNELS = ("steel_nax_f16_d{0}", "forward_f16_d{0}_v{0}_unit_s4_r2_k32")

GENERATED = {
    "unit": unit,
    "unit_shares": unit_shares,
    "support": support.markdown,
    "operations": operations,
    "libraries": libraries,
    "predictions": predictions,
    "spills": registers_table.summary,
    "registers": registers_table.markdown,
}


def sections() -> dict[str, str]:
    """What the pages say, by name."""
    return {name: body for page in PAGES for _, name, body, _ in SECTION.findall(page.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(SECTION.sub(lambda m: f"{m[1]}{GENERATED[m[2]]()}\n<!-- end -->", text), encoding="utf-8")
