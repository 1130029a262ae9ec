"""A kernel's text reads back as the kernel; other text is an error that names its line."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.compiler.errors import IRTextError
from stagefuse.compiler.kernel_ir import (
    Buffer,
    Const,
    If,
    Kernel,
    Load,
    Local,
    Op,
    Store,
)
from stagefuse.compiler.kernel_text import FORMS, parse_kernel, print_kernel
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import BF16, BOOL, F32

from .ir_cases import BUILT, kernels_of, random_graph
from .test_graph_text import mutated

HEAD = "stagefuse kernel 1\nkernel k\nbuffer b0 : out f32[N]\ndims N\n"


def assert_reads_back(kernel: Kernel) -> None:
    text = print_kernel(kernel)
    back = parse_kernel(text)
    assert back == kernel
    assert back.label == kernel.label
    assert print_kernel(back) == text


@pytest.mark.parametrize("name", BUILT)
def test_examples_and_library_read_back(name: str) -> None:
    for kernel in kernels_of(BUILT[name]().passed()):
        assert_reads_back(kernel)


@given(st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_random_kernels_read_back(seed: int) -> None:
    for kernel in kernels_of(random_graph(seed).passed()):
        assert_reads_back(kernel)


def test_every_statement_has_a_line() -> None:
    text = (
        'stagefuse kernel 1\nkernel "k-1" for "a label"\n'
        "buffer b0 : in bf16[N, 4]\nbuffer b1 : out f32[N]\nbuffer b2 : in i64[N]\n"
        "dims N\nguarded\n"
        "parallel d0 in N\nparallel d1 in 4\n"
        "alloc row : f32[N]\nalloc total : f32[]\nalloc keys : f32[N]\nalloc order : i64[N]\n"
        "fold r1 = max over (f0 in N, f1 in 4) : f32 of b0.bf16[f0, f1]\n"
        "for d2 in 0..N vector\n"
        "  let v1 = round_to.f32<bf16>(add.f32($r1.f32, f32(-0.0)))\n"
        "  %0 = checked(b2.i64[d2] of N for 2 at 3)\n"
        "  store row[d2] = b0.bf16[{%0}, d1 if ge.bool(index(N - d2 - 1), i64(0)) else -0.5]\n"
        "  if ge.bool(%0, i64(0))\n"
        "    store b1[d2] = mul.f32($v1.f32, $v1.f32)\n"
        "tile_product dst=row dst_offset=0 dst_row=48 a=b1 a_offset=d0 a_row=1 a_col=1 panel=b1 "
        "panel_offset=0 rows=1 depth=1 mr=36 nr=48 accumulate=true width=N\n"
        'tile_product dst=row dst_offset=0 dst_row=48 a=b1 a_offset=d0 a_row=1 a_col=1 panel="" '
        "panel_offset=0 rows=1 depth=1 mr=36 nr=48 element=b0.bf16[k, c] k=k c=c\n"
        "attend dst=row dst_row=4 totals=keys queries=b1(d0, 4, 1, 0, 8, 2) "
        "keys=b1(0, 4, 1, 48, 192) values=b1(0, 1, 4) rows=2 mr=64 lo=0 hi=N depth=4 columns=4 "
        "row=r key=j raw=raw score=mul.f32($raw.f32, f32(0.5)) keep=le.bool(index(j), index(r)) "
        "most=m ways=4\n"
        "sort_row keys=keys order=order count=N descending=true\n"
        "equal k in N from index(0) of b0 ahead 4\n"
        "  store b1[k] = f32(0.0) by max\n"
        "sort_digit keys=keys order=order count=N shift=8 descending=true digits=d before=b\n"
    )
    kernel = parse_kernel(text)
    assert print_kernel(kernel) == text
    assert_reads_back(kernel)
    assert set(FORMS) <= set(text.split())


def chain(length: int) -> Kernel:
    """A value that is used twice by the next, `length` times over."""
    value: Op | Load = Load("b0", (), F32)
    for _ in range(length):
        value = Op("add", (value, value), F32)
    buffers = (Buffer("b0", F32, (), "in"), Buffer("b1", F32, (), "out"))
    return Kernel("k", buffers, (), (), (Store("b1", (), value),))


def test_shared_values_are_written_once() -> None:
    text = print_kernel(chain(200))
    assert len(text) < 200 * 40
    assert print_kernel(parse_kernel(text)) == text


def test_deep_values_are_cut_into_lines() -> None:
    value: Op | Load = Load("b0", (), F32)
    for number in range(3000):
        value = Op("add", (value, Const(float(number), F32)), F32)
    buffers = (Buffer("b0", F32, (), "in"), Buffer("b1", F32, (), "out"))
    text = print_kernel(Kernel("k", buffers, (), (), (Store("b1", (), value),)))
    assert max(map(len, text.splitlines())) < 300
    assert print_kernel(parse_kernel(text)) == text


def test_names_of_values_end_with_their_block() -> None:
    shared = Op("neg", (Op("neg", (Load("b1", (), F32),), F32),), F32)
    twice = Op("add", (shared, shared), F32)
    condition = Op("gt", (twice, Const(0.0, F32)), BOOL)
    body = (
        If(condition, (Store("b0", (), twice),)),
        If(condition, (Store("b0", (), Op("round_to", (twice,), F32, BF16)),)),
    )
    buffers = (Buffer("b0", F32, (), "out"), Buffer("b1", F32, (), "in"))
    assert_reads_back(Kernel("k", buffers, (), (), body))
    assert Local("a", F32) != Local("b", F32)
    assert sym("N") != const(0)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the first line"),
        ("stagefuse graph 1\n", 1, "the first line"),
        ("stagefuse kernel 1\n", 1, "expected `kernel`, found the end"),
        ("stagefuse kernel 1\nkernel k\n", 2, "expected `dims`, found the end"),
        ("stagefuse kernel 1\nkernel k\nbuffer b0 : out f32[N\n", 3, "end of the line"),
        (HEAD + "stroe b0[0] = f32(0.0)\n", 5, "there is no statement `stroe`"),
        (HEAD + "  store b0[0] = f32(0.0)\n", 5, "indented"),
        (HEAD + "for i in 0..N\n   store b0[i] = f32(0.0)\n", 6, "indented"),
        (HEAD + "store b0[0] = f32(0.0) f32\n", 5, "follows the end"),
        (HEAD + "store b0[0] = zero\n", 5, "expected a value"),
        (HEAD + "store b0[0] = %1\n", 5, "`%1` is not named above"),
        (HEAD + "store b0[0] = b0[0]\n", 5, "a load is written"),
        (HEAD + "store b0[0] = $r1\n", 5, "a bound scalar is written"),
        (HEAD + "store b0[0] = " + "neg.f32(" * 99 + "\n", 5, "nested too deeply"),
        (HEAD + "".join(" " * 2 * n + f"for i{n} in 0..N\n" for n in range(120)), 106, "nested"),
    ],
)
def test_errors_name_the_line(text: str, line: int, message: str) -> None:
    with pytest.raises(IRTextError, match=message) as caught:
        parse_kernel(text)
    assert caught.value.line == line


KERNELS: dict[int, str] = {}


@given(st.integers(0, 1 << 32))
@settings(max_examples=300, deadline=None)
def test_mutations_give_a_kernel_or_an_error(seed: int) -> None:
    case = seed % 5
    if case not in KERNELS:
        KERNELS[case] = print_kernel(next(kernels_of(random_graph(case).passed())))
    try:
        parse_kernel(mutated(KERNELS[case], random.Random(seed)))
    except IRTextError as error:
        assert error.line >= 1


@given(st.text(max_size=80))
def test_any_text_gives_a_kernel_or_an_error(text: str) -> None:
    for whole in (text, HEAD + text, HEAD + f"store b0[0] = {text}\n"):
        try:
            parse_kernel(whole)
        except IRTextError:
            pass
