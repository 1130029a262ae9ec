"""Computes for all steps at once what no step needs from the one before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

from stagefuse.compiler.graph import (
    Carried,
    Concat,
    Gather,
    Graph,
    Indirect,
    Map,
    Node,
    Position,
    Primitive,
    Recurrence,
    Reduce,
    Ref,
    Scan,
    Sort,
    View,
)
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.recurrence import Nests, gathered_type, recurrence
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .record import Pass, Place
from .simplify import Simplify

GROWTH = 4
"""What is gathered to compute something after the steps may be this many times as large as it."""
KINDS = (Map, Reduce, View, Gather, Position, Concat, Scan, Sort)
"""Primitives that have a form for all steps: the same along one more axis."""


@frozen
class BatchSteps(Pass):
    """A recurrence computes at each step only what depends on what it carries.

    Sums that depend on the step alone, such as the product of an input by its weights, are
    computed before it for all steps: one product of many rows for many products of few. So are,
    after it, those that no later step depends on. What is carried for nothing is dropped.
    """

    name: ClassVar[str] = "batch_steps"
    requires: ClassVar[tuple[str, ...]] = ("views-folded",)
    establishes: ClassVar[tuple[str, ...]] = ("simplified", "views-folded")

    def run(self, graph: Graph) -> Graph:
        nests = Nests(graph)
        for step in sorted(nests.ends, key=lambda s: (-len(nests.inside(s)), s)):
            graph = _Batcher(graph, step).run()
        return Simplify().run(graph) if nests.ends else graph

    def reasons(self, graph: Graph) -> dict[Place, str]:
        found: dict[Place, str] = {}
        for step in Nests(graph).ends:
            batcher = _Batcher(graph, step)
            for number in sorted(batcher.before | batcher.after):
                node = graph.nodes[number]
                found[(node.span, node.stack)] = "it is computed for all steps at once"
        return found


class _Batcher:
    """One recurrence: what is computed `before` it and `after` it, for all steps."""

    def __init__(self, graph: Graph, step: str) -> None:
        self.graph, self.step = graph, step
        nests = Nests(graph)
        self.end = graph.nodes[nests.ends[step]]
        assert isinstance(self.end.primitive, Recurrence)
        self.count, carried = self.end.primitive.count, self.end.primitive.carried
        self.held = self.end.operands[:carried]
        self.following = self.end.operands[carried : 2 * carried]
        places = self.end.primitive.places
        self.gathered = list(zip(self.end.operands[2 * carried :], places, strict=True))
        self.body = {n for n, steps in nests.depends.items() if step in steps}
        self.carrying = self._carrying()
        around = set(nests.inside(step))
        self.movable = self._movable({n for n in self.body if nests.depends[n] <= around})
        self.before = self._before()
        self.after = self._after()
        self.b = Builder(graph.facts)
        self.new: dict[Ref, Ref] = {}
        self.lifted: dict[Ref, Ref] = {}

    # What is moved

    def _carrying(self) -> set[int]:
        """Nodes that depend on what is carried."""
        found: set[int] = set()
        for node in self.graph.nodes.values():
            own = isinstance(node.primitive, Carried) and node.primitive.step == self.step
            if node.id in self.body and (own or any(r.node in found for r in node.operands)):
                found.add(node.id)
        return found

    def _movable(self, nodes: set[int]) -> set[int]:
        """Nodes that have a form for all steps, as has what they read that carries nothing."""
        found: set[int] = set()
        for node in self.graph.nodes.values():
            free = [r.node for r in node.operands if r.node in self.body - self.carrying]
            if node.id in nodes and isinstance(node.primitive, KINDS):
                if all(n in found for n in free):
                    found.add(node.id)
        return found

    def _below(self, roots: Iterable[int], within: set[int]) -> set[int]:
        """Nodes among these that the roots read, with themselves."""
        found: set[int] = set()
        pending = [n for n in roots if n in within]
        while pending:
            here = pending.pop()
            if here not in found:
                found.add(here)
                pending.extend(r.node for r in self.graph.nodes[here].operands)
                pending = [n for n in pending if n in within]
        return found

    def _before(self) -> set[int]:
        """Sums that depend on the step alone, with what they read, and what follows them without
        growing."""
        nodes = (self.body - self.carrying) & self.movable
        moved: set[int] = set()
        for number in sorted(nodes):
            node = self.graph.nodes[number]
            sizes = [self.graph.type(r).shape for r in node.operands if r.node in moved]
            follows = any(self._fits(node.type.shape, size, 1) for size in sizes)
            if isinstance(node.primitive, Reduce) or follows:
                moved |= self._below([number], nodes)
        return moved

    def _after(self) -> set[int]:
        """Sums that no later step depends on, with what follows them."""
        needed = self._below([ref.node for ref in self.following], self.body)
        nodes = (self.carrying - needed) & self.movable
        sums = {n for n in nodes if isinstance(self.graph.nodes[n].primitive, Reduce)}
        moved: set[int] = set()
        for number in sorted(nodes):
            if number in sums or any(r.node in moved for r in self.graph.nodes[number].operands):
                moved |= self._below([number], nodes)
        return moved if self._gathers_little(moved) else set()

    def _gathers_little(self, moved: set[int]) -> bool:
        """Whether what must be gathered for it is not much larger than what comes out."""
        known = {ref for ref, _ in self.gathered}
        extra, out = const(0), const(0)
        for ref in self._boundary(moved):
            if ref not in known:
                extra = extra + _size(self.graph.type(ref).shape)
        for ref, _ in self.gathered:
            if ref.node in moved:
                out = out + _size(self.graph.type(ref).shape)
        return self._fits((extra,), (out,), GROWTH)

    def _boundary(self, moved: set[int]) -> list[Ref]:
        """What nodes read that is carried, or computed from it, and stays in the steps."""
        found: dict[Ref, None] = {}
        for number in sorted(moved):
            for ref in self.graph.nodes[number].operands:
                if ref.node in self.carrying and ref.node not in moved:
                    found[ref] = None
        return list(found)

    def _fits(self, size: Sequence[Expr], other: Sequence[Expr], times: int) -> bool:
        return self.graph.facts.is_nonneg(_size(other) * times - _size(size))

    # The new graph

    def run(self) -> Graph:
        out = [ref for ref, _ in self.gathered if self._leaves(ref)]
        nodes = self.after | {r.node for r in out}
        late = self._below(nodes, (self.body - self.carrying) | self.after) & self.movable
        stays = [(ref, at) for ref, at in self.gathered if ref not in out]
        for ref in self._boundary(late):
            if ref not in (r for r, _ in stays):
                stays.append((ref, sym(self.step)))
        kept = self._kept([ref.node for ref, _ in stays])
        for node in self.graph.nodes.values():
            with self.b.at(node.span, node.stack, node.label):
                if node.id == self.end.id:
                    self._end(kept, stays, sorted(late - self.before))
                elif node.id in self.before:
                    self._lift(node)
                    for ref in _refs(node):
                        self.new[ref] = self._one_step(self.lifted[ref], self.graph.type(ref))
                else:
                    self._copy(node, kept)
        self.b.graph.results = tuple(self.new[ref] for ref in self.graph.results)
        return self.b.graph.live()

    def _leaves(self, ref: Ref) -> bool:
        """Whether something gathered is computed for all steps instead."""
        free = ref.node not in self.carrying and (
            ref.node not in self.body or ref.node in self.movable
        )
        return free or ref.node in self.after

    def _kept(self, gathered: Sequence[int]) -> list[int]:
        """The numbers of the carried values that something depends on."""
        uses = self.graph.uses()
        numbers = range(len(self.held))
        last = {Ref(self.end.id, k) for k in numbers}
        kept = {k for k in numbers if Ref(self.end.id, k) in uses} | {
            ref.result for ref in self.graph.results if ref in last
        }
        while True:
            roots = [*gathered, *(self.following[k].node for k in kept)]
            below = self._below(roots, self.body - self.before)
            found = kept | {k for k in numbers if self.held[k].node in below}
            if found == kept:
                return sorted(kept)
            kept = found

    def _copy(self, node: Node, kept: list[int]) -> None:
        """A node as it is; a carried one gets its new number, or goes."""
        primitive = node.primitive
        if isinstance(primitive, Carried) and primitive.step == self.step:
            if primitive.number not in kept:
                return
            primitive = Carried(self.step, kept.index(primitive.number))
        if all(ref in self.new for ref in node.operands):
            operands = [self.new[ref] for ref in node.operands]
            made = self.b.add(primitive, operands, node.types)
            self.new.update(zip(_refs(node), made, strict=True))

    def _end(self, kept: list[int], stays: Sequence[tuple[Ref, Expr]], late: list[int]) -> None:
        """The recurrence, and what is computed after it."""
        held = [self.new[self.held[k]] for k in kept]
        following = [self.new[self.following[k]] for k in kept]
        gathered = [(self.new[ref], at) for ref, at in stays]
        made: tuple[Ref, ...] = ()
        if held or gathered:
            made = recurrence(self.b, self.step, self.count, held, following, gathered)
        self.new.update((Ref(self.end.id, k), made[n]) for n, k in enumerate(kept))
        whole = dict(zip((ref for ref, _ in stays), made[len(kept) :], strict=True))
        for ref, at in stays:
            self.lifted.setdefault(ref, self._mirrored(whole[ref], at))
        for number in late:
            self._lift(self.graph.nodes[number])
        for place, (ref, at) in enumerate(self.gathered):
            result = Ref(self.end.id, len(self.held) + place)
            if self._leaves(ref):
                self.new[result] = self._mirrored(self._all_steps(ref), at)
            else:
                self.new[result] = made[len(kept) + stays.index((ref, at))]

    # All steps

    def _mirrored(self, x: Ref, at: Expr) -> Ref:
        """Values of all steps from the last to the first, if that is their place."""
        if at == sym(self.step):
            return x
        shape = self.b.type(x).shape
        return self.b.view(x, shape, lambda *i: [shape[0] - 1 - i[0], *i[1:]])

    def _one_step(self, x: Ref, type: TensorType) -> Ref:
        return self.b.view(x, type.shape, lambda *at: [sym(self.step), *at])

    def _all_steps(self, ref: Ref) -> Ref:
        """The values of all steps along a new first axis."""
        if ref in self.lifted:
            return self.lifted[ref]
        x = self.new[ref]
        return self.b.broadcast(x, (self.count, *self.b.type(x).shape))

    def _lift(self, node: Node) -> None:
        """A node for all steps at once."""
        types = tuple(gathered_type(t, self.count) for t in node.types)
        primitive, operands = self._lifted_form(node)
        made = self.b.add(primitive, operands, types)
        self.lifted.update(zip(_refs(node), made, strict=True))

    def _lifted_form(self, node: Node) -> tuple[Primitive, list[Ref]]:
        p = node.primitive
        if isinstance(p, View | Gather | Position):
            return self._lifted_map(node, p)
        operands = [self._all_steps(ref) for ref in node.operands]
        match p:
            case Reduce():
                return Reduce(p.kind, tuple(a + 1 for a in p.axes)), operands
            case Concat() | Scan() | Sort():
                return replace(p, axis=p.axis + 1), operands
        return p, operands

    def _lifted_map(
        self, node: Node, p: View | Gather | Position
    ) -> tuple[Primitive, list[Ref]]:
        """An index map with one more symbol, that of the step."""
        symbols = self.b.symbols(node.type.rank + 1)
        facts = self.b.ranges(symbols, (self.count, *node.type.shape))
        at = {old: sym(new) for old, new in zip(p.symbols, symbols[1:], strict=True)}
        at[self.step] = sym(symbols[0])

        def moved(expr: Expr) -> Expr:
            return expr.substitute(at, facts)

        def all_moved(exprs: Sequence[Expr], operand: int) -> tuple[Expr, ...]:
            lead = (sym(symbols[0]),) if node.operands[operand] in self.lifted else ()
            return (*lead, *map(moved, exprs))

        def index(e: Expr | Indirect) -> Expr | Indirect:
            if isinstance(e, Expr):
                return moved(e)
            within = all_moved(e.indices, e.operand)
            return Indirect(e.operand, within, moved(e.scale), moved(e.offset))

        operands = [self.lifted.get(ref) or self.new[ref] for ref in node.operands]
        if isinstance(p, Position):
            return Position(symbols, moved(p.expr)), operands
        if isinstance(p, View):
            guard = tuple(map(moved, p.guard))
            return View(symbols, all_moved(p.indices, 0), guard, p.fill), operands
        lead = (sym(symbols[0]),) if node.operands[0] in self.lifted else ()
        return Gather(symbols, (*lead, *map(index, p.indices))), operands


def _refs(node: Node) -> list[Ref]:
    return [Ref(node.id, i) for i in range(len(node.types))]


def _size(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total
