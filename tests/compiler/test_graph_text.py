"""A graph's text reads back as the graph; other text is an error that names its line."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.compiler.errors import IRTextError
from stagefuse.compiler.graph import Constant, Graph
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.graph_text import FORMS, parse_graph, print_graph, same_graph
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import DTYPES, F32, F64, I64
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .graph_run import graph_of
from .ir_cases import BUILT, random_graph

HEAD = "stagefuse graph 1\n"


def assert_reads_back(graph: Graph) -> None:
    text = print_graph(graph, data=True)
    back = parse_graph(text)
    assert same_graph(graph, back)
    assert print_graph(back, data=True).splitlines() == [
        line.partition("  # ")[0] for line in text.splitlines()
    ]


@pytest.mark.parametrize("name", BUILT)
def test_examples_and_library_read_back(name: str) -> None:
    built = BUILT[name]()
    assert_reads_back(built.graph)
    assert_reads_back(built.passed())


@given(st.integers(0, 1 << 32), st.sampled_from([F32, F64]))
@settings(max_examples=60, deadline=None)
def test_random_graphs_read_back(seed: int, dtype: object) -> None:
    built = random_graph(seed, F64 if dtype == F64 else F32)
    assert_reads_back(built.graph)
    assert_reads_back(built.passed())


@given(
    st.one_of(st.floats(), st.integers(-(1 << 63), (1 << 63) - 1), st.booleans()),
    st.floats(),
)
def test_numbers_keep_their_bits(value: float, fill: float) -> None:
    b = Builder(Facts({"N": (0, None)}))
    dtype = F64 if isinstance(value, float) else DTYPES["bool" if value in (0, 1) else "i64"]
    x = b.scalar(value, dtype, (sym("N"),))
    y = b.view(b.input("y", TensorType(F64, (sym("N"),))), (sym("N"),), lambda i: [i],
               lambda i: [i - 1], fill)  # fmt: skip
    assert_reads_back(graph_of(b, [x, y]))


def test_signed_zeros_are_different_scalars() -> None:
    b = Builder(Facts())
    assert b.scalar(0.0, F32) != b.scalar(-0.0, F32)


def test_every_primitive_has_a_line() -> None:
    text = HEAD + (
        "dim N in 1..=64\ndim M in 0..\nfact M % 4 == 0\nfact M*N % (2*N) == 0\n"
        "%0 = input x : f32[N, M]\n"
        '%1 = weight w "a-b.0" : f32[4]\n'
        "%2 = constant x0000803f : f32\n"
        "%3 = scalar -0.0 : f32\n"
        "%4 = map exp %0 : f32[N, M]\n"
        "%5 = reduce sum over [0, 1] %0 : f32\n"
        "%6 = view (i0) -> [i0 - 1, 0] where i0 - 1 >= 0 and M - 1 >= 0 else nan %0 : f32[N + 1]\n"
        "%7 = position (i0) -> i0 // 2 : i64[N]\n"
        "%8 = gather (i0) -> [operand 1 at [i0] times 2 plus 1, i0 % 3] %0 %7 : f32[N]\n"
        "%9 = concat along 0 %0 %0 : f32[2*N, M]\n"
        "%10 = scan sum along 0 %0 : f32[N, M]\n"
        "%11 = sort along 1 descending %0 : f32[N, M], i64[N, M]\n"
        "%12 = scatter add along 0 %0 %7 %0 : f32[N, M]\n"
        "%13 = contract batch=[] rows=[0] columns=[1] depth=M base=0 row_stride=M panel=16 "
        "%0 %0 : f32[N, M]\n"
        "%14 = carried 0 over step1 %0 : f32[2, N, M]\n"
        "%15 = recurrence of N over step1 carries 1 gathers at [step1, N - step1 - 1] "
        "%14 %0 %0 %0 : f32[2, N, M], f32[N, N, M], f32[N, N, M]\n"
        "%16 = state kept : f32[N, M]\n"
        "%17 = within N for 2 %7 : i64[N]\n"
        "%18 = update of kept (i0, i1) -> [operand 2 at [i0], i1] %16 %0 %17 : f32[N, M]\n"
        "%19 = update (i0) -> [i0] %7 %7 : i64[N]\n"
        "results %11.1 %13 %19 %18\n"
    )
    graph = parse_graph(text)
    assert print_graph(graph) == text.replace("dim N in 1..=64\ndim M in 0..", "dim M in 0..\n"
                                              "dim N in 1..=64")  # fmt: skip
    kinds = {line.split()[2] for line in text.splitlines() if line.startswith("%")}
    assert kinds == set(FORMS)


def test_large_constants_are_named_by_digest() -> None:
    import numpy as np

    b = Builder(Facts())
    x = b.constant(np.arange(100, dtype=np.float32), F32)
    graph = graph_of(b, [b.map("exp", x)])
    short = print_graph(graph)
    assert "data" not in short and "@" in short
    with pytest.raises(IRTextError, match="are not given"):
        parse_graph(short)
    primitive = graph.nodes[0].primitive
    assert isinstance(primitive, Constant)
    digest = short.partition("@")[2][:16]
    assert same_graph(parse_graph(short, {digest: primitive.data}), graph)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the first line"),
        ("stagefuse graph 2\n", 1, "the first line"),
        (HEAD, 1, "`results`"),
        (HEAD + "%0 = input x : f32[N\nresults\n", 2, "end of the line"),
        (HEAD + "%0 = inptu x : f32\nresults\n", 2, "there is no primitive `inptu`"),
        (HEAD + "%0 = input x : f33\nresults\n", 2, "`f33` is no dtype"),
        (HEAD + "%0 = map exp %1 : f32\nresults\n", 2, "`%1` is not defined above"),
        (HEAD + "%0 = input x : f32\n%0 = input y : f32\nresults\n", 3, "defined twice"),
        (HEAD + "%0 = input x : f32 f32\nresults\n", 2, "follows the end"),
        (HEAD + "%0 = scalar one : f32\nresults\n", 2, "expected a number"),
        (HEAD + "%0 = constant 12 : f32\nresults\n", 2, "expected bytes"),
        (HEAD + "%0 = constant x1 : f32\nresults\n", 2, "expected bytes"),
        (HEAD + "%0 = constant @ab : f32\nresults\n", 2, "are not given"),
        (HEAD + 'data @ab = "00"\nresults\n', 2, "is not that of"),
        (HEAD + "dim N in 1..\nfact N == 0\nresults\n", 3, "a fact is"),
        (HEAD + "~\nresults\n", 2, "is no token"),
        (HEAD + "results %0\n", 2, "not defined above"),
        (HEAD + '%0 = input "\\q" : f32\nresults\n', 2, "escape"),
    ],
)
def test_errors_name_the_line(text: str, line: int, message: str) -> None:
    with pytest.raises(IRTextError, match=message) as caught:
        parse_graph(text)
    assert caught.value.line == line


def mutated(text: str, rng: random.Random) -> str:
    """The text with some pieces deleted, doubled, swapped or replaced."""
    pieces = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(pieces))
        length = rng.randint(1, 8)
        match rng.randrange(4):
            case 0:
                del pieces[at : at + length]
            case 1:
                pieces[at:at] = pieces[at : at + length]
            case 2:
                pieces[at] = rng.choice('%[](){}:=.,-0 9a\n"$@#\\\u00e9')
            case _:
                other = rng.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
        if not pieces:
            break
    return "".join(pieces)


@given(st.integers(0, 1 << 32))
@settings(max_examples=300, deadline=None)
def test_mutations_give_a_graph_or_an_error(seed: int) -> None:
    text = print_graph(random_graph(seed % 7).passed(), data=True)
    try:
        parse_graph(mutated(text, random.Random(seed)))
    except IRTextError as error:
        assert error.line >= 1


@given(st.text(max_size=80))
def test_any_text_gives_a_graph_or_an_error(text: str) -> None:
    for whole in (text, HEAD + text, HEAD + f"%0 = {text} : f32\nresults\n"):
        try:
            parse_graph(whole)
        except IRTextError:
            pass


def test_types_read_back() -> None:
    for dtype in DTYPES.values():
        b = Builder(Facts({"N": (0, None)}))
        shape = (sym("N") * 2 + 1, const(0), sym("N"))
        x = b.input("x", TensorType(dtype, shape))
        assert_reads_back(graph_of(b, [x]))
    assert I64 in DTYPES.values()
