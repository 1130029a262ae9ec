"""Reductions over windows of an image: depthwise convolutions, pooling.

A step copies the part of the image that its windows see into a stripe, with what a padding gives
around it, so that no element is guarded and strides are gone. The windows of all its rows are then
reduced side by side, counted flat over the stripe, and what follows reads them from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from stagefuse.compiler.cpu.bodies import UNROLLED
from stagefuse.compiler.fusion.groups import Access, Group
from stagefuse.compiler.graph import Node, Reduce, Ref, View
from stagefuse.compiler.kernel_ir import Alloc, Const, Fold, Index, Load, Local, Op, Store, Value
from stagefuse.compiler.patterns.windows import Digits, Windows, windows_at
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, mod, sym
from stagefuse.dsl.frozen import frozen

from .blocks import Parallel
from .expressions import COMBINE, as_dtype, at_least_one, product_of, start_of, symbols_of
from .stripe import Stripe
from .values import Lowering

STRIPE = 1 << 13
"""Elements of a stripe that, with as many sums, fit the first-level cache."""
PIECE = 256
"""Columns of a step where their number is not known."""
HIGH = 64
"""Rows that an image is taken to have where that is not known."""
SHORT = 12
"""From row to row of a stripe, below which rows are not told apart."""
LONG = 64
"""Columns that fill their vectors well enough however they are counted."""
SMALL, TALL = 16, 8
"""Elements of a window, and of a column of one or of a part of it, up to which it is written
out."""
VECTORS = 8
"""Vectors of short rows that are reduced side by side, at most, their sums in registers."""
LINES, TAPS = 4, 200
"""Rows that share what they read, at most, and elements that are written out for all of them."""
HIGHEST = 128
"""Elements of a column that is written out in parts, at most: the text grows with each."""
SPLIT = ("sum", "max", "min")
"""Reductions of windows of which rows may be reduced before columns."""
LANES, HALF = 16, 8
"""Elements that the widest vectors have: sums are padded to whole ones. Half of them hold a row of
more than a quarter, and what they read crosses lines of the cache half as often."""


@frozen
class Plane:
    """A reduction of a kernel whose elements are those of the `windows` that a `view` makes."""

    reduction: Ref
    view: Ref
    windows: Windows


def plane_of(low: Lowering) -> Plane | None:
    """The reduction over windows that a kernel is made around, where a stripe is worth it."""
    group, graph = low.group, low.graph
    nodes = [graph.nodes[m] for m in sorted(group.members)]
    reductions = [node for node in nodes if isinstance(node.primitive, Reduce)]
    if not low.schedule.stripes or group.row_axes or len(reductions) != 1:
        return None
    (node,) = reductions
    primitive, access = node.primitive, _only_access(group, node.id)
    assert isinstance(primitive, Reduce)
    if primitive.kind.startswith("arg") or access is None:
        return None
    if any(graph.type(group.source(r)).shape != group.domain for r in group.roots):
        return None
    shape = graph.type(node.operands[0]).shape
    digits = tuple((f"f{a}", shape[a], const(1)) for a in primitive.axes)
    found = []
    for view in nodes:
        at = _only_access(group, view.id)
        if isinstance(view.primitive, View) and view.id in _below(low, node) and at is not None:
            windows = windows_at(graph, group.domain, view, at, digits)
            if windows is not None and _gains(windows):
                found.append(Plane(Ref(node.id), Ref(view.id), windows))
    if len(found) != 1 or not _stands_still(low, found[0]):
        return None
    return found[0]


def _gains(windows: Windows) -> bool:
    """Whether a stripe is worth its copy: not for windows side by side, nor where long rows of
    them can be read as they lie."""
    size = windows.axes[-1].size.as_int()
    if windows.guarded or any(a.step > 1 for a in windows.axes):
        return windows.guarded or windows.share
    return windows.share and size is not None and size < LONG


def _only_access(group: Group, node: int) -> Access:
    """Where a kernel reads a node, if that is one place."""
    accesses = group.accesses.get(node, [])
    return accesses[0] if len(accesses) == 1 else None


def _below(low: Lowering, node: Node) -> set[int]:
    """The members that a member is computed of."""
    found: set[int] = set()
    pending = [node.id]
    while pending:
        for ref in low.graph.nodes[pending.pop()].operands:
            if ref.node in low.group.members and ref.node not in found:
                found.add(ref.node)
                pending.append(ref.node)
    return found


def _stands_still(low: Lowering, plane: Plane) -> bool:
    """Whether all else that is reduced is the same for all windows: weights."""
    trial = Lowering(low.graph, low.group, low.sites, low.schedule)
    operand, inside = _element(trial, plane, sym(COLUMN))
    dtype = low.graph.type(plane.view).dtype.compute
    with trial.part(low.group, {plane.view: lambda _: Const(0, dtype)}):
        value = trial.value(operand, inside, ())
    return COLUMN not in symbols_of((value,))


COLUMN = "x"
"""The index of windows, flat over the rows of a stripe."""


def _element(low: Lowering, plane: Plane, column: Expr) -> tuple[Ref, tuple[Value, ...]]:
    """The operand of the reduction, and where it is read for the window at a column."""
    node = low.graph.nodes[plane.reduction.node]
    assert isinstance(node.primitive, Reduce)
    here = {f"d{a.axis}": column for a in plane.windows.axes}
    access = low.group.accesses[node.id][0]
    assert access is not None
    kept = iter(access)
    places = [
        sym(f"f{a}") if a in node.primitive.axes else next(kept).substitute(here)
        for a in range(low.graph.type(node.operands[0]).rank)
    ]
    return node.operands[0], tuple(map(Index, places))


def lower_plane(low: Lowering, plane: Plane) -> Parallel:
    """The kernel around a reduction over windows."""
    return _Planes(low, plane).lower()


class _Planes:
    """Windows are reduced in groups of `lines` rows, `columns` of each side by side; where rows are
    short, all of them are one line, or as many as there are vectors. Of those that are `split`, the
    rows of each are reduced first, flat over the stripe, since windows above each other share them.
    """

    def __init__(self, low: Lowering, plane: Plane) -> None:
        self.low, self.plane, self.windows = low, plane, plane.windows
        node = low.graph.nodes[plane.reduction.node]
        assert isinstance(node.primitive, Reduce)
        self.kind, self.dtype = node.primitive.kind, node.type.dtype.compute
        self.view = low.graph.nodes[plane.view.node]
        self.reduces_view = node.operands[0] == plane.view and self.kind in SPLIT
        joined = self.kind if self._are_joined() else None
        if joined:
            self.windows = plane.windows.of_one_plane
        self.split = self._is_split()
        self.outer, self.inner = self._written_out()
        self.parts = self._parts()
        self.begin = 0
        self.stripe = stripe = Stripe(low, plane.windows, self.view.type.dtype.compute, joined)
        wide, pitch = stripe.columns(PIECE, PIECE)
        rows, self.lines = self._rows(pitch)
        stripe.shape(rows, wide, pitch, LANES)
        self.is_flat = (pitch.as_int() or PIECE) < SHORT and not self.is_narrow
        self.columns = self._whole(pitch * (rows - 1) + wide if self.is_flat else wide)
        if self.is_narrow:
            self.columns = const(HALF)
        self.step, self.apart = (pitch if self.is_flat else self.columns), pitch
        vectors = self.columns.as_int() or 0
        if self.is_flat and 0 < vectors <= VECTORS * LANES:
            self.lines, self.columns, self.apart = vectors // LANES, const(LANES), const(LANES)
        self.is_known = stripe.along.size.as_int() is not None
        self.plane_of_rows = self._whole(pitch * (rows + stripe.above - 1) + wide)

    @property
    def is_narrow(self) -> bool:
        """Whether rows are half a vector each."""
        size = self.stripe.along.size.as_int()
        return size is not None and HALF // 2 < size <= HALF and not self.split

    def _whole(self, columns: Expr) -> Expr:
        """A number of columns in whole vectors."""
        return floordiv(columns + (LANES - 1), LANES, self.low.facts) * LANES

    def _seen(self) -> Expr:
        """Columns of a step that are reduced."""
        return self.columns if self.is_known else self._whole(self.stripe.part()[3])

    def _is_split(self) -> bool:
        """Whether windows are of whole rows and columns of what is reduced itself, and rows and
        columns apart take less than half of the operations."""
        digits, axes = self.windows.digits, self.windows.axes
        if len(axes) < 2 or not self.reduces_view or self.windows.channels:
            return False
        sizes = {name: size.as_int() or UNROLLED + 1 for name, size, _ in digits}
        sides = [math.prod(sizes[name] for name, _ in a.shifts) for a in axes]
        known = self.windows.axes[-1].size.as_int() is not None
        return known and max(sides) <= UNROLLED and math.prod(sides) > 2 * sum(sides)

    def _are_joined(self) -> bool:
        """Whether the planes of a volume are reduced as they are copied: what is reduced is read
        there itself, and what lies outside changes nothing."""
        whole = start_of(self.kind, self.dtype) if self.plane.windows.channels else None
        fits = self.view.type.dtype.compute == self.dtype and self.reduces_view
        return fits and whole is not None and whole.value == self.plane.windows.fill

    def _written_out(self) -> tuple[Digits, Digits]:
        """The digits of a window that are loops, and those that are written out: all of a small
        one, of a larger one those that go down, since rows of windows share what they read."""
        digits, along = self.windows.digits, self._along()
        down = tuple(d for d in digits if d not in along)
        if self.split:
            return (), down
        for outer, inner, most in (
            ((), digits, SMALL),
            (along, down, TALL),
            (down, along, UNROLLED),
        ):
            size = product_of([size for _, size, _ in inner]).as_int()
            if size is None:
                continue
            if outer and outer == along and len(inner) == 1 and size <= HIGHEST:
                return outer, inner  # in parts
            if size <= (most if outer or len(inner) > 1 else UNROLLED):
                return outer, inner
        return digits, ()

    def _parts(self) -> list[tuple[int, Digits]]:
        """Where the parts of a window that are written out begin along its only digit, and that
        with the size of each: a part is no higher than TALL."""
        known = self.inner[0][1].as_int() if len(self.inner) == 1 and self.outer else None
        if known is None or known <= TALL or self.outer[0] not in self._along():
            return [(0, self.inner)]
        ((name, _, step),) = self.inner
        most = -(-known // -(-known // TALL))
        return [
            (begin, ((name, const(min(most, known - begin)), step),))
            for begin in range(0, known, most)
        ]

    def _along(self) -> Digits:
        """The digits of a window that move it along rows."""
        moves = {name for name, _ in self.windows.axes[-1].shifts}
        return tuple(d for d in self.windows.digits if d[0] in moves)

    def _rows(self, pitch: Expr) -> tuple[int, int]:
        """Rows of windows in a step, as many as a stripe has room for, evenly; and in a group."""
        stripe, known = self.stripe, pitch.as_int()
        if stripe.across is None or known is None:
            return 1, 1
        height = stripe.across.size.as_int() or HIGH
        planes = stripe.phases * (stripe.channels.as_int() or 1)
        most = max(STRIPE // (planes * known) - stripe.above, 1)
        rows = -(-height // -(-height // most))
        if known < SHORT and not self.is_narrow:
            return rows, 1
        size = product_of([size for _, size, _ in self.parts[0][1]]).as_int() or 1
        lines = 2 * LINES if self.is_narrow else LINES
        lines = max(min(lines, rows, TAPS // size), 1)
        return -(-rows // lines) * lines, lines

    def lower(self) -> Parallel:
        low, stripe = self.low, self.stripe
        moving = {a.axis for a in self.windows.axes}
        outer = low.axes([a for a in range(len(low.group.domain)) if a not in moving])
        parallel = [*outer, *stripe.steps()]
        low.bind(parallel)
        stripe.alloc()
        with low.elsewhere():
            seen = None if self.is_known else self._seen() + stripe.along.reach
            stripe.fill(self.windows.source, self.windows.fill, seen)
        if self.split:
            self._reduce_rows()
        sums = low.name("windows")
        low.emit(Alloc(sums, self.dtype, (self.lines * self.columns,)))

        def group(first: Expr) -> None:
            self._reduce(sums, first)
            self._store(sums, first)

        if self.is_flat or stripe.rows == self.lines:
            group(const(0))
        else:
            groups = floordiv(stripe.part()[2] + (self.lines - 1), self.lines, low.facts)
            low.loop("g", const(0), groups, lambda: group(sym("g") * self.lines))
        size = product_of([size for _, size, _ in self.windows.digits])
        return parallel, at_least_one(size * (stripe.rows * stripe.wide)) * 2

    def _reduce(self, sums: str, first: Expr) -> None:
        """Reduces the windows of a group of rows from the first: a few of their elements at a
        time."""
        low = self.low

        def columns(value: Callable[[int, Value], Value]) -> None:
            def one() -> None:
                for line in range(self.lines):
                    here = (Index(line * self.columns + sym(COLUMN)),)
                    low.emit(Store(sums, here, value(line, Load(sums, here, self.dtype))))

            low.loop(COLUMN, const(0), self._seen(), one, vector=True)

        def part(line: int, _: Value) -> Value:
            return self._part(first + line)

        def more(line: int, sum: Value) -> Value:
            return Op(COMBINE[self.kind], (sum, self._part(first + line)), self.dtype)

        def nest(rest: Digits) -> None:
            if not rest:
                return columns(more)
            low.loop(rest[0][0], const(0), rest[0][1], lambda: nest(rest[1:]))

        if not self.outer:
            return columns(part)
        columns(lambda *_: start_of(self.kind, self.dtype))
        for begin, digits in self.parts:
            self.begin, self.inner = begin, digits
            nest(self.outer)

    def _reduce_rows(self) -> None:
        """Reduces the row of a window that begins at each place of the stripe."""
        low, stripe, along = self.low, self.stripe, self.stripe.along
        assert stripe.across is not None
        count, shift = stripe.across.phases, along.shift()
        self.rows = low.name("rows")
        low.emit(Alloc(self.rows, self.dtype, (count * self.plane_of_rows + LANES,)))
        place = (sym("v") * along.phases + mod(shift, along.phases)) * stripe.plane
        place = place + floordiv(shift, along.step) + sym(COLUMN)
        moves = {name for name, _ in along.shifts}
        digits = tuple(d for d in self.windows.digits if d[0] in moves)

        def element() -> None:
            load = Load(stripe.name, (Index(place),), stripe.dtype)
            value = self._folded(digits, as_dtype(load, self.dtype))
            to = Index(sym("v") * self.plane_of_rows + sym(COLUMN))
            low.emit(Store(self.rows, (to,), value))

        def phase() -> None:
            low.loop(COLUMN, const(0), self.plane_of_rows, element, vector=True)

        low.loop("v", const(0), const(count), phase)

    def _part_of_rows(self, line: Expr) -> Value:
        """The reduction of the rows of a window at a line and a column."""
        across = self.stripe.across
        assert across is not None
        shift = across.shift()
        place = mod(shift, across.phases) * self.plane_of_rows + sym(COLUMN)
        place = place + floordiv(shift, across.step) * self.stripe.pitch + line * self.apart
        return self._folded(self.inner, Load(self.rows, (Index(place),), self.dtype))

    def _folded(self, digits: Digits, value: Value) -> Value:
        """The reduction of a value over some digits."""
        name, loops = self.low.name("r"), tuple((n, size) for n, size, _ in digits)
        self.low.emit(Fold(name, self.kind, loops, value, self.dtype))
        return Local(name, self.dtype)

    def _part(self, line: Expr) -> Value:
        """The reduction of what is written out of the window at a line and a column."""
        if self.split:
            return self._part_of_rows(line)
        low, stripe = self.low, self.stripe
        operand, inside = _element(low, self.plane, const(0))
        planes = {name: sym(name) for name, _, _ in self.windows.channels}
        place = stripe.place(planes) + line * self.apart + sym(COLUMN)
        if self.begin:
            moved = {name: sym(name) + self.begin for name, _, _ in self.inner}
            place = place.substitute(moved)
            inside = tuple(
                Index(i.expr.substitute(moved)) if isinstance(i, Index) else i for i in inside
            )
        load = Load(stripe.name, (Index(place),), stripe.dtype)
        before = low.facts
        low.facts = before.with_ranges({n: (const(0), size - 1) for n, size, _ in self.inner})
        with low.part(low.group, {self.plane.view: lambda _: load}):
            value = as_dtype(low.value(operand, inside, ()), self.dtype)
        low.facts = before
        if not self.inner:
            return value
        return self._folded(self.inner, value)

    def _store(self, sums: str, first: Expr) -> None:
        """Stores what follows the reduction of a group of rows, row by row."""
        low, stripe = self.low, self.stripe
        y0, x0, rows, wide = stripe.part()
        position = [const(0) if e.as_int() == 1 else sym(f"d{a}")
                    for a, e in enumerate(low.group.domain)]  # fmt: skip

        def element() -> None:
            place = Index(sym("s") * self.step + sym("c"))
            load = Load(sums, (place,), self.dtype)
            at = [*position]
            at[stripe.along.axis] = x0 + sym("c")
            if stripe.across is not None:
                at[stripe.across.axis] = y0 + first + sym("s")
            with low.part(low.group, {self.plane.reduction: lambda _: load}):
                low.store(at)

        if not self.is_flat:
            rows = minimum(rows - first, const(self.lines), low.facts)
        low.loop("s", const(0), rows, lambda: low.loop("c", const(0), wide, element, vector=True))
