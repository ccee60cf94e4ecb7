"""csrc/simulator/instructions.py: counts and live ranges, of IR that one can count by hand."""

import sys
import textwrap

import pytest
from simulator_engine import ROOT

sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import instructions

MMA = 'asm "mma $0", "=x,=x,x,x,x,x,x,x"'
LOOP = f"""
    define void @kernel(ptr %0, i32 %1) {{
      br label %3

    3:                                                ; preds = %20, %2
      %4 = phi i32 [ 0, %2 ], [ %23, %20 ]
      %5 = phi <2 x float> [ zeroinitializer, %2 ], [ %22, %20 ]
      %6 = extractelement <2 x float> %5, i64 0
      %7 = extractelement <2 x float> %5, i64 1
      %8 = load <4 x half>, ptr %0, align 8
      %9 = extractelement <4 x half> %8, i64 0
      %10 = extractelement <4 x half> %8, i64 1
      %11 = tail call {{ float, float }} {MMA}(half %9, half %10, half %9, half %10, float %6, float %7) #8
      %12 = extractvalue {{ float, float }} %11, 0
      %13 = extractvalue {{ float, float }} %11, 1
      %14 = fcmp ogt float %12, 1.000000e+00
      br i1 %14, label %15, label %17

    15:                                               ; preds = %3
      %16 = fmul float %12, 2.000000e+00
      br label %17

    17:                                               ; preds = %15, %3
      %18 = phi float [ %16, %15 ], [ %12, %3 ]
      %19 = fadd float %18, %13
      br label %20

    20:                                               ; preds = %17
      %21 = insertelement <2 x float> poison, float %18, i64 0
      %22 = insertelement <2 x float> %21, float %19, i64 1
      %23 = add nuw nsw i32 %4, 1
      %24 = icmp eq i32 %23, %1
      br i1 %24, label %25, label %3

    25:                                               ; preds = %20
      ret void
    }}
"""


@pytest.fixture(scope="module")
def step() -> instructions.Step:
    return instructions.step_of(instructions.kernel_of(textwrap.dedent(LOOP)))


def test_counts_what_every_step_runs(step: instructions.Step) -> None:
    expected = {"load": 1, "mma": 1, "arithmetic": 2, "integer": 4}  # fcmp and fadd; add, icmp and two branches
    assert {kind: count for kind, count in step.counts.items() if count} == expected


def test_an_exception_is_not_counted(step: instructions.Step) -> None:
    assert step.exceptions == 1  # the fmul


def test_registers_are_the_data_alive_at_once(step: instructions.Step) -> None:
    """The two floats of the loop, and those two halves of the load that are used, in one register."""
    assert step.registers == 2 + 1 + instructions.ADDRESS_REGISTERS


def test_the_cheaper_arm_counts() -> None:
    text = LOOP.replace("label %15, label %17", "label %15, label %26").replace(
        "    17:  ", "    26:                                               ; preds = %3\n"
        "      %27 = fmul float %12, 2.000000e+00\n      %28 = fadd float %27, %27\n      br label %17\n\n    17:  "
    ).replace("[ %12, %3 ]", "[ %28, %26 ]")  # fmt: skip
    step = instructions.step_of(instructions.kernel_of(textwrap.dedent(text)))
    assert (step.counts["arithmetic"], step.exceptions) == (3, 2)


@pytest.mark.parametrize(
    ("operands", "kind"),
    [
        ("half %1, half %2, half %3, half %4, float %5, float %6", "mma"),
        ("float %1, float %2, half %3, half %4, float %5, float %6", "mixed_mma"),
        ("float %1, float %2, float %3, float %4, float %5, float %6", "wide_mma"),
    ],
)
def test_products_by_the_types_of_their_operands(operands: str, kind: str) -> None:
    assert instructions.classify(instructions.parse(f"%9 = call {{ float, float }} {MMA}({operands}) #8")) == (kind, 1)


def test_neighbouring_halves_are_one_load() -> None:
    lines = [
        "%2 = load half, ptr %1, align 2",
        "%3 = getelementptr inbounds nuw i8, ptr %1, i64 2",
        "%4 = load half, ptr %3, align 2",
        "%5 = getelementptr half, ptr %3, i64 8",
        "%6 = load half, ptr %5, align 2",
    ]
    assert instructions.merged_loads([instructions.parse(line) for line in lines]) == 1
