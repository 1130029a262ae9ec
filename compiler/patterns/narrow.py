"""Weights stored in fewer bits than they are used in, and who can convert them while reading."""

from __future__ import annotations

from collections.abc import Container

from stagefuse.compiler.graph import Contract, Graph, Map, Node, Ref, Scalar, View
from stagefuse.dsl.dtypes import BF16, F16

from .byte_operands import codes_of, stored_for
from .steps import lies_in_chunks

LARGE = 1 << 16
"""Elements of a weight from which on its bytes matter."""
SMALL = 1 << 8
"""The same where a product can multiply by it as it is stored."""
SIMPLE = ("cast", "mul", "add", "sub")
"""What dequantisation is made of."""


def has_narrow(graph: Graph) -> bool:
    """Whether a graph has a tensor stored in so few bits that readers may convert it."""
    return any(
        not node.operands
        and _is_narrow(graph, Ref(node.id), SMALL if node.type.dtype in (F16, BF16) else LARGE)
        for node in graph.nodes.values()
    )


def widened(graph: Graph, known: set[int], kept: Container[Ref]) -> set[int]:
    """Of the constant nodes, those that widen large narrow tensors for readers that can do so
    themselves: reductions, and products whose other operand is as narrow; those of 8 bits, however
    small. Of those that can be `kept` as codes only what is stored as readers take it."""
    uses = graph.uses()
    found: set[int] = set()
    for number in known:
        readers = [u for u in uses.get(Ref(number), ()) if u not in known]
        if not readers or Ref(number) in graph.results:
            continue
        if Ref(number) in kept and not _is_stored(graph, stored_for(graph, Ref(number))):
            continue
        bytes_ = all(codes_of(graph, graph.nodes[u]) is not None for u in readers)
        small = all(_is_stored_so(graph, graph.nodes[u]) for u in readers)
        chain = _chain(graph, number, 0 if bytes_ else SMALL if small else LARGE)
        if chain and all(_converts(graph, graph.nodes[u]) for u in readers):
            found |= chain
    return found


def _is_stored(graph: Graph, ref: Ref) -> bool:
    """Whether a value is a stored tensor, or a view of one."""
    node = graph.nodes[ref.node]
    while isinstance(node.primitive, View):
        node = graph.nodes[node.operands[0].node]
    return not node.operands


def _is_stored_so(graph: Graph, reader: Node) -> bool:
    """Whether a node is a product whose right operand can be read in whole chunks."""
    return isinstance(reader.primitive, Contract) and lies_in_chunks(graph, reader)


def _is_narrow(graph: Graph, ref: Ref, least: int) -> bool:
    type = graph.type(ref)
    count = 1
    for size in type.shape:
        count *= size.as_int() or 0
    return not type.dtype.is_bool and type.dtype.bits <= 16 and count >= least


def _rounds(graph: Graph, node: Node) -> bool:
    """Whether a node converts to fewer bits, 16 at most."""
    if not isinstance(node.primitive, Map) or node.primitive.fn != "cast":
        return False
    return graph.type(node.operands[0]).dtype.bits > max(node.type.dtype.bits, 16)


def _chain(graph: Graph, number: int, least: int) -> set[int]:
    """The nodes that make a wide value of one narrow tensor of so many elements, or of what is
    rounded to one, its scales and offsets; none if they do something else."""
    wide = graph.nodes[number].type.dtype.bits
    chain, narrow, pending = set[int](), 0, [number]
    while pending:
        node = graph.nodes[pending.pop()]
        if node.id in chain or isinstance(node.primitive, Scalar):
            continue
        rounds = _rounds(graph, node)  # to what is stored then
        if rounds or not node.operands:
            narrow += _is_narrow(graph, Ref(node.id), least)
            continue
        plain = isinstance(node.primitive, Map) and node.primitive.fn in SIMPLE
        if not plain and not isinstance(node.primitive, View):
            return set()
        if node.type.dtype.bits == wide:
            chain.add(node.id)
        pending += [ref.node for ref in node.operands]
    return chain if narrow == 1 and wide > 16 else set()


def _converts(graph: Graph, reader: Node) -> bool:
    """Whether a node that reads a widened weight can read the stored one."""
    if isinstance(reader.primitive, Map):
        return True
    if not isinstance(reader.primitive, Contract):
        return False
    stored = {graph.type(stored_for(graph, operand)).dtype for operand in reader.operands}
    return len(stored) == 1 and stored <= {F16, BF16} or codes_of(graph, reader) is not None
