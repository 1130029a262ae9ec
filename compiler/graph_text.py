"""The dataflow graph as text: printed one node a line, and read back.

    stagefuse graph 1
    dim T in 1..=512
    fact D % 12 == 0
    %0 = input x : f32[T, D]
    %1 = map exp %0 : f32[T, D]  # softmax.pipe:7
    %2 = view (i0, i1) -> [i0, i1 - 1] where i1 - 1 >= 0 else 0.0 %1 : f32[T, D]
    %3 = constant x0000803f : f32
    %4 = constant @9f86d081884c7d65 : f32[512, 384]
    results %2
    data @9f86d081884c7d65 = "..."

A node is `%id = FORM OPERANDS : TYPES`; the form is what the primitive's class declares.
`%5.1` is the second result of node 5. Bytes of a constant are hexadecimal after an `x`; those of a
large one are named by a digest, and its base-85 text may follow at the end. Comments give the
source line. Reading back gives an equal graph, without spans and labels.
"""

from __future__ import annotations

import base64
import hashlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stagefuse.dsl.dims import Expr, IntLike, as_expr
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .errors import IRTextError
from .graph import Graph, Indirect, Node, Primitive, Ref
from .text_form import CODECS, Codec, Form, Reader, form_of, listed, read_type

FIRST_LINE = "stagefuse graph 1"
INLINE_BYTES = 32
"""A constant of more bytes is written as a digest."""


@dataclass
class Tables:
    """What the lines refer to: the bytes of large constants by digest."""

    data: dict[str, bytes] = field(default_factory=dict)


def print_graph(graph: Graph, *, data: bool = False) -> str:
    """The graph's text; with `data` also the bytes of its large constants."""
    tables = Tables()
    lines = [FIRST_LINE, *_facts_lines(graph.facts)]
    lines.extend(print_node(node, tables) for node in graph.nodes.values())
    lines.append(" ".join(["results", *map(print_ref, graph.results)]))
    if data:
        encoded = {name: base64.b85encode(b).decode() for name, b in tables.data.items()}
        # base 85 has no quotation mark and no backslash
        lines.extend(f'data @{name} = "{text}"' for name, text in sorted(encoded.items()))
    return "\n".join(lines) + "\n"


def print_node(node: Node, tables: Tables | None = None) -> str:
    """One node's line."""
    form = form_of(type(node.primitive)).write(node.primitive, tables or Tables())
    types = ", ".join(map(str, node.types))
    text = " ".join([f"%{node.id} =", form, *map(print_ref, node.operands)]) + f" : {types}"
    return text + (f"  # {place_of(node)}" if node.span is not None else "")


def place_of(node: Node) -> str:
    """The source line of a node, or nothing."""
    return "" if node.span is None else f"{node.span.source.name}:{node.span.line}"


def print_ref(ref: Ref) -> str:
    return f"%{ref.node}" if ref.result == 0 else f"%{ref.node}.{ref.result}"


def _facts_lines(facts: Facts) -> list[str]:
    lines = []
    for name, (low, high) in sorted(facts.ranges.items()):
        lines.append(f"dim {name} in {as_expr(low)}..{'' if high is None else f'={as_expr(high)}'}")
    lines.extend(f"fact {as_expr(e)} % {_factor(by)} == 0" for e, by in facts.divisible)
    return lines


def _factor(by: IntLike) -> str:
    text = str(as_expr(by))
    return text if text.isalnum() else f"({text})"


def parse_graph(text: str, data: Mapping[str, bytes] | None = None) -> Graph:
    """The graph that a text describes. Raises IRTextError.

    `data` gives the bytes of large constants by digest, if the text does not.
    """
    return _Parser(text, data or {}).parse()


class _Parser:
    def __init__(self, text: str, data: Mapping[str, bytes]) -> None:
        self.lines = text.splitlines()
        self.tables = Tables(dict(data))
        self.ranges: dict[str, tuple[IntLike, IntLike | None]] = {}
        self.divisible: list[tuple[Expr, IntLike]] = []
        self.nodes: dict[int, Node] = {}
        self.results: tuple[Ref, ...] | None = None

    def parse(self) -> Graph:
        if not self.lines or self.lines[0].strip() != FIRST_LINE:
            raise IRTextError(f"the first line of a graph is `{FIRST_LINE}`", 1)
        readers = [Reader(line, n) for n, line in enumerate(self.lines[1:], 2)]
        readers = [r for r in readers if r.tokens]
        for reader in readers:
            if reader.tokens[0] == "data":
                self._data(reader)
        for reader in readers:
            if reader.tokens[0] != "data":
                self._line(reader)
                reader.end()
        if self.results is None:
            raise IRTextError("a graph ends with a line of `results`", len(self.lines))
        graph = Graph(Facts(self.ranges, tuple(self.divisible)), results=self.results)
        for node in self.nodes.values():
            graph.add(node)
        return graph

    def _line(self, reader: Reader) -> None:
        if reader.accept("dim"):
            self._dim(reader)
        elif reader.accept("fact"):
            self._fact(reader)
        elif reader.accept("results"):
            found = []
            while reader.peek():
                found.append(self._ref(reader))
            self.results = tuple(found)
        else:
            self._node(reader)

    def _data(self, reader: Reader) -> None:
        reader.expect("data")
        name = reader.take()
        reader.expect("=")
        try:
            data = base64.b85decode(reader.take()[1:-1])
        except ValueError:
            reader.fail("the data is not in base 85")
        if name != f"@{digest_of(data)}":
            reader.fail(f"the data is not that of `{name}`")
        self.tables.data[name[1:]] = data

    def _dim(self, reader: Reader) -> None:
        name = reader.name()
        reader.expect("in")
        low, high = reader.expr(), None
        if reader.accept("..="):
            high = reader.expr()
        else:
            reader.expect("..")
        self.ranges[name] = (_int(low), None if high is None else _int(high))

    def _fact(self, reader: Reader) -> None:
        whole = reader.tokens[1:]
        if whole[-3:] != ["=", "=", "0"] or "%" not in whole:
            reader.fail("a fact is `EXPRESSION % NUMBER == 0`")
        split = len(whole) - 1 - whole[::-1].index("%")
        left, right = Reader("", reader.line), Reader("", reader.line)
        left.tokens, right.tokens = whole[:split], whole[split + 1 : -3]
        self.divisible.append((left.expr(), _int(right.expr())))
        left.end()
        right.end()
        reader.at = len(reader.tokens)

    def _ref(self, reader: Reader) -> Ref:
        token = reader.take()
        if not token.startswith("%") or token == "%":
            reader.fail(f"expected a value such as `%1`, found `{token}`")
        number, _, result = token[1:].partition(".")
        ref = Ref(int(number[:20]), int(result[:20] or 0))
        if ref.node not in self.nodes:
            reader.fail(f"`{token}` is not defined above")
        return ref

    def _node(self, reader: Reader) -> None:
        token = reader.take()
        if not token.startswith("%") or not token[1:].isdecimal():
            reader.fail(f"expected a node, dim, fact or results, found `{token}`")
        number = int(token[1:20])
        if number in self.nodes:
            reader.fail(f"`{token}` is defined twice")
        reader.expect("=")
        form = FORMS.get(reader.peek())
        if form is None:
            reader.fail(f"there is no primitive {reader.found()}; there is {', '.join(FORMS)}")
        primitive = form.read(reader, self.tables)
        operands = []
        while reader.peek() != ":":
            operands.append(self._ref(reader))
        reader.expect(":")
        types: list[TensorType] = [read_type(reader)]
        while reader.accept(","):
            types.append(read_type(reader))
        self.nodes[number] = Node(number, primitive, tuple(operands), tuple(types))


def _int(expr: Expr) -> IntLike:
    """A constant as a number, as facts usually have it."""
    value = expr.as_int()
    return expr if value is None else value


def same_graph(a: Graph, b: Graph) -> bool:
    """Whether two graphs are equal but for spans and labels."""

    def facts(graph: Graph) -> list[str]:
        return _facts_lines(graph.facts)

    def nodes(graph: Graph) -> list[Any]:
        return [(n.id, n.primitive, n.operands, n.types) for n in graph.nodes.values()]

    return (facts(a), nodes(a), a.results) == (facts(b), nodes(b), b.results)


def digest_of(data: bytes) -> str:
    """The name of a large constant's bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def _write_bytes(data: bytes, tables: Tables) -> str:
    if len(data) <= INLINE_BYTES:
        return "x" + data.hex()
    tables.data[digest_of(data)] = data
    return f"@{digest_of(data)}"


def _read_bytes(reader: Reader, tables: Tables) -> bytes:
    token = reader.take()
    if token.startswith("@"):
        if token[1:] not in tables.data:
            reader.fail(f"the bytes of `{token}` are not given")
        return tables.data[token[1:]]
    try:
        if token.startswith("x"):
            return bytes.fromhex(token[1:])
    except ValueError:
        pass
    reader.fail(f"expected bytes such as `x0000803f`, found `{token}`")


def _write_index(index: Expr | Indirect, env: Any) -> str:
    return str(index) if isinstance(index, Expr) else form_of(Indirect).write(index, env)


def _read_index(reader: Reader, env: Any) -> Expr | Indirect:
    if reader.peek() != "operand":
        return reader.expr()
    found = form_of(Indirect).read(reader, env)
    assert isinstance(found, Indirect)
    return found


CODECS[bytes] = Codec(_write_bytes, _read_bytes)
CODECS[tuple[Expr | Indirect, ...]] = listed(Codec(_write_index, _read_index))
FORMS: dict[str, Form] = {form_of(p).keyword: form_of(p) for p in typing.get_args(Primitive)}
"""The forms of the primitives, by keyword."""
