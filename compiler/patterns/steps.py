"""Right operands of products that are elements of a tensor in steps, and so need no packing."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.graph import Contract, Graph, Node, Ref, View, flatten_index
from stagefuse.dsl.dims import Expr, const, sym

CHUNK = 8
"""Elements of 16 bits that are copied at a time."""
BYTES = 16
"""The same of 8 bits."""


def steps_of(graph: Graph, panels: Ref, product: Node) -> tuple[Expr, Expr, Expr] | None:
    """Where a view that packs panels finds its elements in its operand, over the view's own
    symbols of the batch: the first one, and the steps along the depth and along the columns;
    None if they do not lie in steps."""
    node = graph.nodes[panels.node]
    if not isinstance(node.primitive, View):
        return None
    offset = flatten_index(node.primitive.indices, graph.type(node.operands[0]).shape)
    return steps_in(graph, panels, product, offset)


def steps_in(
    graph: Graph, panels: Ref, product: Node, offset: Expr
) -> tuple[Expr, Expr, Expr] | None:
    """The same of a view whose elements lie at an offset over its symbols."""
    node = graph.nodes[panels.node]
    view, contract = node.primitive, product.primitive
    if not isinstance(view, View) or not isinstance(contract, Contract):
        return None
    panel, k, column = view.symbols[-3:]
    width = node.type.shape[-1]
    columns = count_of([product.type.shape[a] for a in contract.columns])
    single = node.type.shape[-3].as_int() == 1
    place = sym(column) if single else sym(panel) * width + sym(column)
    if any(guard != columns - 1 - place for guard in view.guard):
        return None  # it pads by more than the panels' tail
    along, across = offset.coefficient(k), offset.coefficient(column)
    step = const(0) if single else offset.coefficient(panel)
    if along is None or across is None or step is None:
        return None
    if not single and step != across * width:
        return None
    inner = {panel, k, column}
    first = offset.substitute({name: 0 for name in inner})
    if (first.symbols() | along.symbols() | across.symbols()) & inner:
        return None
    return first, along, across


def lines_of(graph: Graph, product: Node) -> tuple[Expr, Expr, Expr] | None:
    """The same of a right operand whose rows or columns are adjacent, in the dtype of the panels;
    of 8 bits, whose rows are. None of others."""
    panels = product.operands[1]
    steps, node = steps_of(graph, panels, product), graph.nodes[panels.node]
    stored = graph.type(panels).dtype
    if steps is None or const(1) not in steps[2 if stored.bits == 8 else 1 :]:
        return None
    return steps if graph.type(node.operands[0]).dtype == stored else None


def lies_in_chunks(graph: Graph, product: Node, chunk: int = CHUNK) -> bool:
    """Whether 16 bytes of a right operand are adjacent and aligned, in steps; elements are of 16
    bits, or 16 in a chunk, which then must lie along the depth."""
    contract, steps = product.primitive, steps_of(graph, product.operands[1], product)
    assert isinstance(contract, Contract)
    if steps is None or const(1) not in (steps[1:] if chunk == CHUNK else steps[1:2]):
        return False
    first, along, across = steps
    ends = [first, across if along == const(1) else along]
    if along != const(1):
        ends.append(count_of([product.type.shape[a] for a in contract.columns]))
    return all(graph.facts.divides(e, chunk) for e in ends)


def count_of(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total
