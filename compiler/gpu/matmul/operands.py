"""Where the operands of a product lie that is lowered for GPUs, and how a kernel reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_narrow import is_coded
from stagefuse.compiler.graph import Gather, Graph, Ref, View
from stagefuse.compiler.kernel_ir import Index, Op, TileProduct, Value
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.product import Depth, Product
from stagefuse.compiler.lower.products import stored_panels
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.chosen import (
    Position,
    chooses,
    chosen_matrices,
    chosen_rows,
    steps_taken,
)
from stagefuse.compiler.patterns.gathered import Gathered, Turned, gathered_of, turned_of
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .few_rows import MOST_ROWS
from .mma import NAMES, Kind, kind_of
from .window_rows import Windows


@frozen
class Left:
    """The left operand in a buffer: row i begins at `start` + i * `step`, and its elements are
    `along` apart; or its element of row i and depth k is at `indices`, 0 unless every `guard` is at
    least 0."""

    name: str
    start: Expr
    step: Expr
    indices: tuple[Expr, ...] = ()
    guard: tuple[Expr, ...] = ()
    chosen: tuple[str, ...] = ()
    positions: Callable[[Expr], tuple[Value, ...]] | None = None
    """What the names `chosen` in indices stand for in a row."""
    along: Expr = field(default_factory=lambda: const(1))

    def rows(self, s: TileProduct, start: Expr, begin: Expr) -> TileProduct:
        """A product of the rows from `start` on, and of the depth from `begin` on."""
        if not self.indices:
            place = self.start + start * self.step + begin * self.along
            return replace(s, a_offset=place, a_row=self.step, a_col=self.along)
        here = {"i": start + sym("i"), "k": begin + sym("k")}
        indices, guard = (tuple(e.substitute(here) for e in x) for x in (self.indices, self.guard))
        if self.positions is None:
            return replace(s, a_indices=indices, a_guard=guard)
        positions = (*s.positions, *self.positions(here["i"]))
        chosen = (*s.chosen, *self.chosen)
        return replace(s, a_indices=indices, a_guard=guard, chosen=chosen, positions=positions)


def multiply(
    low: Lowering,
    p: Product,
    target: tuple[str, Expr, Expr],
    left: Left,
    start: Expr,
    count: Expr,
    piece: Depth | None = None,
) -> None:
    """The product of `count` rows from `start` by the panel p, into (name, offset, row)."""
    ref, zero = p.operands[1], const(0)
    piece = piece or p.all_of_it
    name, offset, row = target
    product = TileProduct(
        name, offset, row, left.name, zero, zero, const(1), "", zero, count, piece.length,
        p.row_tile, p.panel, False, p.width(sym("p")),
    )  # fmt: skip
    product = left.rows(product, start, piece.begin)
    if ref not in low.group.packs:
        panels = stored_panels(low, p)
        first = (panels.first + sym("p")) * p.depth * p.panel + piece.begin * p.panel
        return low.emit(replace(product, panel=panels.name, panel_offset=first))
    if holds_codes(low.graph, low.group, p.ref.node):
        element = _element_of(low, p, piece)
        return low.emit(replace(product, element=element, k="k", c="c"))
    first, along, across = right_of(low, p)
    source = low.buffer(stored_of(low.graph, low.group, ref), "in")
    first = first + sym("p") * p.panel * across + piece.begin * along
    matrices = matrices_chosen(low, p)
    chosen = (*product.chosen, *(name for name, _, _ in matrices))
    positions = (*product.positions, *(value for _, _, value in matrices))
    low.emit(
        replace(
            product, panel=source.name, panel_offset=first, panel_row=along, panel_col=across,
            chosen=chosen, positions=positions,
        )
    )  # fmt: skip


def stored_of(graph: Graph, group: Group, ref: Ref) -> Ref:
    """What a product reads in place of an operand."""
    if ref not in group.packs:
        return ref
    chosen, node = chooses(graph, group, ref), graph.nodes[ref.node]
    if isinstance(node.primitive, View):
        (ref,) = node.operands
        node = graph.nodes[ref.node]
    # a member of the kernel is not stored: it converts what is
    if ref.node in group.members and not isinstance(node.primitive, Gather):
        (ref,) = node.operands
        node = graph.nodes[ref.node]
        if isinstance(node.primitive, View) and ref.node in group.members:
            return node.operands[0]  # turned, and then converted
    return node.operands[0] if chosen else ref


def _element_of(low: Lowering, p: Product, piece: Depth) -> Value:
    """An element of the panel p that is computed, at row `k` of a stretch and column `c`."""
    ref, before = p.operands[1], low.facts
    low.facts = before.with_ranges({"k": (0, piece.length - 1), "c": (0, p.panel - 1)})
    lead = [*(sym(n) for n, _ in p.batch), sym("p")]
    with low.part(low.group.packs[ref], {}):
        value = low.value(ref, tuple(map(Index, (*lead, piece.begin + sym("k"), sym("c")))), ())
    low.facts = before
    narrow = operands_of(low.graph, low.group) is not None and p.row_tile > MOST_ROWS
    if isinstance(value, Op) and value.fn == "round_to" and narrow:
        (value,) = value.args  # tiles are stored in the 16 bits of the rows
    return as_dtype(value, p.dtype)


def right_of(low: Lowering, p: Product) -> tuple[Expr, Expr, Expr]:
    """Where the right operand's elements lie, which are in steps: the first one of the batch at
    hand, and the steps along the depth and along the columns."""
    steps = steps_taken(low.graph, low.group, low.graph.nodes[p.ref.node])
    assert steps is not None
    first, along, across = (e.substitute(_batch_of(low, p)) for e in steps)
    return first, along, across


def _batch_of(low: Lowering, p: Product) -> dict[str, Expr]:
    """The batch at hand by the symbols of the view that packs a product's panels."""
    view = low.graph.nodes[p.operands[1].node].primitive
    assert isinstance(view, View)
    return dict(zip(view.symbols, (sym(n) for n, _ in p.batch), strict=False))


def matrices_chosen(low: Lowering, p: Product) -> list[tuple[str, Expr, Value]]:
    """The names in where the right operand lies that stand for positions from data, with the
    extents of their axes and the positions in the batch at hand."""
    product, ref = low.graph.nodes[p.ref.node], p.operands[1]
    found = chosen_matrices(low.graph, product) if chooses(low.graph, low.group, ref) else None
    if found is None:
        return []
    values = _read(low, ref, found.positions, _batch_of(low, p))
    return [(x.name, x.extent, value) for x, value in zip(found.positions, values, strict=True)]


def _read(
    low: Lowering, operand: Ref, positions: Sequence[Position], here: dict[str, Expr]
) -> tuple[Value, ...]:
    """The positions by which an operand is chosen, at indices of the product."""
    at = {name: Index(e) for name, e in here.items()}
    with low.part(low.group.packs[operand], {}):
        return tuple(low.checked(low.graph.nodes[x.node], x.read, x.extent, at) for x in positions)


def moves_in_chunks(low: Lowering, p: Product) -> bool:
    """Whether panels are packed, or lie so that 16 bytes of them are adjacent and aligned."""
    ref = p.operands[1]
    if ref not in low.group.packs or is_coded(low.graph, ref):
        return True
    steps = steps_taken(low.graph, low.group, low.graph.nodes[p.ref.node])
    assert steps is not None
    first, along, across = steps
    if along != const(1) and across != const(1):
        return False
    ends = [first, across if along == const(1) else along]
    if along != const(1):
        ends.append(p.columns)
    return all(low.graph.facts.divides(e, 4) for e in ends)


def left_of(low: Lowering, p: Product, windows: Windows | None = None) -> Left:
    """The left operand where it is stored, its rows in the order of `windows` if they are given."""
    ref = p.operands[0]
    name = low.buffer(stored_of(low.graph, low.group, ref), "in").name
    turned = turned_in(low.graph, low.group, p.ref.node)
    if turned is not None:
        return Left(name, _in_batch(p, turned.first), const(1), along=turned.along)
    found = gathered_in(low.graph, low.group, p.ref.node)
    if found is None:
        return Left(name, p.base, p.primitive.row_stride)
    here = {name: sym(d) for name, (d, _) in zip(found.lead, p.batch, strict=True)}
    here |= {found.row: sym("i"), found.depth: sym("k")}
    indices, guard = (
        tuple(e.substitute(here) for e in exprs) for exprs in (found.indices, found.guard)
    )
    if windows is not None:
        indices, guard = (windows.in_order(x, low.facts) for x in (indices, guard))
        guard = (*guard, *windows.beyond(low.facts))
    if not chooses(low.graph, low.group, ref):
        return Left(name, const(0), const(0), indices, guard)
    rows = chosen_rows(low.graph, low.graph.nodes[p.ref.node])
    assert rows is not None
    positions = rows[1]

    def read(row: Expr) -> tuple[Value, ...]:
        return _read(low, ref, positions, {**here, found.row: row})

    names = tuple(x.name for x in positions)
    return Left(name, const(0), const(0), indices, guard, names, read)


def _in_batch(p: Product, place: Expr) -> Expr:
    """A place over the result's symbols, over those of a product's loops."""
    return place.substitute({f"i{x}": sym(f"d{x}") for x in p.primitive.batch})


def turned_in(graph: Graph, group: Group, anchor: int) -> Turned | None:
    """Where a group reads the left operand of a product, if that is turned there."""
    node = graph.nodes[anchor]
    found = turned_of(graph, node) if node.operands[0] in group.packs else None
    return found if found is not None and found.view.node in group.members else None


def gathered_in(graph: Graph, group: Group, anchor: int) -> Gathered | None:
    """How a group gathers the rows of a product, if it does."""
    node = graph.nodes[anchor]
    left = node.operands[0]
    if chooses(graph, group, left):
        rows = chosen_rows(graph, node)
        return None if rows is None else rows[0]
    if left not in group.packs or not isinstance(graph.nodes[left.node].primitive, View):
        return None
    return gathered_of(graph, node)


def operands_of(graph: Graph, group: Group) -> Kind | None:
    """What a group's product multiplies if it takes its operands as they are, in 16 or 8 bits."""
    if group.anchor is None or graph.nodes[group.anchor].operands[0] not in group.packs:
        return None
    stored = (stored_of(graph, group, ref) for ref in graph.nodes[group.anchor].operands)
    left, right = (graph.type(ref).dtype for ref in stored)
    return kind_of(left, right) if left.name in NAMES else None


def sums_roughly(graph: Graph, group: Group) -> bool:
    """Whether a group is a product of f8, for which every arch has other instructions."""
    kind = operands_of(graph, group) if group.kind == "contract" else None
    return kind is not None and kind.is_rough


def holds_codes(graph: Graph, group: Group, anchor: int | None = None) -> bool:
    """Whether a group computes the panels of its product, or of another one in it, of codes."""
    anchor = group.anchor if anchor is None else anchor
    if anchor is None:
        return False
    panels = graph.nodes[anchor].operands[1]
    return panels in group.packs and is_coded(graph, panels)
