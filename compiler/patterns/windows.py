"""Products whose panels are windows of a tensor: convolutions, and plain matrices as a case of it.

The columns of such a product are places along the last axes of a tensor, and k picks a channel and
a shift. Flat over those axes, row k of a panel is then a stretch of the tensor that begins
somewhere else for each k, and nothing needs to be repeated as patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from stagefuse.compiler.graph import Contract, Graph, Map, Node, Ref, View, flatten_index
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

Digits: TypeAlias = tuple[tuple[str, Expr, Expr], ...]
"""The parts of k, outermost first: a symbol, its size, and the step of k for each."""

FEW_ROWS = 256
"""Rows of a matrix up to which reading the other one in place is cheaper than copying it."""


@frozen
class Axis:
    """An axis along which windows move: element `step * d + first + shift(k)` of a source's axis.

    `axis` is the result's, `source` the source's. `shifts` are digits of k with their steps, whose
    sum begins at 0 and ends at `last`. Where it is `spread`, every shift is a phase of its own:
    nothing is shared among columns, and nothing lies between rows.
    """

    axis: int
    size: Expr
    source: int
    extent: Expr
    step: int
    first: int
    shifts: tuple[tuple[str, int], ...]
    low: int
    last: int
    spread: bool = False

    @property
    def phases(self) -> int:
        """Places of a shift within a step; 1 if all are whole steps."""
        if self.spread:
            return self.last + 1
        return self.step if any(d % self.step for _, d in self.shifts) else 1

    @property
    def reach(self) -> int:
        """How many whole steps beyond a column its window goes."""
        return 0 if self.spread else self.last // self.step

    def whole(self, shift: Expr) -> Expr:
        """The whole steps of a shift."""
        return const(0) if self.spread else floordiv(shift, self.step)

    @property
    def pitch(self) -> int | None:
        """Columns from row to row where rows lie one after the other, if sizes are known. Where
        what is filled in before a row and behind it is enough for both, it is shared."""
        size, extent = self.size.as_int(), self.extent.as_int()
        if size is None or extent is None:
            return None
        before = max(-(-(-self.first - self.low - (self.phases - 1)) // self.step), 0)
        behind = -(-(extent - self.first - self.low) // self.step)
        return min(max(size, size + self.reach - before, behind), size + self.reach)

    def shift(self) -> Expr:
        """The shift for the digits of k, from 0."""
        total = const(-self.low)
        for name, step in self.shifts:
            total = total + sym(name) * step
        return total

    def inside(self, phase: Expr, start: Expr) -> tuple[Expr, Expr]:
        """The steps from `start`, of one phase, at which there is an element of the source."""
        first = phase + (self.first + self.low)
        low = floordiv(const(self.step - 1) - first, self.step)
        high = floordiv(self.extent - 1 - first, self.step) + 1
        return low - start, high - start


@frozen
class Windows:
    """What is read at windows over the last `axes` (one or two) of a product's columns, or of a
    reduction's result.

    `indices` find an element of the source from the result's symbols d0, d1... and the digits of
    k; `channels` are the digits that move no window of the `axes`; `outer` the other axes of the
    columns. Where they are `guarded`, what lies outside the source is `fill`; a guard of `outside`
    bounds one of the channels, as that is of the planes of a volume.
    """

    source: Ref
    indices: tuple[Expr, ...]
    digits: Digits
    channels: Digits
    outer: tuple[int, ...]
    axes: tuple[Axis, ...]
    guarded: bool
    fill: float | int | bool
    outside: tuple[Expr, ...] = ()

    def inside(self, name: str, size: Expr) -> tuple[Expr, Expr]:
        """The values of one of the channels at which there are elements of the source."""
        begin, stop = const(0), size
        for guard in self.outside:
            step = _slope(guard, name)
            rest = guard - sym(name) * step
            if step > 0:
                begin = maximum(begin, floordiv(const(step - 1) - rest, step))
            elif step < 0:
                stop = minimum(stop, floordiv(rest, -step) + 1)
        return begin, stop

    @property
    def of_one_plane(self) -> Windows:
        """The same windows, where the channels are one."""
        moving = tuple(d for d in self.digits if d not in self.channels)
        return replace(self, digits=moving, channels=(), outside=())

    @property
    def share(self) -> bool:
        """Whether windows overlap: what one of them reads, others do."""
        return any(a.reach for a in self.axes)

    @property
    def is_plain(self) -> bool:
        """Whether elements of a panel's row are adjacent in the source, and never outside."""
        return not self.guarded and all(a.step == 1 and not a.shifts for a in self.axes)

    def at(self, k: Expr) -> dict[str, Expr]:
        """The digits of k."""
        return {
            name: floordiv(k, step) if place == 0 else mod(floordiv(k, step), size)
            for place, (name, size, step) in enumerate(self.digits)
        }


def windows_of(graph: Graph, anchor: int, every: bool = False) -> Windows | None:
    """The windows that the panels of a product are, if they are. `every`: along any number of axes,
    also where they have a single place, instead of the last one or two of the result."""
    node = graph.nodes[anchor]
    contract, panels = node.primitive, graph.nodes[node.operands[1].node]
    assert isinstance(contract, Contract)
    view, domain = panels.primitive, node.type.shape
    if every and isinstance(view, View):
        view, panels = _composed(graph, view, panels)
    columns = [a for a in contract.columns if domain[a].as_int() != 1]
    if not columns or not isinstance(view, View):
        return None
    digits = _digits(view, contract.depth)
    if digits is None:
        return None
    facts = _facts(graph, domain, digits)
    unfold = _Unfolding(view, contract, domain, columns, digits, facts)
    indices = tuple(map(unfold, view.indices))
    guards = [g for g in map(unfold, view.guard) if g != unfold.tail and not facts.is_nonneg(g)]
    source = panels.operands[0]
    found = _windows(graph, source, domain, columns, indices, guards, digits, facts, every)
    return None if found is None else replace(found, fill=view.fill)


def _composed(graph: Graph, view: View, node: Node) -> tuple[View, Node]:
    """A view of a view as one, however many divisions that has, and the node of what is below it:
    windows along three axes are not folded into panels."""
    below = graph.nodes[node.operands[0].node]
    inner = below.primitive
    if not isinstance(inner, View) or (view.guard and inner.guard and inner.fill != view.fill):
        return view, node
    at = dict(zip(inner.symbols, view.indices, strict=True))
    indices, guard = (tuple(e.substitute(at) for e in x) for x in (inner.indices, inner.guard))
    fill = inner.fill if inner.guard else view.fill
    return View(view.symbols, indices, (*view.guard, *guard), fill), below


def windows_at(
    graph: Graph, domain: Sequence[Expr], node: Node, access: Sequence[Expr], digits: Digits
) -> Windows | None:
    """The windows that a view is where it is read at `access`, if they are: of the innermost axes
    of a `domain` d0, d1..., wherever they lie in a tensor, with `digits` that move them, or along
    another axis."""
    view = node.primitive
    assert isinstance(view, View)
    facts, here = _facts(graph, domain, digits), dict(zip(view.symbols, access, strict=True))

    def at(expr: Expr) -> Expr:
        return facts.simplify(expr.substitute(here, facts))

    columns = [a for a, size in enumerate(domain) if size.as_int() != 1]
    guards = [g for g in map(at, view.guard) if not facts.is_nonneg(g)]
    indices, source = tuple(map(at, view.indices)), node.operands[0]
    found = _windows(graph, source, domain, columns, indices, guards, digits, facts)
    if found is None or found.axes[-1].axis != columns[-1]:
        return None
    for name, size, _ in found.channels:
        moves = any(name in e.symbols() and len(e.symbols()) > 1 for e in indices)
        if not moves or size.as_int() is None:
            return None
    across = found.axes[0]
    bounded = any(f"d{across.axis}" in g.symbols() for g in guards)
    if len(found.axes) > 1 and not (across.shifts or bounded or found.channels):
        found = replace(found, axes=found.axes[1:], outer=(*found.outer, across.axis))
    return replace(found, fill=view.fill)


def _facts(graph: Graph, domain: Sequence[Expr], digits: Digits) -> Facts:
    """What is known of an element of a domain and of a window."""
    names = [*(f"d{a}" for a in range(len(domain))), *(name for name, _, _ in digits)]
    return graph.facts.at_element(names, [*domain, *(size for _, size, _ in digits)])


def _windows(
    graph: Graph, source: Ref, domain: Sequence[Expr], columns: Sequence[int],
    indices: tuple[Expr, ...], guards: list[Expr], digits: Digits, facts: Facts,
    every: bool = False,
) -> Windows | None:  # fmt: skip
    """Windows of a source whose elements are at `indices`, under `guards`."""
    shape = graph.type(source).shape
    axes: list[Axis] = []
    for axis in reversed(columns if every else columns[-2:]):
        found = _axis(axis, domain[axis], indices, shape, digits)
        if found is None or (axes and found.source != axes[0].source - 1):
            break
        axes.insert(0, found)
    if every:
        axes = [*_still(axes, indices, shape, digits, guards), *axes]
    axes = [_within(a, indices[a.source], guards, facts) for a in axes]
    ends = {e for a in axes for e in _ends(indices, a)}
    if not axes:
        return None
    moving = {name for a in axes for name, _ in a.shifts}
    moved = {f"d{a.axis}" for a in axes} | moving
    others = [e for n, e in enumerate(indices) if n not in {a.source for a in axes}]
    channels = tuple(d for d in digits if d[0] not in moving)
    outside = tuple(g for g in guards if g not in ends)
    if any(e.symbols() & moved for e in (*others, *outside)):
        return None
    if any(sum(_slope(g, name) != 0 for name, _, _ in channels) != 1 for g in outside):
        return None
    return Windows(
        source, indices, digits, channels,
        tuple(a for a in columns if a not in {x.axis for x in axes}), tuple(axes), bool(guards), 0,
        outside,
    )  # fmt: skip


def _slope(expr: Expr, name: str) -> int:
    """The step of an expression for a symbol; 0 if it has none, or not the same everywhere."""
    found = expr.coefficient(name)
    return (found.as_int() or 0) if found is not None else 0


def is_worth_it(graph: Graph, anchor: int, windows: Windows) -> bool:
    """Whether a product is better done by stretches of its source than with packed panels."""
    if any(a.shifts or a.step > 1 for a in windows.axes) or len(windows.axes) > 1:
        return True
    if windows.axes[0].source != len(windows.indices) - 1:
        return False  # a transposed matrix, which would be turned for every block of rows
    node, rows = graph.nodes[anchor], const(1)
    if converted(graph, node.operands[1]):
        return False  # which is copied in any case, best as panels
    assert isinstance(node.primitive, Contract)
    for axis in node.primitive.rows:
        rows = rows * node.type.shape[axis]
    most = graph.facts.bounds(rows)[1]
    return most is not None and most <= FEW_ROWS


def converted(graph: Graph, panels: Ref) -> set[int]:
    """The nodes that convert elements of a tensor and pack them in panels; empty if others do."""
    source = graph.nodes[graph.nodes[panels.node].operands[0].node]
    return {panels.node, source.id} if source.primitive == Map("cast") else set()


def step_in_place(graph: Graph, windows: Windows) -> Expr | None:
    """The step between the rows of panels in the source itself; None if they do not lie so."""
    if not windows.is_plain:
        return None
    offset = flatten_index(windows.indices, graph.type(windows.source).shape)
    wanted = const(1)
    for axis in reversed(windows.axes):
        found = offset.coefficient(f"d{axis.axis}")
        if found is None or not graph.facts.prove_eq(found, wanted):
            return None
        wanted = wanted * axis.size
    along = offset.coefficient(windows.digits[-1][0])
    for name, _, step in windows.digits:
        found = offset.coefficient(name)
        if along is None or found is None or not graph.facts.prove_eq(found, along * step):
            return None
    return along


class _Unfolding:
    """Index expressions of panels over the result's symbols and the digits of k."""

    def __init__(
        self, view: View, contract: Contract, domain: Sequence[Expr], columns: Sequence[int],
        digits: Digits, facts: Facts,
    ) -> None:  # fmt: skip
        *lead, panel, k, column = view.symbols
        self.panel, self.facts, width = panel, facts, contract.panel
        whole = sym("column")
        self.joined = {column: whole - sym(panel) * width}
        self.split = {panel: floordiv(whole, width)}
        flat = flatten_index([sym(f"d{a}") for a in columns], [domain[a] for a in columns])
        count = const(1)
        for axis in columns:
            count = count * domain[axis]
        self.tail = count - 1 - flat  # at least 0, since there is a column
        depth = const(0)
        for name, _, step in digits:
            depth = depth + sym(name) * step
        batch = (sym(f"d{a}") for a in contract.batch)
        self.names: dict[str, Expr] = dict(zip(lead, batch, strict=True))
        self.names |= {"column": flat, k: depth}

    def __call__(self, expr: Expr) -> Expr:
        expr = expr.substitute(self.joined)
        if self.panel in expr.symbols():
            expr = expr.substitute(self.split)
        return self.facts.simplify(expr.substitute(self.names, self.facts))


def _still(
    axes: Sequence[Axis], indices: Sequence[Expr], shape: Sequence[Expr], digits: Digits,
    guards: Sequence[Expr],
) -> list[Axis]:  # fmt: skip
    """The axes along which a window has a single place. Where it sees all that there is along
    several, the outermost of them by the digits is that of the channels."""
    taken = {a.source for a in axes}
    made = {n: _axis(-1, const(1), indices, shape, digits, n) for n in range(len(indices))}
    found = [a for n, a in made.items() if a is not None and a.shifts and n not in taken]
    moving = {name for a in axes for name, _ in a.shifts}
    bounded = [a for a in found if _ends(indices, a) & set(guards)]
    moving |= {name for a in bounded for name, _ in a.shifts}
    (_, *others) = [name for name, _, _ in digits if name not in moving] or [""]
    more = [a for a in found if a not in bounded and {name for name, _ in a.shifts} <= {*others}]
    beside, first = list[Axis](), min(taken, default=0)
    for axis in sorted([*bounded, *more], key=lambda a: -a.source):
        if axis.source in (first - 1, max(taken, default=0) + 1):  # else it is no axis of an image
            beside.insert(0, axis)
            taken.add(axis.source)
            first = min(taken)
    return beside


def _ends(indices: Sequence[Expr], axis: Axis) -> set[Expr]:
    """What is at least 0 at the elements of an axis."""
    index = indices[axis.source]
    return {index, axis.extent - 1 - index}


def _axis(
    axis: int, size: Expr, indices: Sequence[Expr], shape: Sequence[Expr], digits: Digits,
    still: int | None = None,
) -> Axis | None:  # fmt: skip
    """The axis of windows that a column's axis is, if it is found in one index, in steps; or the
    one that is `still` at a single place, which digits alone move."""
    name = f"d{axis}"
    found = [n for n, e in enumerate(indices) if name in e.symbols()] if still is None else [still]
    if len(found) != 1:
        return None
    index, own = indices[found[0]], 1
    sizes = {digit: size.as_int() for digit, size, _ in digits}
    rest, shifts, low, high = index, [], 0, 0
    for symbol in sorted(index.symbols()):
        slope = index.coefficient(symbol)
        step = None if slope is None else slope.as_int()
        if step is None or symbol not in (name, *sizes):
            return None
        rest = rest - sym(symbol) * step
        if symbol == name:
            own = step
            continue
        count = sizes[symbol]
        if count is None:
            return None
        shifts.append((symbol, step))
        low, high = low + min(step, 0) * (count - 1), high + max(step, 0) * (count - 1)
    first = rest.as_int()
    if first is None or own < 1:
        return None
    place = found[0]
    return Axis(axis, size, place, shape[place], own, first, tuple(shifts), low, high - low)


def _within(axis: Axis, index: Expr, guards: Sequence[Expr], facts: Facts) -> Axis:
    """The axis as far as guards let windows see it: a tensor may have been cut before."""
    for guard in guards:
        extent = guard + index + 1
        moved = {f"d{axis.axis}", *(name for name, _ in axis.shifts)}
        if not extent.symbols() & moved and facts.prove_le(extent, axis.extent):
            axis = replace(axis, extent=extent)
    return axis


def _digits(view: View, depth: Expr) -> Digits | None:
    """The parts of k that index expressions tell apart by dividing it."""
    name = view.symbols[-2]
    cuts: set[int] = set()
    for expr in (*view.indices, *view.guard):
        if not _cut(expr, name, cuts):
            return None
    steps = sorted(cuts | {1}, reverse=True)
    if any(a % b for a, b in zip(steps, steps[1:], strict=False)):
        return None
    known = depth.as_int()
    if len(steps) > 1 and (known is None or known % steps[0]):
        return None
    most = depth if known is None else const(known // steps[0])
    sizes = [most, *(const(a // b) for a, b in zip(steps, steps[1:], strict=False))]
    places = enumerate(zip(sizes, steps, strict=True))
    return tuple((f"k{n}", size, const(step)) for n, (size, step) in places)


def cuts_of(expr: Expr, name: str) -> set[int] | None:
    """Where quotients and remainders cut a symbol; None if one does so in another way."""
    cuts: set[int] = set()
    return cuts if _cut(expr, name, cuts) else None


def _cut(expr: Expr, name: str, cuts: set[int]) -> bool:
    """Collects where quotients and remainders cut a symbol; False if one does so in another way."""
    for monomial, _ in expr.terms:
        for atom, _power in monomial:
            if atom.kind == "sym" or not any(name in a.symbols() for a in atom.args):
                continue
            inner, divisor = atom.args
            scale, by = _scale(inner, name), divisor.as_int()
            if scale is None or by is None or by < 1 or not _cut(inner, name, cuts):
                return False
            cuts.add(scale * by)
    return True


def _scale(expr: Expr, name: str) -> int | None:
    """The step of a symbol within a quotient or remainder of it."""
    if expr == sym(name):
        return 1
    if len(expr.terms) != 1 or expr.terms[0][1] != 1 or len(expr.terms[0][0]) != 1:
        return None
    ((atom, power),) = expr.terms[0][0]
    if power != 1 or atom.kind not in ("//", "%"):
        return None
    scale, by = _scale(atom.args[0], name), atom.args[1].as_int()
    if scale is None or by is None:
        return None
    return scale * by if atom.kind == "//" else scale
