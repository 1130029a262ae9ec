"""Operands of products that are stored in 8 bits, and converted by nothing but the product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagefuse.compiler.graph import Contract, Graph, Map, Node, Ref, View
from stagefuse.dsl.dtypes import DType


def is_byte(dtype: DType) -> bool:
    """Whether tensor cores multiply elements of a dtype of 8 bits."""
    return dtype.bits == 8 and not dtype.is_bool


def codes_of(graph: Graph, product: Node) -> tuple[Ref, Ref] | None:
    """The 8-bit tensors whose converted elements a product multiplies, if both operands are."""
    if not isinstance(product.primitive, Contract):
        return None
    left, right = (stored_for(graph, ref) for ref in product.operands)
    both = all(is_byte(graph.type(ref).dtype) for ref in (left, right))
    return (left, right) if both else None


def is_code(graph: Graph, uses: Mapping[Ref, Sequence[int]], number: int, user: int) -> bool:
    """Whether a user of a node converts it for a product that reads it as it is, in 8 bits, or
    puts its elements in order for that."""
    if not is_byte(graph.nodes[number].type.dtype):
        return False
    primitive, own = graph.nodes[user].primitive, uses.get(Ref(user), ())
    if isinstance(primitive, View):
        return any(
            graph.nodes[n].primitive == Map("cast") and is_code(graph, uses, user, n) for n in own
        )
    if primitive != Map("cast"):
        return False
    readers = [graph.nodes[n] for n in own]
    views = [r for r in readers if isinstance(r.primitive, View)]
    readers += [graph.nodes[n] for view in views for n in uses.get(Ref(view.id), ())]
    return any(codes_of(graph, reader) is not None for reader in readers)


def stored_for(graph: Graph, ref: Ref) -> Ref:
    """What an operand of a product is cast from, through views; else what they look at."""
    node = graph.nodes[ref.node]
    if isinstance(node.primitive, View):
        return stored_for(graph, node.operands[0])
    return node.operands[0] if node.primitive == Map("cast") else ref
