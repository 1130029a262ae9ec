"""Scatters whose positions are sorted: the updates of an element lie together, in a run.

The base is stored first. Each run of a few updates is combined with its element by the step of its
first place, which sees that it is one; longer ones by steps for every so many places, each of
which has the run around its own place if that is the first such place of it.
"""

from __future__ import annotations

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.gpu.transposed import lower_elements
from stagefuse.compiler.graph import Ref, Scatter
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Buffer,
    Checked,
    Const,
    Fold,
    ForEqual,
    Index,
    Let,
    Load,
    Local,
    Op,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.blocks import Parallel, Scope
from stagefuse.compiler.lower.expressions import all_of, product_of
from stagefuse.compiler.lower.pointwise import is_flat
from stagefuse.compiler.lower.sequences import combined, is_some
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64, U32

SHORT = 32
"""Updates of a run that one lane combines, some at a time."""
AHEAD = 4
"""Updates of a short run that are on the way together."""
FAR_AHEAD = {True: 128, False: 16}
"""Those of a long run that a warp has, and those of one that a lane has with others beside it."""
BESIDE = 32
"""Elements behind each other's positions from which on lanes take one each of a long run."""
SORTED, FROM = 6, 7
"""The numbers of the buffers with sorted positions, and with where their updates come from."""


def lower_copied(low: Lowering) -> Parallel:
    """The base, before its updates."""
    (ref,) = low.group.roots
    base = low.graph.nodes[ref.node].operands[0]
    low.products[ref] = lambda at: low.value(base, at, ())
    low.flat = is_flat(low.graph, low.group.domain, _members(low, base))
    return lower_elements(low)


def _members(low: Lowering, ref: Ref) -> set[int]:
    """The members of the group that a value is computed of."""
    found, left = set[int](), [ref.node]
    while left:
        node = left.pop()
        if node in low.group.members and node not in found:
            found.add(node)
            left += [operand.node for operand in low.graph.nodes[node].operands]
    return found


def lower_runs(low: Lowering) -> Parallel:
    """Runs of a few updates."""
    runs = Runs(low)
    parallel = runs.parallel("k", runs.count)
    place = Index(sym("k"))
    key = runs.key(place)
    before = runs.same(Index(sym("k") - 1), key)
    longer = runs.same(Index(sym("k") + SHORT), key)
    first = Op("not", (Op("or", (before, longer), BOOL),), BOOL)
    low.branch(all_of(runs.some(first)), lambda: runs.combine(place, key, AHEAD))
    return parallel, const(1)


def beside(group: Group, axis: int) -> Expr:
    """1 where lanes have elements beside each other of one position, else 0."""
    return minimum(floordiv(product_of(group.domain[axis + 1 :]), BESIDE), const(1))


def lower_long_runs(low: Lowering, by_warps: bool) -> Parallel:
    """Runs of more, each by a warp or by a lane."""
    runs = Runs(low)
    parallel = runs.parallel("mark", floordiv(runs.count + (SHORT - 1), SHORT))
    mark, ahead = sym("mark") * SHORT, FAR_AHEAD[by_warps]
    key = runs.key(Index(mark))

    def found() -> None:
        at = Index(mark - sym("back"))
        here = Op("select", (runs.same(at, key), at, Index(mark)), I64)
        name = low.name("first")
        low.emit(Fold(name, "min", (("back", const(SHORT)),), here, I64))
        first = Checked(Local(name, I64), runs.count, 0, proved=True)
        beyond = Op("add", (first, Const(SHORT, I64)), I64)
        low.branch(runs.same(beyond, key), lambda: runs.combine(first, key, ahead))

    first = Op("not", (runs.same(Index(mark - SHORT), key),), BOOL)
    low.branch(all_of(runs.some(first)), found)
    return parallel, const(SHORT)


class Scattered:
    """A scatter, for a kernel that combines some of its updates."""

    def __init__(self, low: Lowering) -> None:
        self.low = low
        self.ref = low.group.roots[0]
        self.node = low.graph.nodes[self.ref.node]
        assert isinstance(self.node.primitive, Scatter)
        self.axis, self.kind = self.node.primitive.axis, self.node.primitive.kind
        self.size = low.group.domain[self.axis]
        (self.count,) = low.graph.type(self.node.operands[1]).shape

    def parallel(self, name: str, extent: Expr) -> list[tuple[str, Expr]]:
        """The parallel axes: of the domain, but for the one that positions are along."""
        low, rank = self.low, len(self.low.group.domain)
        others = low.axes(range(self.axis)), low.axes(range(self.axis + 1, rank))
        found = [*others[0], (name, extent), *others[1]]
        low.bind(found)
        return found

    def along(self, place: KernelValue) -> tuple[KernelValue, ...]:
        """A place in the domain, at a position along the axis."""
        here: list[KernelValue] = [Index(sym(f"d{a}")) for a in range(len(self.low.group.domain))]
        here[self.axis] = place
        return tuple(here)

    def some(self, *conditions: KernelValue) -> list[KernelValue]:
        """The conditions, and that there are elements at all."""
        known = self.low.facts.is_positive(self.size)
        return [*([] if known else [is_some(self.size)]), *conditions]


class Runs(Scattered):
    """The runs of a scatter's sorted positions."""

    def _places(self, number: int) -> Buffer:
        made = Buffer(f"b{len(self.low.buffers)}", U32, (self.count,), "in")
        return self.low.buffers.setdefault(parts_of(self.ref, number), made)

    def key(self, place: KernelValue) -> KernelValue:
        """The position at a place of the sorted ones."""
        return Load(self.keys(), (place,), U32)

    def keys(self) -> str:
        """The name of the buffer with sorted positions."""
        return self._places(SORTED).name

    def position(self, key: KernelValue) -> KernelValue:
        """A sorted position as one in the axis."""
        return Checked(Op("cast", (key,), I64), self.size, 0, proved=True)

    def source(self, place: KernelValue) -> KernelValue:
        """Where the update at a place of the sorted ones comes from."""
        return Op("cast", (Load(self._places(FROM).name, (place,), U32),), I64)

    def same(self, place: KernelValue, key: KernelValue) -> KernelValue:
        """Whether there is such a place, and it has a position."""
        inside = all_of([
            Op("ge", (place, Const(0, I64)), BOOL), Op("lt", (place, Index(self.count)), BOOL)
        ])  # fmt: skip
        there = Load(self.keys(), (place,), U32, (inside,))
        return Op("and", (inside, Op("eq", (there, key), BOOL)), BOOL)

    def combine(self, first: KernelValue, key: KernelValue, ahead: int) -> None:
        """The element of a run that begins at a place, with all its updates."""
        low, dtype = self.low, self.node.type.dtype
        place, total = self.along(self.position(key)), low.name("total")
        out = low.buffer(self.ref, "inout").name
        low.emit(Alloc(total, dtype, ()))
        low.emit(Store(total, (), Load(out, place, dtype)))
        low.facts = low.facts.with_ranges({"run": (0, self.count - 1)})
        update = low.name("update")
        low.scopes.append(Scope(low.scopes[-1].bound | {"run"}))
        source = Checked(self.source(Index(sym("run"))), self.count, 0, proved=True)
        value = low.value(self.node.operands[2], self.along(source), ())
        so_far, name = Load(total, (), dtype), low.name("v")
        low.emit(Let(update, value))
        low.emit(Let(name, combined(self.kind, so_far, Local(update, value.dtype), dtype)))
        low.emit(Store(total, (), Local(name, dtype.compute)))
        body = tuple(low.scopes.pop().body)
        low.emit(ForEqual("run", self.keys(), self.count, first, ahead, body))
        low.emit(Store(out, place, so_far))
