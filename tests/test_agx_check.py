"""What `make agx-check` wrote is of all kernels, as they are; and how it reads a compiler's listing."""

from __future__ import annotations

import json
import re

import pytest
from agx_check import instances, measure, table

from mfa import _native
from mfa.bench import kernels, registers

WRITTEN = json.loads(registers.PATH.read_text(encoding="utf-8"))
AGAIN = "run `make agx-check`"


def test_every_pipeline_has_a_row() -> None:
    assert list(WRITTEN["kernels"]) == [pipeline.name for pipeline in instances.pipelines()], AGAIN


@pytest.mark.parametrize("family", instances.sources())
def test_rows_are_of_these_sources(family: str) -> None:
    assert WRITTEN["sources"].get(family) == instances.sources()[family], f"metal/{family}.h has changed: {AGAIN}"


def test_rows_are_of_this_tool() -> None:
    assert WRITTEN["tool"] == instances.tool(), AGAIN


def test_a_digest_is_of_a_familys_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = instances.sources()
    code = instances._code

    def edited(text: str) -> None:
        monkeypatch.setattr(instances, "_code", lambda path: code(path) + (text if path.name == "softmax.h" else ""))

    edited("")
    assert instances.sources() == before
    edited("int more;")
    changed = {family for family, digest in instances.sources().items() if digest != before[family]}
    assert {"forward", "decode", "backward_dq"} <= changed
    assert not changed & {"combine", "tile_map"}


def test_every_choice_of_tuning_is_a_kernel() -> None:
    names = {instance.name for instance in _native.catalogue()}
    assert table.tuned() <= names
    assert {"forward_f16_d64_v64_direct_s4_r1_k32", "forward_f32_d64_v64_direct_s4_r1_k32"} - table.chosen() == {
        "forward_f16_d64_v64_direct_s4_r1_k32"
    }


@pytest.mark.parametrize("kernel", kernels.load().values(), ids=lambda kernel: kernel.name)
def test_registers_hold_the_data_that_is_counted(kernel: kernels.Kernel) -> None:
    """Two compilers' views of one kernel: what one counts as alive at once, the other gives registers."""
    assert kernel.registers > kernel.data_registers or kernel.name.startswith("steel")


def test_products_are_those_that_are_counted() -> None:
    """Per step: the loop that the listing shows is the main loop."""
    rows = registers.load()
    for kernel in kernels.load().values():
        if kernel.name in rows:
            assert rows[kernel.name].loop["mma"] == kernel.products, kernel.name


# Decode: O and Q take the registers, and Q of eight SIMD-groups would take all threadgroup memory. backward_dkdv, at
# D 128: dK and dV apart would do without the stack, for a fourth more products; at D 256 they are apart.
SPILLING = {
    "decode_f16_d256_v256_staged_s8_r1_k16",
    "decode_bf16_d256_v256_staged_s8_r1_k16",
    "backward_dkdv_f32_d128_v128_s4_r1_q8",
    "backward_dkdv_f32_d256_v256_s4_r1_q8",
}


def test_chosen_tiles_keep_what_they_hold_in_registers() -> None:
    assert {name.split("/")[0] for name in table.spilling(registers.load())} == SPILLING


LISTING = """\
DEMAND 41
BLOCK 0 1
   r0 = mov_imm #0
   r6 = stack_load #0, x, #0, slot 0
BLOCK 1 2
   r4l...r5h = local_load r33l, #128, xyzw, #0
BLOCK 2 3 4
   r10...r11 = simd_matrix_fmadd r26l...r26h, r16l...r16h, r10...r11
   r4 = bitop r5, #0, #a
   r4 = bitop r5, r6, #8
   r1 = imad r2, r3, r4
   if_icmp #0, #0
BLOCK 3 4
   stack_store r28:r29, #8, xy, #0, slot 1
   r28 = stack_load #16, x, #0, slot 2
BLOCK 4 1 5
   wait slot 0
   r5 = simd_shuffle_xor r5, #1
BLOCK 5 5 6
   r7 = fadd r7, r7
BLOCK 6
   stop
RESULT registers 40 stack 24 threadgroup 64
"""


def test_the_main_loop_of_a_listing() -> None:
    """That multiplies: block 5 is a smaller one."""
    found = measure.parse(LISTING)
    assert (found.registers, found.stack, found.stack_bytes) == (21, 2, 12)
    assert {kind: count for kind, count in found.loop.items() if count} == {
        **{"mma": 1, "threadgroup_load": 1, "stack": 2, "move": 1, "arithmetic": 1, "slow": 1, "shuffle": 1},
        **{"wait": 1, "branch": 1},
    }


def test_a_loop_may_be_one_block() -> None:
    alone = LISTING.replace("BLOCK 4 1 5", "BLOCK 4 5").replace("fadd r7, r7", "simd_matrix_fmadd r8, r9, r7")
    assert {kind for kind, count in measure.parse(alone).loop.items() if count} == {"mma"}


def test_registers_count_what_spills() -> None:
    """What the machine code uses then says only that all are taken."""
    spilled = re.sub("registers 40", "registers 256", re.sub("DEMAND 41", "DEMAND 300", LISTING))
    assert measure.parse(spilled).registers == 150
