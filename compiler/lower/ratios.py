"""Quotients by a constant or by a number of the elements' row, as products with its reciprocal.

Dividing takes a GPU some ten instructions and a branch. Of a divisor that many elements
share the reciprocal is found once, as two numbers, and an element takes two instructions. That
needs a reciprocal which both numbers can hold: where it is not proved, elements are divided.
"""

from __future__ import annotations

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Graph, Map, Node, View
from stagefuse.compiler.patterns.softmax import number
from stagefuse.compiler.proofs.float_ranges import float_range
from stagefuse.dsl.dtypes import F32

LEAST, MOST = 2.0**-100, 2.0**125
"""Sizes of the divisor at which the reciprocal and what it is rounded by are numbers of f32, from
2^100 on with fewer digits of the second."""


def is_ratio(graph: Graph, group: Group, node: Node) -> bool:
    """Whether a node divides by a constant, or the elements of a kernel's rows by what each row has
    one of, of a fair size."""
    if node.primitive != Map("div") or node.type.dtype.compute != F32:
        return False
    divisor = node.operands[1]
    known = number(graph, divisor)
    if known is not None or not group.row_axes:
        return known is not None and LEAST <= known <= MOST
    spread = graph.nodes[divisor.node].primitive
    if not isinstance(spread, View) or spread.guard or len(spread.symbols) != node.type.rank:
        return False
    used = {name for index in spread.indices for name in index.symbols()}
    if node.type.shape != group.domain or used & {spread.symbols[a] for a in group.row_axes}:
        return False
    low, high = float_range(graph, divisor)
    return low >= LEAST and high <= MOST
