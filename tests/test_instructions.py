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
    assert step.registers == 2 + 1


def looped(*lines: str, load: str = "<4 x half>") -> str:
    """A loop that runs these lines, with two loaded vectors, %5 and %6, and an accumulator's elements, %8 and %9."""
    body = "\n".join(f"      {line}" for line in lines)
    return textwrap.dedent(f"""
        define void @kernel(ptr %0, i32 %1) {{
          br label %3

        3:                                                ; preds = %3, %2
          %4 = phi <2 x float> [ zeroinitializer, %2 ], [ %90, %3 ]
          %5 = load {load}, ptr %0, align 8
          %6 = load {load}, ptr %0, align 8
          %8 = extractelement <2 x float> %4, i64 0
          %9 = extractelement <2 x float> %4, i64 1
        """) + body + textwrap.dedent("""
          %90 = insertelement <2 x float> poison, float %8, i64 0
          %91 = icmp eq i32 %1, 0
          br i1 %91, label %92, label %3

        92:                                               ; preds = %3
          ret void
        }
        """)  # fmt: skip


@pytest.mark.parametrize("scalar", ["half", "bfloat", "float"])
def test_elements_of_two_vectors_in_one_operand_are_moved(scalar: str) -> None:
    """As columns of what lies in rows: three moves for two operands, however many products take them."""
    elements = [
        f"%{10 + 4 * vector + i} = extractelement <4 x {scalar}> %{5 + vector}, i64 {i}"
        for vector in (0, 1)
        for i in range(4)
    ]

    def mma(result: int, first: int, second: int) -> str:
        left = f"{scalar} %10, {scalar} %11"  # as they were loaded
        return (
            f"%{result} = tail call {{ float, float }} {MMA}({left}, {scalar} %{first}, {scalar} %{second}, "
            "float %8, float %9) #8"
        )

    def moves(*operands: tuple[int, int]) -> int:
        lines = [mma(30 + i, *operand) for i, operand in enumerate(operands)]
        step = instructions.step_of(instructions.kernel_of(looped(*elements, *lines, load=f"<4 x {scalar}>")))
        assert sum(step.counts[kind] for kind in instructions.PRODUCTS) == len(operands)
        return step.counts["move"]

    assert moves((10, 14), (11, 15)) == 3
    assert moves((10, 14), (11, 15), (10, 14), (11, 15)) == 3
    assert moves((12, 13), (16, 17)) == 0  # neighbours
    assert moves((11, 12)) == 2  # neighbours, but of two registers of halves


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("insertelement <4 x bfloat> <bfloat poison, bfloat 0xR0000, bfloat poison, bfloat poison>, bfloat %10, i64 0",
         ["5.0", None, None, None]),
        ("shufflevector <4 x bfloat> %5, <4 x bfloat> <bfloat poison, bfloat 0xR0000, bfloat poison, bfloat poison>, "
         "<4 x i32> <i32 0, i32 poison, i32 5, i32 3>", ["5.0", None, None, "5.3"]),
        ("shufflevector <4 x bfloat> %5, <4 x bfloat> poison, <2 x i32> zeroinitializer", ["5.0", "5.0"]),
    ],
)  # fmt: skip
def test_parts_of_vectors_that_are_constant_in_part(line: str, parts: list[str | None]) -> None:
    text = looped("%10 = extractelement <4 x bfloat> %5, i64 0", f"%11 = {line}", load="<4 x bfloat>")
    function = instructions.Function(text.strip().splitlines())
    assert instructions.Atoms(function).of["11"] == parts


def test_the_cheaper_arm_counts() -> None:
    text = LOOP.replace("label %15, label %17", "label %15, label %26").replace(
        "    17:  ", "    26:                                               ; preds = %3\n"
        "      %27 = fmul float %12, 2.000000e+00\n      %28 = fadd float %27, %27\n      br label %17\n\n    17:  "
    ).replace("[ %12, %3 ]", "[ %28, %26 ]")  # fmt: skip
    step = instructions.step_of(instructions.kernel_of(textwrap.dedent(text)))
    assert (step.counts["arithmetic"], step.exceptions) == (3, 2)


UNIT = 'tail call void asm sideeffect "unit_mma $0", "x,x,i"(float %5, float %5, i32 2)'
UNIT_LOOP = f"""
    define void @kernel(ptr %0, i32 %1) {{
      br label %3

    3:                                                ; preds = %16, %2
      %4 = phi i32 [ 0, %2 ], [ %17, %16 ]
      %5 = load float, ptr %0, align 4
      %6 = fcmp ogt float %5, 1.000000e+00
      br i1 %6, label %16, label %7

    7:                                                ; preds = %7, %3
      %8 = phi i32 [ 0, %3 ], [ %9, %7 ]
      {UNIT}
      %9 = add nuw nsw i32 %8, 2
      %10 = icmp samesign ult i32 %8, 4
      br i1 %10, label %7, label %11

    11:                                               ; preds = %7
      %12 = tail call float @llvm.exp2.f32(float %5)
      %13 = fcmp ogt float %12, 1.000000e+00
      br i1 %13, label %14, label %15

    14:                                               ; preds = %11
      {UNIT}
      br label %15

    15:                                               ; preds = %14, %11
      %18 = fmul float %12, %12
      br label %16

    16:                                               ; preds = %15, %3
      %17 = add nuw nsw i32 %4, 1
      %19 = icmp eq i32 %17, %1
      br i1 %19, label %20, label %3

    20:                                               ; preds = %16
      ret void
    }}
"""


def test_on_the_matrix_unit_the_cheapest_step_that_exponentiates_counts() -> None:
    """Thrice the inner loop, which tests its counter before it grows; no product that a branch leaves out."""
    step = instructions.step_of(instructions.kernel_of(textwrap.dedent(UNIT_LOOP)))
    counts = {kind: count for kind, count in step.counts.items() if count}
    assert counts == {"load": 1, "unit_mma": 6, "exp": 1, "arithmetic": 3, "integer": 14}
    assert step.exceptions == 2


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
    assert instructions.merged_loads([instructions.parse(line) for line in lines], most=2) == 1


@pytest.mark.parametrize(("most", "merged"), [(2, 2), (4, 3)])
def test_four_halves_are_one_load_or_two(most: int, merged: int) -> None:
    """On the matrix unit a lane has four neighbours of a row; elsewhere two."""
    lines = ["%2 = load half, ptr %1, align 2"]
    for i in range(1, 4):
        lines += [
            f"%{2 * i + 1} = getelementptr half, ptr %1, i64 {i}",
            f"%{2 * i + 2} = load half, ptr %{2 * i + 1}, align 2",
        ]
    assert instructions.merged_loads([instructions.parse(line) for line in lines], most) == merged
