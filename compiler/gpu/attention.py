"""Attention for a GPU: a block takes 64 rows of queries and goes once over the keys.

No row of scores is ever whole: sums over the keys so far are corrected when a greater score comes
(Dao, "FlashAttention-2", 2023). What follows the second product is done from a tile in scratch.
"""

from __future__ import annotations

from stagefuse.compiler.graph import View
from stagefuse.compiler.join import steps_of
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Attend,
    Const,
    Index,
    Load,
    Local,
    Op,
    Operand,
    Value,
)
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.products import _Product as Product
from stagefuse.compiler.lower.products import _product as product_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, F32, I64

from .attend_shape import rows_of_block
from .contract import left_of
from .kept import kept

PADDING = 4
"""Elements between the rows of a tile, so that eight rows lie in different banks."""


def lower_attention(low: Lowering) -> Parallel:
    """Blocks of rows: attended, then stored with what follows."""
    group, rows, softmax = low.group, low.group.rows, low.group.softmax
    assert rows is not None and softmax is not None
    first, last = product_of(low, rows.anchor), product_of(low, group.anchor)
    depth, columns, keys = first.depth.as_int(), last.columns.as_int(), last.depth
    assert depth is not None and columns is not None
    half = first.operands[0] in group.packs
    most = rows_of_block(depth, columns, 2 if half else 4)
    blocks = floordiv(first.rows + (most - 1), most, low.facts)
    parallel = [*first.batch, ("mb", blocks)]
    low.bind(parallel)
    start = sym("mb") * most
    count = minimum(first.rows - start, const(most))
    totals, tile = low.name("totals"), low.name("tile")
    pitch = const(-(-columns // 8) * 8 + PADDING)
    low.emit(Alloc(totals, F32, (const(most),)))
    low.emit(Alloc(tile, F32, (const(most), pitch)))
    row, key = sym("r"), sym("j")
    before = low.facts
    low.facts = before.with_ranges({"r": (0, count - 1), "j": (0, keys - 1)})
    at = tuple(map(Index, first.place(low, start + row, key)))
    low.keeps_f32 = True
    with low.part(rows, {first.ref: lambda _: Local("raw", F32)}):
        score = low.value(softmax.score, at, ())
        always = Const(True, BOOL)
        keep = always if softmax.keep is None else low.value(softmax.keep, at, ())
    low.facts = before
    lo, hi = kept(keep, "r", "j").ends(most, keys)
    q = left_of(low, first)
    queries = Operand(q.name, q.start + start * q.step, q.step, const(1))
    keys_at, values_at = panels_of(low, first, half), panels_of(low, last, half)
    low.emit(
        Attend(
            tile, pitch, totals, queries, keys_at, values_at, count, most, lo, hi, depth, columns,
            "r", "j", "raw", score, keep,
        )
    )  # fmt: skip
    zero = Const(0.0, F32)

    def norm(row: Expr) -> Value:
        total = Load(totals, (Index(row),), F32)
        place = tuple(map(Index, first.place(low, start + row, const(0))))
        with low.part(rows, {softmax.total: lambda _: total}):
            return low.value(softmax.norm, place, ())

    def element() -> None:
        here = Load(tile, (Index(sym("r")), Index(sym("c"))), F32)
        value: Value = Op(softmax.by, (here, norm(sym("r"))), F32)
        if not low.facts.is_positive(keys):  # of no keys the sum is 0, whatever it is divided by
            value = Op("select", (Op("gt", (Index(keys), Const(0, I64)), BOOL), value, zero), F32)
        with low.part(group, {last.ref: lambda _: value}):
            low.store(last.place(low, start + sym("r"), sym("c")))

    def finish() -> None:
        low.facts = low.facts.with_ranges({"r": (0, most - 1)})
        low.loop("c", const(0), const(columns), element, vector=True)

    low.loop("r", const(0), count, finish, vector=True)
    return parallel, keys * (most * (depth + columns))


def panels_of(low: Lowering, p: Product, half: bool) -> Operand:
    """The right operand of a product where it lies: in steps, or in packed panels. `half`: as it
    is before it is converted."""
    ref = p.operands[1]
    if ref not in low.group.packs:
        whole = p.depth * p.panel
        name = low.buffer(ref, "in").name
        return Operand(
            name, p.lead * p.panels * whole, const(p.panel), const(1), p.panel, whole
        )  # fmt: skip
    node = low.graph.nodes[ref.node]
    (source,) = node.operands
    if half:
        (source,) = low.graph.nodes[source.node].operands
    steps = steps_of(low.graph, ref, low.graph.nodes[p.ref.node])
    assert steps is not None and isinstance(node.primitive, View)
    lead = dict(zip(node.primitive.symbols, (sym(n) for n, _ in p.batch), strict=False))
    first, along, across = (e.substitute(lead) for e in steps)
    return Operand(low.buffer(source, "in").name, first, along, across)
