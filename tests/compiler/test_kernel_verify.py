"""The verifier accepts every kernel that is made, and names the invariant that a fault breaks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.compiler import kernel_verify
from stagefuse.compiler.errors import VerifyError
from stagefuse.compiler.kernel_ir import Statement
from stagefuse.compiler.kernel_text import parse_kernel
from stagefuse.compiler.kernel_verify import RULES, verify_kernel
from stagefuse.dsl.facts import Facts

from .ir_cases import BUILT, kernels_of, random_graph

FACTS = Facts({"N": (0, 64), "M": (1, 64)})
HEAD = (
    "stagefuse kernel 1\nkernel k\nbuffer a : in f32[N, M]\nbuffer ids : in i64[N]\n"
    "buffer out : out f32[N]\nbuffer half : out bf16[N]\n"
    "buffer sums : inout i64[N]\ndims M N\nparallel d0 in N\n"
)


@pytest.mark.parametrize("name", BUILT)
def test_examples_and_library_are_right(name: str) -> None:
    built = BUILT[name]()
    for kernel in kernels_of(built.passed()):
        assert not verify_kernel(kernel, built.graph.facts, built.bounds).open


@given(st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_random_kernels_are_right(seed: int) -> None:
    built = random_graph(seed)
    for kernel in kernels_of(built.passed()):
        assert not verify_kernel(kernel, built.graph.facts).open


RIGHT = [
    "store out[d0] = a.f32[d0, 0]",
    "store half[d0] = a.f32[d0, M - 1]",
    "store sums[{checked(ids.i64[d0] of N at 0)}] = index(d0) by add",
    "store out[d0] = a.f32[d0 + 1, 0 if ge.bool(index(N - d0 - 2), i64(0)) else 0.0]",
    "store out[d0] = a.f32[{checked(ids.i64[d0] of N at 0)}, 0]",
    "let at = checked(ids.i64[d0] of N at 0)\nstore out[{$at.i64}] = f32(1.0)",
    "for i in 0..M - 1 vector\n  store out[d0] = a.f32[d0, i + 1]",
    "fold r = sum over (i in M) : f32 of a.f32[d0, i]\nstore out[d0] = $r.f32",
    "fold r = argmax over (i in M) : i64 of a.f32[d0, i]\nstore out[d0] = cast.f32($r.i64)",
    "if lt.bool(index(d0), index(N - 1))\n  store out[d0 + 1] = f32(0.0)",
    "alloc row : f32[M]\nfor i in 0..M\n  store row[i] = a.f32[d0, i]\nstore out[d0] = row.f32[0]",
    "alloc k : f32[M]\nalloc o : i64[M]\nsort_row keys=k order=o count=M descending=false",
    "alloc k : f16[M]\nalloc o : u32[M]\nalloc d : u8[M]\nalloc b : u32[257]\nfor i in 0..2\n"
    "  sort_digit keys=k order=o count=M shift=8*i descending=true digits=d before=b",
    'alloc k : i64[M]\nsort_digit keys=k order="" count=M shift=56 descending=false',
]

EQUAL = (
    "alloc k : u32[M]\nequal i in M from checked(ids.i64[d0] of M at 0) of k ahead 4\n"
    "  store out[d0] = a.f32[d0, i]"
)
DIGIT = (
    "alloc k : f32[M]\nalloc o : u32[M]\nalloc d : u8[M]\nalloc b : u32[257]\n"
    "sort_digit keys=k order=o count=M shift=24 descending=false digits=d before=b"
)

TILE = (
    "alloc t : f32[36, 48]\nalloc p : f32[M, 48]\n"
    "tile_product dst=t dst_offset=0 dst_row=48 a=a a_offset=0 a_row=M a_col=1 panel=p "
    "panel_offset=0 rows=min(N, 36) depth=M mr=36 nr=48"
)

COMPUTED = (
    "alloc t : f32[36, 48]\n"
    'tile_product dst=t dst_offset=0 dst_row=48 a=a a_offset=0 a_row=M a_col=1 panel="" '
    "panel_offset=0 rows=min(N, 36) depth=M mr=36 nr=48 element="
)

FAULTS = [
    (1, "let r = f32(1.0)\nlet r = f32(2.0)"),
    (1, "for d0 in 0..N\n  store out[d0] = f32(0.0)"),
    (1, "alloc a : f32[N]"),
    (1, "fold N = sum over (i in M) : f32 of a.f32[d0, i]"),
    (1, "fold r = sum over (M in 3) : f32 of a.f32[d0, 0]"),
    (2, "store out[d1] = f32(0.0)"),
    (2, "store b[d0] = f32(0.0)"),
    (2, "store out[d0] = $r.f32"),
    (2, "store out[d0] = b.f32[d0]"),
    (2, "for i in 0..M\n  let r = a.f32[d0, i]\nstore out[d0] = $r.f32"),
    (2, "for i in 0..M\n  store out[d0] = a.f32[d0, i]\nstore out[d0] = a.f32[d0, i]"),
    (2, "fold r = sum over (i in M) : f32 of a.f32[d0, i]\nstore out[d0] = a.f32[d0, i]"),
    (2, "alloc row : f32[K]"),
    (2, TILE + " width=K"),
    (1, COMPUTED + "f32(1.0) k=d0 c=c"),
    (2, COMPUTED + "a.f32[0, q] k=k c=c"),
    (3, COMPUTED + "index(k) k=k c=c"),
    (6, COMPUTED + "a.f32[0, k + c] k=k c=c"),
    (7, COMPUTED.replace("t : f32", "t : f64").replace("a=a", "a=t") + "f32(1.0) k=k c=c"),
    (2, "for i in 0..K\n  store out[d0] = f32(0.0)"),
    (3, "store out[d0] = i64(1)"),
    (3, "store half[d0] = bf16(1.0)"),
    (3, "store out[d0] = a.f64[d0, 0]"),
    (3, "store out[d0] = add.f32(a.f32[d0, 0], f64(1.0))"),
    (3, "store out[d0] = add.f64(a.f32[d0, 0], f32(1.0))"),
    (3, "store out[d0] = neg.f32(f32(1.0), f32(1.0))"),
    (3, "store out[d0] = ngg.f32(f32(1.0))"),
    (3, "store out[d0] = select.f32(f32(1.0), f32(1.0), f32(1.0))"),
    (3, "store out[d0] = round_to.f32(f32(1.0))"),
    (3, "store out[d0] = and.f32(f32(1.0), f32(1.0))"),
    (3, "store out[d0] = a.f32[d0, 0 if i64(1) else 0.0]"),
    (3, "store out[{f32(0.0)}] = f32(1.0)"),
    (3, "store out[{checked(f32(1.0) of N at 0)}] = f32(1.0)"),
    (3, "let r = f32(1.0)\nstore out[d0] = cast.f32($r.i64)"),
    (3, "if i64(1)\n  store out[d0] = f32(0.0)"),
    (4, "store out[d0, 0] = f32(0.0)"),
    (4, "store out[d0] = a.f32[d0]"),
    (5, "store a[d0, 0] = f32(0.0)"),
    (5, TILE.replace("dst=t", "dst=a")),
    (6, "store out[d0 + 1] = f32(0.0)"),
    (6, "store out[d0 - 1] = f32(0.0)"),
    (6, "store out[d0] = a.f32[d0, 1]"),
    (6, "store out[d0] = a.f32[d0, d0]"),
    (6, "store out[d0] = a.f32[d0 + 1, 0 if ge.bool(index(N - d0 - 1), i64(0)) else 0.0]"),
    (6, "store out[d0] = a.f32[d0, 0 if eq.bool(index(d0), i64(0)) else 0.0]\n"
        "store out[d0 + 1] = f32(0.0)"),
    (6, "store out[{ids.i64[d0]}] = f32(0.0)"),
    (6, "store out[{checked(ids.i64[d0] of N + 1 at 0)}] = f32(0.0)"),
    (6, "for i in 0..M + 1\n  store out[d0] = a.f32[d0, i]"),
    (6, "fold r = sum over (i in M + 1) : f32 of a.f32[d0, i]"),
    (6, "alloc row : f32[M - 1]\nstore row[0] = f32(0.0)"),
    (6, TILE.replace("a_offset=0", "a_offset=1")),
    (6, TILE.replace("panel_offset=0", "panel_offset=48")),
    (6, TILE.replace("dst_row=48", "dst_row=49")),
    (7, TILE.replace("rows=min(N, 36)", "rows=N")),
    (7, TILE.replace("p : f32", "p : f64")),
    (7, "alloc k : f32[M]\nalloc o : i64[M]\nsort_row keys=k order=o count=N descending=false"),
    (7, "alloc k : f32[M]\nalloc o : f32[M]\nsort_row keys=k order=o count=M descending=false"),
    (3, EQUAL.replace("u32", "i32")),
    (3, EQUAL.replace("checked(ids.i64[d0] of M at 0)", "f32(0.0)")),
    (6, EQUAL.replace("a.f32[d0, i]", "a.f32[d0, i + 1]")),
    (6, EQUAL.replace("i in M from", "i in M + 1 from")),
    (6, EQUAL.replace("of M at 0", "of M + 1 at 0")),
    (8, "store sums[d0] = index(d0) by min"),
    (8, "store out[d0] = f32(0.0) by add"),
    (5, "alloc t : i64[4]\nstore t[0] = index(d0) by add"),
    (7, DIGIT.replace("k : f32[M]", "k : f32[M - 1]")),
    (7, DIGIT.replace("o : u32", "o : i64")),
    (7, DIGIT.replace("shift=24", "shift=32")),
    (7, DIGIT.replace("d : u8", "d : i32")),
    (7, DIGIT.replace("257", "256")),
    (7, DIGIT.replace("keys=k", "keys=a").replace("count=M", "count=1")),
    (8, "fold r = total over (i in M) : f32 of a.f32[d0, i]"),
    (8, "fold r = sum over (i in M) : f64 of a.f32[d0, i]"),
    (8, "fold r = argmax over (i in M) : f32 of a.f32[d0, i]"),
    (8, "fold r = any over (i in M) : f32 of a.f32[d0, i]"),
]  # fmt: skip


@pytest.mark.parametrize("text", [*RIGHT, EQUAL, TILE, COMPUTED + "a.f32[0, k] k=k c=c"])
def test_right_kernels_pass(text: str) -> None:
    verify_kernel(parse_kernel(HEAD + text + "\n"), FACTS)


@pytest.mark.parametrize(("invariant", "text"), FAULTS)
def test_faults_are_found(invariant: int, text: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify_kernel(parse_kernel(HEAD + text + "\n"), FACTS)
    assert caught.value.invariant == invariant, caught.value


def test_heads_are_checked() -> None:
    for wrong, invariant in (("dims M N M", 1), ("dims M", 2), ("dims M N d0", 1)):
        text = HEAD.replace("dims M N", wrong) + "store out[d0] = f32(0.0)\n"
        with pytest.raises(VerifyError) as caught:
            verify_kernel(parse_kernel(text), FACTS)
        assert caught.value.invariant == invariant
    with pytest.raises(VerifyError, match="invariant 8"):
        verify_kernel(parse_kernel(HEAD.replace(": in", ": through")), FACTS)


def test_every_statement_has_a_rule_and_every_invariant_a_fault() -> None:
    import typing

    assert set(RULES) == set(typing.get_args(Statement))
    stated = [s for s in (kernel_verify.__doc__ or "").splitlines() if s[:1].isdigit()]
    assert {int(s.partition(".")[0]) for s in stated} == {n for n, _ in FAULTS}
