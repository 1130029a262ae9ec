"""Values on demand: from the stored results back, by substituting index maps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate

from stagefuse.compiler.fusion.groups import Group, flops
from stagefuse.compiler.graph import (
    Concat,
    Gather,
    Graph,
    Indirect,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    View,
    Within,
)
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Checked,
    Const,
    Fold,
    Index,
    Load,
    Local,
    Op,
    Store,
    Value,
)
from stagefuse.compiler.patterns.softmax import is_product
from stagefuse.compiler.proofs.value_ranges import is_position
from stagefuse.compiler.schedule import Schedule
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import BOOL, I64
from stagefuse.dsl.points import Start

from .blocks import Blocks, Sites
from .expressions import all_of, as_dtype, expand, minus, product_of, symbols_of
from .ratios import is_ratio
from .shares import share, shared_sum

SHORT = ("exp", "sigmoid")
"""Functions whose results in fewer than 32 bits need fewer instructions."""


class Lowering(Blocks):
    """Computes graph values inside the kernel, each once in the outermost scope that can."""

    def __init__(self, graph: Graph, group: Group, sites: Sites, schedule: Schedule) -> None:
        self.ends_of: dict[int, list[Expr]] = {}  # of the parts of concatenations, by node
        super().__init__(graph, group, sites, schedule)
        self.staged = self.choose_staged()
        self.made: dict[tuple[Ref, tuple[Value, ...], tuple[Value, ...]], Value] | None = None
        self.keeps_f32 = False  # products in 16 bits are not rounded inside the kernel

    def store(self, at: Sequence[Expr]) -> None:
        """Stores every root at a position of the domain."""
        for ref in self.group.roots:
            flat = self.flat and ref not in self.group.placed
            self.store_root(ref, at[: self.graph.type(ref).rank] if flat else at)

    def store_root(self, ref: Ref, at: Sequence[Expr]) -> None:
        """Stores a root's value at a position of it, wherever that is placed."""
        value = self.value(self.group.source(ref), tuple(map(Index, at)), ())
        if ref in self.group.placed:
            here = {f"d{a}": e for a, e in enumerate(at)}
            at = [e.substitute(here, self.facts) for e in self.group.placed[ref][1]]
        self.emit(Store(self.buffer(ref, "out").name, tuple(map(Index, at)), value))

    def when(self, tests: Sequence[Expr], body: Callable[[], None]) -> None:
        """Statements that run where expressions are at least 0."""
        conditions = [c for e in tests if (c := self.nonneg(Index(e))) is not None]
        if not conditions:
            return body()
        self.branch(all_of(conditions), body)

    @contextmanager
    def part(
        self, group: Group, products: Mapping[Ref, Callable[[tuple[Value, ...]], Value]]
    ) -> Iterator[None]:
        """Inside, values are those of another kernel that is part of this one.

        `products` says where the results of its matrix products lie, and whatever else a
        statement makes.
        """
        before = self.group, self.products, self.staged
        self.group, self.products = group, dict(products)
        self.staged = self.choose_staged()
        try:
            with self.elsewhere():
                yield
        finally:
            self.group, self.products, self.staged = before

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside, values are made for another block: nothing made so far stands for them."""
        before, self.made = self.made, None
        try:
            yield
        finally:
            self.made = before

    # Values

    def choose_staged(self) -> set[int]:
        """Dear values that more than one pass over the row needs."""
        if self.group.kind != "row" or not self.group.row_axes:
            return set()
        chosen: set[int] = set()
        for member in sorted(self.group.members, reverse=True):
            node = self.graph.nodes[member]
            accesses = self.group.accesses.get(member, [])
            if (
                isinstance(node.primitive, Map)
                and len(accesses) > 1
                and flops(node) >= self.schedule.stage_flops
                and node.type.shape == self.group.domain
            ):
                chosen.add(member)
        return chosen

    def cost(self) -> int:
        return sum(flops(self.graph.nodes[m]) for m in self.group.members)

    def value(self, ref: Ref, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        """The scalar value of a result at a position.

        Each is made once for the value that is asked for outermost, so that a chain in which
        every value is used twice takes no power of two.
        """
        outermost = self.made is None
        made = self.made = {} if self.made is None else self.made
        key = (ref, at, guard)
        try:
            if key not in made:
                made[key] = self._make(ref, at, guard)
            return made[key]
        finally:
            if outermost:
                self.made = None

    def _make(self, ref: Ref, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        if ref in self.products:
            return self.products[ref](at)
        node = self.graph.nodes[ref.node]
        type = node.types[ref.result]
        if self.group.kind in ("scan", "sort", "scatter") and ref in self.group.roots:
            return Load(self.buffer(ref, "out").name, at, type.dtype, guard)
        if ref.node not in self.group.members:
            if self.flat:
                at = at[:1] if type.shape else ()
            return Load(self.buffer(ref, "in").name, at, type.dtype, guard)
        primitive = node.primitive
        if isinstance(primitive, Scalar):
            return Const(primitive.value, type.dtype.compute)
        if isinstance(primitive, Map):
            return self.map(node, at, guard)
        if isinstance(primitive, View):
            return self.view(node, at, guard)
        if isinstance(primitive, Position):
            return self.index(primitive.expr, dict(zip(primitive.symbols, at, strict=True)))
        if isinstance(primitive, Gather):
            return self.gather(node, at, guard)
        if isinstance(primitive, Within):
            value = as_dtype(self.value(node.operands[0], at, guard), I64)
            site = self.sites.number(node.span, primitive.extent, primitive.length)
            return Checked(value, primitive.extent, site, False, primitive.length)
        if isinstance(primitive, Concat):
            return self.concat(node, at, guard)
        if isinstance(primitive, Reduce):
            return self.reduce(ref, at)
        raise AssertionError(f"{primitive} has no value inside a kernel")

    def map(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        primitive, dtype = node.primitive, node.type.dtype
        assert isinstance(primitive, Map)
        if node.id in self.staged and not guard:
            return self.stage(node, at)
        args = tuple(self.value(ref, at, guard) for ref in node.operands)
        if shared_sum(self.graph, node) in self.group.members:
            return share(*args)
        if self.schedule.short_forms and is_ratio(self.graph, self.group, node):
            return Op("ratio", args, dtype.compute)
        if primitive.fn != "cast":
            short = self.schedule.short_forms and primitive.fn in SHORT and dtype.is_small_float
            return Op(primitive.fn, args, dtype.compute, dtype if short else None)
        value = as_dtype(args[0], dtype.compute)
        rounds = dtype.is_small_float and not (self.keeps_f32 and is_product(self.graph, node))
        if rounds and self.graph.type(node.operands[0]).dtype != dtype:
            return Op("round_to", (value,), dtype.compute, dtype)
        return value

    def stage(self, node: Node, at: tuple[Value, ...]) -> Value:
        """Computes a value for the whole row once, into scratch."""
        inner = sorted(self.group.row_axes or ())
        outer = tuple(v for i, v in enumerate(at) if i not in inner)
        key = ("stage", node.id, outer)
        scope = self.scope_for(symbols_of(outer))
        dtype = node.type.dtype.compute
        if key not in scope.known:
            name = self.name("row")
            scope.known[key] = Local(name, dtype)
            depth = self.scopes.index(scope)
            inside, self.scopes = self.scopes, self.scopes[: depth + 1]
            self.emit(Alloc(name, dtype, tuple(self.group.domain[a] for a in inner)))
            loops = [(f"s{a}", self.group.domain[a]) for a in inner]
            spot = tuple(Index(sym(n)) for n, _ in loops)
            place = iter(spot)
            here = tuple(next(place) if i in inner else v for i, v in enumerate(at))

            def fill() -> None:
                assert isinstance(node.primitive, Map)
                self.staged.discard(node.id)
                with self.elsewhere():
                    self.emit(Store(name, spot, self.map(node, here, ())))
                self.staged.add(node.id)

            self.nest(loops, fill)
            self.scopes = inside
        row = scope.known[key]
        assert isinstance(row, Local)
        return Load(row.name, tuple(at[a] for a in inner), dtype)

    def index(self, expr: Expr, at: Mapping[str, Value]) -> Value:
        """An index expression with its symbols replaced by values."""
        used = {name: at[name] for name in expr.symbols() if name in at}
        if all(isinstance(v, Index) for v in used.values()):
            exprs = {n: v.expr for n, v in used.items() if isinstance(v, Index)}
            return Index(expr.substitute(exprs, self.facts))
        return expand(expr, used)

    def view(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        view = node.primitive
        assert isinstance(view, View)
        if self.flat:  # a single element, repeated
            return self.value(node.operands[0], (), guard)
        here = dict(zip(view.symbols, at, strict=True))
        place = tuple(self.index(e, here) for e in view.indices)
        tested = (self.nonneg(self.index(g, here)) for g in view.guard)
        conditions = tuple(c for c in tested if c is not None)
        value = self.value(node.operands[0], place, (*guard, *conditions))
        if not conditions:
            return value
        fill = Const(view.fill, value.dtype)
        if isinstance(value, Load) and not guard:
            return replace(value, fill=view.fill)
        return Op("select", (all_of(conditions), value, fill), value.dtype)

    def nonneg(self, value: Value) -> Value | None:
        if isinstance(value, Index) and self.facts.is_nonneg(value.expr):
            return None
        return Op("ge", (value, Const(0, I64)), BOOL)

    def gather(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        gather = node.primitive
        assert isinstance(gather, Gather)
        here = dict(zip(gather.symbols, at, strict=True))
        extents = self.graph.type(node.operands[0]).shape
        place: list[Value] = []
        checks = False
        for index, extent in zip(gather.indices, extents, strict=True):
            if not isinstance(index, Indirect):
                place.append(self.index(index, here))
                continue
            place.append(found := self.checked(node, index, extent, here, guard))
            checks = checks or not found.proved
        filled = product_of(extents).as_int()
        if checks and not filled:
            # an empty table has no element 0 to read instead
            size = Index(product_of(extents) - 1)
            if not self.facts.is_nonneg(size.expr):
                guard = (*guard, Op("ge", (size, Const(0, I64)), BOOL))
        return self.value(node.operands[0], tuple(place), guard)

    def checked(
        self, node: Node, index: Indirect, extent: Expr, here: Mapping[str, Value],
        guard: tuple[Value, ...] = (),
    ) -> Checked:  # fmt: skip
        """A position that a gather reads from data, along an axis of its operand."""
        gather, ref = node.primitive, node.operands[index.operand]
        assert isinstance(gather, Gather)
        value = self.value(ref, tuple(self.index(e, here) for e in index.indices), guard)
        value = as_dtype(value, I64)
        inside = self.graph.facts.at_element(gather.symbols, node.type.shape)
        proved = index.scale == const(1) and is_position(
            self.graph, ref, extent, index.offset, inside
        )
        if index.scale != const(1):
            value = Op("mul", (value, self.index(index.scale, here)), I64)
        if index.offset != const(0):
            value = Op("add", (value, self.index(index.offset, here)), I64)
        site = 0 if proved else self.sites.number(node.span, extent)
        return Checked(value, extent, site, proved)

    def concat(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        """The part that a position lies in; those that it is known not to lie in are left out."""
        assert isinstance(node.primitive, Concat)
        axis = node.primitive.axis
        position, result = at[axis], None
        parts = list(zip(node.operands, *self.stretches(node), strict=True))
        if isinstance(position, Index):
            parts = self._around(position, parts) or parts[-1:]
        for ref, start, end in reversed(parts):
            high = Op("lt", (position, Index(end)), BOOL)
            inside = minus(position, start)
            tests = (self.nonneg(inside), None if self._is_below(position, end) else high)
            place = (*at[:axis], inside, *at[axis + 1 :])
            value = self.value(ref, place, (*guard, *(t for t in tests if t is not None)))
            result = value if result is None else Op("select", (high, value, result), value.dtype)
        assert result is not None
        return result

    def _is_below(self, position: Value, end: Expr) -> bool:
        return isinstance(position, Index) and self.facts.prove_lt(position.expr, end)

    def _around(
        self, position: Index, parts: list[tuple[Ref, Expr, Expr]]
    ) -> list[tuple[Ref, Expr, Expr]]:
        """The parts that a position may lie in. They follow each other, since none has a negative
        size: those before one that ends before it are out, and those after one that begins after
        it. Looked at from where it lies for some sizes, most parts never are."""
        at = Start(self.facts.ranges, parts[-1][1].symbols())
        near = 0
        with suppress(KeyError):
            here = position.expr.evaluate(at)
            near = bisect_right(parts, here, 1, key=lambda part: part[1].evaluate(at)) - 1
        first, last = near + 1, near
        while first > 0 and not self._is_beyond(position, parts[first - 1][2]):
            first -= 1
        while last + 1 < len(parts) and not self._is_below(position, parts[last + 1][1]):
            last += 1
        return [
            (ref, start, end)
            for ref, start, end in parts[first : last + 1]
            if not (self._is_beyond(position, end) or self._is_below(position, start))
        ]

    def _is_beyond(self, position: Value, end: Expr) -> bool:
        return isinstance(position, Index) and self.facts.prove_le(end, position.expr)

    def stretches(self, node: Node) -> tuple[list[Expr], list[Expr]]:
        """Where the parts of a concatenation begin and end along its axis."""
        assert isinstance(node.primitive, Concat)
        if node.id not in self.ends_of:
            sizes = (self.graph.type(ref).shape[node.primitive.axis] for ref in node.operands)
            self.ends_of[node.id] = list(accumulate(sizes))
        ends = self.ends_of[node.id]
        return [const(0), *ends[:-1]], ends

    def reduce(self, ref: Ref, at: tuple[Value, ...]) -> Value:
        scope = self.scope_for(symbols_of(at))
        if self.column is not None and (ref, at) in self.scopes[0].known:
            return self.scopes[0].known[(ref, at)]
        if (ref, at) not in scope.known:
            depth = self.scopes.index(scope)
            inside, self.scopes = self.scopes, self.scopes[: depth + 1]
            value = self.folded(ref, at)
            self.scopes = inside
            scope.known[(ref, at)] = value
        return scope.known[(ref, at)]

    def folded(self, ref: Ref, at: tuple[Value, ...]) -> Value:
        """An element of a reduction, by a fold where statements now go."""
        node = self.graph.nodes[ref.node]
        primitive = node.primitive
        assert isinstance(primitive, Reduce)
        operand = node.operands[0]
        shape = self.graph.type(operand).shape
        loops = tuple((f"f{a}", shape[a]) for a in primitive.axes)
        kept = iter(at)
        place = tuple(
            Index(sym(f"f{a}")) if a in primitive.axes else next(kept) for a in range(len(shape))
        )
        before = self.facts
        self.facts = before.with_ranges({n: (0, e - 1) for n, e in loops})
        with self.elsewhere():
            value = self.value(operand, place, ())
        self.facts = before
        dtype = node.type.dtype.compute
        if not primitive.kind.startswith("arg"):
            value = as_dtype(value, dtype)
        name = self.name("r")
        self.emit(Fold(name, primitive.kind, loops, value, dtype))
        return Local(name, dtype)
