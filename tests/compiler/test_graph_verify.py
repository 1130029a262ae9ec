"""The verifier accepts what the compiler makes, and names the invariant that a fault breaks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.compiler import graph_verify
from stagefuse.compiler.errors import VerifyError
from stagefuse.compiler.graph import Graph, Map, Node, Primitive, Ref, Scalar
from stagefuse.compiler.graph_text import parse_graph
from stagefuse.compiler.graph_verify import RULES, verify_graph
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.source import Source, Span
from stagefuse.dsl.types import TensorType

from .ir_cases import BUILT, random_graph, with_node

HEAD = "stagefuse graph 1\ndim N in 1..=64\ndim M in 0..\n%0 = input x : f32[N, M]\n"
IDS = "%1 = input ids : i64[M]\n"


@pytest.mark.parametrize("name", BUILT)
def test_examples_and_library_are_right(name: str) -> None:
    built = BUILT[name]()
    assert not verify_graph(built.graph, built.bounds).open
    assert not verify_graph(built.passed(), built.bounds).open


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_random_graphs_are_right(seed: int) -> None:
    built = random_graph(seed)
    assert not verify_graph(built.graph).open
    assert not verify_graph(built.passed()).open


STEP = "dim step1 in 0..=N - 1\n"
KEPT = "%1 = state kept : f32[N, M]\n%2 = input at : i64[]\n"
FAULTS = [
    (4, "%1 = within N %0 : f32[N, M]\nresults %1"),
    (4, KEPT + "%3 = update (i0) -> [i0] %1 %0 : f32[N, M]\nresults %3"),
    (4, KEPT + "%3 = update (i0, i1) -> [operand 2 at [], i1] %1 %0 : f32[N, M]\nresults %3"),
    (7, KEPT + "%3 = update (i0, i1) -> [i0 + 1, i1] %1 %0 : f32[N, M]\nresults %3"),
    (11, KEPT + "%3 = state kept : f32\nresults %1 %3"),
    (11, KEPT + "%3 = update of other (i0, i1) -> [i0, i1] %1 %0 : f32[N, M]\nresults %3"),
    (11, KEPT + "%3 = update of kept (i0, i1) -> [i0, i1] %0 %0 : f32[N, M]\nresults %3"),
    (12, KEPT + "%3 = input row : f32[M]\n"
     "%4 = update (i0) -> [operand 2 at [], i0] %1 %3 %2 : f32[N, M]\nresults %4"),
    (12, KEPT + "%3 = within N %2 : i64[]\n%4 = update (i0, i1) -> "
     "[operand 2 at [] plus i0, i1] %1 %0 %3 : f32[N, M]\nresults %4"),
    (3, "%1 = input x : f32\nresults %0"),
    (4, "%1 = map exp %0 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = map exq %0 : f32[N, M]\nresults %1"),
    (4, IDS + "%2 = map exp %1 : i64[M]\nresults %2"),
    (4, IDS + "%2 = map add %0 %1 : f32[N, M]\nresults %2"),
    (4, "%1 = input y : f32[M, N]\n%2 = map add %0 %1 : f32[N, M]\nresults %2"),
    (4, "%1 = map select %0 %0 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = reduce sum over [2] %0 : f32[N, M]\nresults %1"),
    (4, "%1 = reduce sum over [1, 0] %0 : f32\nresults %1"),
    (4, "%1 = reduce total over [1] %0 : f32[N]\nresults %1"),
    (4, "%1 = reduce any over [1] %0 : f32[N]\nresults %1"),
    (4, "%1 = view (i0) -> [i0] %0 : f32[N]\nresults %1"),
    (4, "%1 = view (i0, i0) -> [i0, 0] %0 : f32[N, 1]\nresults %1"),
    (4, "%1 = view (N) -> [N, 0] %0 : f32[1]\nresults %1"),
    (4, "%1 = view (i0, i1) -> [i0, 0] %0 : f32[N]\nresults %1"),
    (4, "%1 = view () -> [0, 0] : f32\nresults %1"),
    (4, "%1 = gather (i0) -> [operand 1 at [i0, 0], 0] %0 %0 : f32[N]\nresults %1"),
    (4, IDS + "%2 = gather (i0) -> [0, operand 2 at [i0]] %0 %1 : f32[M]\nresults %2"),
    (4, "%1 = concat along 0 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = concat along 2 %0 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = input y : f32[N, N]\n%2 = concat along 0 %0 %1 : f32[2*N, M]\nresults %2"),
    (4, "%1 = scan max along 0 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = scan sum along 2 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = sort along 2 %0 : f32[N, M], i64[N, M]\nresults %1"),
    (4, IDS + "%2 = scatter min along 0 %0 %1 %0 : f32[N, M]\nresults %2"),
    (4, IDS + "%2 = scatter add along 0 %0 %1 %0 : f32[N, M]\nresults %2"),
    (4, "%1 = scatter add along 0 %0 %0 %0 : f32[N, M]\nresults %1"),
    (4, "%1 = position (i0) -> i0 %0 : i64[N]\nresults %1"),
    (4, IDS + "%2 = contract batch=[] rows=[0] columns=[1] depth=M base=0 row_stride=M panel=16 "
        "%1 %1 : i64[N, N]\nresults %2"),
    (5, "%1 = map exp %0 : f32[M, N]\nresults %1"),
    (5, "%1 = map exp %0 : f64[N, M]\nresults %1"),
    (5, "%1 = map lt %0 %0 : f32[N, M]\nresults %1"),
    (5, "%1 = reduce sum over [1] %0 : f32[M]\nresults %1"),
    (5, "%1 = reduce argmax over [1] %0 : f32[N]\nresults %1"),
    (5, "%1 = reduce max over [1] %0 : f64[N]\nresults %1"),
    (5, "%1 = view (i0) -> [i0, 0] where M - 1 >= 0 else 0.0 %0 : f64[N]\nresults %1"),
    (5, "%1 = concat along 0 %0 %0 : f32[N, M]\nresults %1"),
    (5, "%1 = sort along 1 %0 : f32[N, M]\nresults %1"),
    (5, "%1 = position (i0) -> i0 : f32[N]\nresults %1"),
    (6, "%1 = scalar 0.0 : f32\n%2 = view (i0) -> [] %1 : f32[K]\nresults %2"),
    (6, "%1 = position (i0) -> i1 : i64[N]\nresults %1"),
    (6, "%1 = view (i0) -> [j0, 0] %0 : f32[N]\nresults %1"),
    (7, "%1 = view (i0) -> [i0, 0] %0 : f32[N]\nresults %1"),
    (7, "%1 = view (i0, i1) -> [i0 + 1, i1] %0 : f32[N, M]\nresults %1"),
    (7, "%1 = view (i0, i1) -> [i0 - 1, i1] %0 : f32[N, M]\nresults %1"),
    (7, "%1 = view (i0, i1) -> [i0 - 1, i1] where i0 >= 0 else 0.0 %0 : f32[N, M]\nresults %1"),
    (7, "%1 = view (i0, i1) -> [i1, i0] %0 : f32[N, M]\nresults %1"),
    (7, "%1 = view (i0, i1) -> [63, i1] %0 : f32[N, M]\nresults %1"),
    (7, IDS + "%2 = gather (i0) -> [i0, operand 1 at [i0]] %0 %1 : f32[N]\nresults %2"),
    (7, IDS + "%2 = gather (i0) -> [operand 1 at [i0], i0 + 1] %0 %1 : f32[M]\nresults %2"),
    (8, "%1 = constant x0000 : f32\nresults %1"),
    (8, "%1 = constant x0000803f : f32[N]\nresults %1"),
    (8, "%1 = scalar 1 : f32\nresults %1"),
    (8, "%1 = scalar 1.0 : f32[N]\nresults %1"),
    (8, "%1 = scalar true : i64\nresults %1"),
    (9, "%1 = contract batch=[] rows=[0] columns=[0] depth=M base=0 row_stride=M panel=16 "
        "%0 %0 : f32[N, N]\nresults %1"),
    (9, "%1 = contract batch=[] rows=[0] columns=[1] depth=M base=0 row_stride=M panel=16 "
        "%0 %0 : f32[N, N]\nresults %1"),
    (9, "%1 = input w : f32[(N + 15) // 16, M, 16]\n"
        "%2 = contract batch=[] rows=[0] columns=[1] depth=M base=1 row_stride=M panel=16 "
        "%0 %1 : f32[N, N]\nresults %2"),
    (9, "%1 = input w : f32[(N + 15) // 16, M, 16]\n"
        "%2 = contract batch=[] rows=[0] columns=[1] depth=M base=0 row_stride=M + 1 panel=16 "
        "%0 %1 : f32[N, N]\nresults %2"),
    (10, STEP + "%1 = view (i0) -> [step1, i0] %0 : f32[M]\n"
         "%2 = recurrence of N over step1 carries 0 gathers at [step1] %1 : f32[N, M]\n"
         "%3 = view (i0) -> [step1, i0] %2 : f32[M]\nresults %3"),
    (10, STEP + "%1 = carried 0 over step1 %0 : f32[2, N, M]\n"
         "%2 = recurrence of M over step1 carries 1 gathers at [] %1 %0 : f32[2, N, M]\n"
         "results %2"),
    (10, STEP + "%1 = recurrence of N over step1 carries 0 gathers at [0] %0 : f32[N, N, M]\n"
         "results %1"),
]  # fmt: skip


@pytest.mark.parametrize(("invariant", "text"), FAULTS)
def test_faults_are_found(invariant: int, text: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify_graph(parse_graph(HEAD + text + "\n"))
    assert caught.value.invariant == invariant, caught.value
    assert f"invariant {invariant}: " in str(caught.value)


@pytest.mark.parametrize("shape", ["0", "N, 0", "0, M", "3, 0, M"])
def test_an_axis_without_positions_reads_nothing(shape: str) -> None:
    own = ", ".join(f"i{n}" for n in range(shape.count(",") + 1))
    made = f"%1 = view ({own}) -> [N, 0] %0 : f32[{shape}]\nresults %1\n"
    assert not verify_graph(parse_graph(HEAD + made)).open


def plain() -> Graph:
    lines = ("%1 = map exp %0 : f32[N, M]", "%2 = map neg %1 : f32[N, M]", "results %2")
    return parse_graph(HEAD + "\n".join(lines))


def test_operands_come_first_and_exist() -> None:
    for refs in ((Ref(2),), (Ref(7),), (Ref(0, 1),)):
        with pytest.raises(VerifyError, match="invariant 1"):
            verify_graph(with_node(plain(), 1, operands=refs))
    for ref in (Ref(9), Ref(2, 1), Ref(2, -1)):
        graph = plain()
        graph.results = (ref,)
        with pytest.raises(VerifyError, match="invariant 1"):
            verify_graph(graph)
    graph = plain()
    graph.nodes[3] = graph.nodes.pop(1)
    with pytest.raises(VerifyError, match="invariant 1"):
        verify_graph(graph)


def test_topology_follows_the_operands() -> None:
    for change in ("add_edge", "remove_edge"):
        graph = plain()
        getattr(graph.topology, change)(*((0, 2) if change == "add_edge" else (0, 1)))
        with pytest.raises(VerifyError, match="invariant 2"):
            verify_graph(graph)


def test_uses_are_found_once() -> None:
    graph = plain()
    before = graph.uses()
    assert graph.uses() is before
    last = max(graph.nodes)
    graph.add(Node(last + 1, Map("abs"), (Ref(last),), graph.nodes[last].types))
    assert graph.uses() == {**before, Ref(last): [*before.get(Ref(last), []), last + 1]}


def test_an_error_shows_the_node_and_its_line() -> None:
    source = Source("wrong.pipe", "first\nsecond\n")
    graph = Graph(Facts())
    graph.add(Node(0, Scalar(1), (), (TensorType(F32, ()),), Span(source, 7, 8)))
    with pytest.raises(VerifyError) as caught:
        verify_graph(graph)
    assert str(caught.value).splitlines() == [
        "invariant 8: 1 is not a scalar of f32", "  %0 = scalar 1 : f32  # wrong.pipe:2",
        "  from wrong.pipe:2",
    ]  # fmt: skip


def test_every_primitive_has_a_rule_and_every_invariant_a_fault() -> None:
    import typing

    assert set(RULES) == set(typing.get_args(Primitive))
    stated = [s for s in (graph_verify.__doc__ or "").splitlines() if s[:1].isdigit()]
    assert {int(s.partition(".")[0]) for s in stated} == {1, 2, *(n for n, _ in FAULTS)}
