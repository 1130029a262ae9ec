"""Products of 16-bit operands, for GPUs, of which one does not lie in aligned pieces of 16 bytes.

Copies to shared memory move 16 bytes. An operand whose rows do not begin at multiples of them is
stored so first, along the depth and with zeros behind it, in its own 16 bits: constants while
compiling, others by a kernel. Else the product would be one of f32, of twice the bytes and three
times the multiplications.
"""

from __future__ import annotations

from stagefuse.compiler.graph import Graph, Map, Node, Reduce, Ref, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import BF16, F16, F32

from .byte_products import panels_of
from .contract import Sums, cast_of, through
from .operand_matrices import in_place, packed, rows_of, total_of
from .panel_width import panel_width
from .steps import CHUNK

HALVES = (F16, BF16)


def has_halves(graph: Graph) -> bool:
    """Whether a graph may have products of 16-bit operands."""
    nodes = graph.nodes.values()
    return any(t.dtype in HALVES for node in nodes for t in node.types) and any(
        isinstance(node.primitive, Reduce) and node.primitive.kind == "sum" for node in nodes
    )


def product_of_halves(b: Builder, node: Node, s: Sums) -> Ref | None:
    """The sums as a product of 16-bit operands that are brought into order first, if one has to
    be."""
    if node.type.dtype not in (*HALVES, F32) or not s.rows:
        return None
    u, v = _half(b, s.left), _half(b, s.right)
    if u is None or v is None or b.type(u).dtype != b.type(v).dtype:
        return None
    left = in_place(b, u, s.domain, s.batch, s.rows, s.depth)
    turned = in_place(b, u, s.domain, s.batch, s.depth, s.rows)
    right = in_place(b, v, s.domain, s.batch, s.columns, s.depth)
    across = in_place(b, v, s.domain, s.batch, s.depth, s.columns)
    if not (left or turned) or not (right or across):
        return None
    rows, deep, columns = (total_of(s.domain, x) for x in (s.rows, s.depth, s.columns))
    as_turned = turned is not None and left is None and _is_aligned(b, *turned[1:], rows)
    fits = [
        _is_aligned(b, *left[1:]) if left else as_turned or _is_aligned(b, deep),
        _is_aligned(b, *right[1:]) if right else _is_aligned(b, *(across or ())[1:], columns),
    ]
    if all(fits):
        return None
    lines = [rows_of(b, x, s.domain, s.batch, outer, s.depth, CHUNK)
             for x, outer in ((u, s.rows), (v, s.columns))]  # fmt: skip
    a, base, row = left if left and fits[0] else lines[0]
    if as_turned:  # read where it lies, whatever the depth
        a, base, row = rows_of(b, u, s.domain, s.batch, s.rows, s.depth)
    width = panel_width(columns)
    if fits[1]:
        panels = packed(b, cast_of(b, v, F32), s.domain, s.batch, s.columns, s.depth, width)
    else:
        panels = panels_of(b, b.cast(lines[1][0], F32), s, width)
    type = node.type.with_dtype(F32)
    (product,) = b.add(s.contract(base, row, width), (b.cast(a, F32), panels), (type,))
    return b.result(product, node.type.dtype)


def _half(b: Builder, ref: Ref) -> Ref | None:
    """A factor in the 16 bits that it is converted from, if it is."""
    node = b.graph.nodes[ref.node]
    if node.type.dtype in HALVES:
        return ref
    if isinstance(node.primitive, View) and not node.primitive.guard:
        inner = _half(b, node.operands[0])
        return None if inner is None else through(b, node, inner)
    if node.primitive == Map("cast") and b.type(node.operands[0]).dtype in HALVES:
        return node.operands[0]
    return None


def _is_aligned(b: Builder, *places: Expr) -> bool:
    return all(b.facts.divides(e, CHUNK) for e in places if e != const(0))
