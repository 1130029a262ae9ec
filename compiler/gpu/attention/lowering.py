"""Attention for a GPU: a block takes 64 rows of queries and goes once over the keys.

No row of scores is ever whole: sums over the keys so far are corrected when a greater score comes
(Dao, "FlashAttention-2", 2023). What follows the second product is done from a tile in scratch.
"""

from __future__ import annotations

from collections.abc import Mapping

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.matmul.operands import left_of
from stagefuse.compiler.gpu.matmul.persistent import BLOCKS
from stagefuse.compiler.gpu.matmul.tile_widths import best_of
from stagefuse.compiler.graph import Graph, Ref, View
from stagefuse.compiler.kernel_ir import (
    COMPUTED,
    Alloc,
    Attend,
    Const,
    Index,
    Load,
    Local,
    Op,
    Operand,
    Store,
    Value,
)
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.product import Product, product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.attention import Softmax
from stagefuse.compiler.patterns.steps import steps_of
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, F32, I64
from stagefuse.dsl.frozen import frozen

from .blocks import rows_of_block
from .forms import forms_of
from .masks import kept
from .warpgroup_tiles import takes_groups

PADDING = 4
"""Elements between the rows of a tile, so that eight rows lie in different banks."""


@frozen
class Attention:
    """The parts of a group: two products, what lies between, and where operands lie, over the
    indices of the batch. `half`: operands are multiplied in 16 bits. Keys and values that the group
    computes lie nowhere."""

    low: Lowering
    first: Product
    last: Product
    rows: Group
    softmax: Softmax
    queries: Operand
    keys_at: Operand
    values_at: Operand
    half: bool
    depth: int
    columns: int

    @property
    def keys(self) -> Expr:
        return self.last.depth

    def weights(self, place: list[Expr], most: Expr, row: str = "r") -> tuple[Value, Value]:
        """The score and whether it is kept, at a place over `row`, at most so great, and key j."""
        low, softmax = self.low, self.softmax
        before = low.facts
        low.facts = before.with_ranges({row: (0, most), "j": (0, self.keys - 1)})
        at = tuple(map(Index, place))
        low.keeps_f32 = True
        with low.part(self.rows, {self.first.ref: lambda _: Local("raw", F32)}):
            score = low.value(softmax.score, at, ())
            always = Const(True, BOOL)
            keep = always if softmax.keep is None else low.value(softmax.keep, at, ())
        low.facts = before
        return score, keep

    def elements(
        self, place: Mapping[str, Expr], begin: Expr, columns: int
    ) -> tuple[Value | None, Value | None]:
        """Elements of keys and of values, where those are computed, at the key j and the feature
        f, of values the f-th of some from `begin` on, with indices of the batch at a place."""
        key, feature = sym("j"), sym("f")
        own = begin + feature
        return (
            self._element(self.keys_at, self.first, (feature, key), self.depth, place),
            self._element(self.values_at, self.last, (key, own), columns, place),
        )

    def _element(
        self, at: Operand, p: Product, inner: tuple[Expr, Expr], extent: int,
        place: Mapping[str, Expr],
    ) -> Value | None:  # fmt: skip
        low = self.low
        if at != COMPUTED:
            return None
        source, view = packed_from(low.graph, p.operands[1], self.half)
        names = [place.get(n, sym(n)) for n, _ in p.batch]
        here = dict(zip(view.symbols[-3:], (const(0), *inner), strict=True))
        here.update(zip(view.symbols, names, strict=False))
        low.facts = (before := low.facts).with_ranges(
            {"j": (0, self.keys - 1), "f": (0, extent - 1)}
        )
        where = tuple(Index(e.substitute(here, low.facts)) for e in view.indices)
        with low.elsewhere():
            value = low.value(source, where, ())
        low.facts = before
        if self.half and isinstance(value, Op) and value.fn == "round_to":
            if value.to == low.graph.type(source).dtype:  # which shared memory has it in
                (value,) = value.args
        return value

    def factor(self, total: Value, row: Expr) -> Value:
        """What the weighted sums of a row are multiplied by: a quotient for each of them would
        take longer than all else that follows the last key."""
        low, softmax = self.low, self.softmax
        place = tuple(map(Index, self.first.place(low, row, const(0))))
        with low.part(self.rows, {softmax.total: lambda _: total}):
            norm = low.value(softmax.norm, place, ())
        return norm if softmax.by == "mul" else Op("div", (Const(1.0, F32), norm), F32)

    def finish(self, own: Value, factor: Value, row: Expr, column: Expr) -> None:
        """Stores an element of the result whose weighted sum is `own`, with what follows."""
        low = self.low
        value: Value = Op("mul", (own, factor), F32)
        if not low.facts.is_positive(self.keys):  # of no keys the sum is 0, whatever divides it
            some = Op("gt", (Index(self.keys), Const(0, I64)), BOOL)
            value = Op("select", (some, value, Const(0.0, F32)), F32)
        with low.part(low.group, {self.last.ref: lambda _: value}):
            low.store(self.last.place(low, row, column))


def attention_of(low: Lowering) -> Attention:
    """The parts of a lowering's group."""
    group, rows, softmax = low.group, low.group.rows, low.group.softmax
    assert rows is not None and softmax is not None
    first, last = product_of_group(low, rows.anchor), product_of_group(low, group.anchor)
    depth, columns = first.depth.as_int(), last.columns.as_int()
    assert depth is not None and columns is not None
    half = first.operands[0] in group.packs
    q = left_of(low, first)
    low.keeps_f32 = True
    return Attention(
        low, first, last, rows, softmax, Operand(q.name, q.start, q.step, const(1)),
        panels_of(low, first, half), panels_of(low, last, half), half, depth, columns,
    )  # fmt: skip


def suits_groups(low: Lowering) -> bool:
    """Whether Hopper's warpgroups can multiply a group's operands. `low` is only asked."""
    a = attention_of(low)
    operands = (a.queries, a.keys_at, a.values_at)
    return a.half and takes_groups(operands, a.depth, a.columns, a.first.batch, low.facts)


def heights(low: Lowering) -> list[tuple[int, Expr]]:
    """The rows that a block of warpgroups may have, each with a factor that is 1 for the sizes
    where its blocks take least, else 0. `low` is only asked."""
    a = attention_of(low)
    score, keep = a.weights(a.first.place(low, sym("r"), sym("j")), const(0))
    forms = forms_of(a.depth, a.columns, (score, keep))
    if kept(keep, "r", "j").conditions:  # low tiles keep less that is masked: 0.85 to 1.02 of time
        forms = forms[-1:]
    tiles = {f: floordiv(a.first.rows + (f.rows - 1), f.rows, low.facts) for f in forms}
    times: dict[int, Expr] = {}
    for form, count in tiles.items():
        for _, extent in a.first.batch:
            count = count * extent
        times[form.rows] = floordiv(count + (BLOCKS - 1), BLOCKS, low.facts) * form.time
    return best_of(times, low.facts)


def lower_attention(low: Lowering, rows: int | None = None) -> Parallel:
    """Blocks of rows: attended, then stored with what follows. `rows`: of a block of warpgroups."""
    a = attention_of(low)
    first = a.first
    most = rows or rows_of_block(a.depth, a.columns, 2 if a.half else 4)
    blocks = floordiv(first.rows + (most - 1), most, low.facts)
    parallel = [*first.batch, ("mb", blocks)]
    low.bind(parallel)
    block = sym("mb")
    if a.softmax.keep is not None:  # the last rows first, as they may keep the most keys
        block = blocks - 1 - block
    start = block * most
    count = minimum(first.rows - start, const(most))
    totals, tile = low.name("totals"), low.name("tile")
    pitch = const(-(-a.columns // 8) * 8 + PADDING)
    low.emit(Alloc(tile, F32, (const(most), pitch)))  # first, where it is aligned most
    low.emit(Alloc(totals, F32, (const(most),)))
    score, keep = a.weights(first.place(low, start + sym("r"), sym("j")), count - 1)
    lo, hi = kept(keep, "r", "j").ends(most, a.keys)
    q = a.queries
    queries = Operand(q.buffer, q.offset + start * q.along, q.along, q.across)
    low.emit(
        Attend(
            tile, pitch, totals, queries, a.keys_at, a.values_at, count, most, lo, hi, a.depth,
            a.columns, "r", "j", "raw", score, keep, extent=a.keys,
        )
    )  # fmt: skip

    total = Load(totals, (Index(sym("r")),), F32)

    def factor() -> None:
        value = a.factor(total, start + sym("r"))
        low.emit(Store(totals, (Index(sym("r")),), value))

    def element() -> None:
        own = Load(tile, (Index(sym("r")), Index(sym("c"))), F32)
        a.finish(own, total, start + sym("r"), sym("c"))

    def row() -> None:
        low.facts = low.facts.with_ranges({"r": (0, most - 1)})
        low.loop("c", const(0), const(a.columns), element, vector=True)

    low.loop("r", const(0), count, factor, vector=True)
    low.loop("r", const(0), count, row, vector=True)
    return parallel, a.keys * (most * (a.depth + a.columns))


def packed_from(graph: Graph, panels: Ref, half: bool) -> tuple[Ref, View]:
    """What panels are packed from, before its conversion if there is one, and how."""
    node = graph.nodes[panels.node]
    (source,) = node.operands
    if half:
        (source,) = graph.nodes[source.node].operands
    assert isinstance(node.primitive, View)
    return source, node.primitive


def panels_of(low: Lowering, p: Product, half: bool) -> Operand:
    """The right operand of a product where it lies: in steps, or in packed panels. `half`: as it
    is before it is converted."""
    ref = p.operands[1]
    made = {root for maker in low.group.apart[:-1] for root in maker.roots}
    if ref in made:
        return COMPUTED
    if ref not in low.group.packs:
        whole = p.depth * p.panel
        name = low.buffer(ref, "in").name
        return Operand(
            name, p.lead * p.panels * whole, const(p.panel), const(1), p.panel, whole
        )  # fmt: skip
    source, view = packed_from(low.graph, ref, half)
    if source in made:
        return COMPUTED
    steps = steps_of(low.graph, ref, low.graph.nodes[p.ref.node])
    assert steps is not None
    lead = dict(zip(view.symbols, (sym(n) for n, _ in p.batch), strict=False))
    first, along, across = (e.substitute(lead) for e in steps)
    return Operand(low.buffer(source, "in").name, first, along, across)
