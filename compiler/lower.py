"""A group of nodes becomes one kernel: loops, reductions at the right depth, stores.

Values are built on demand from the stored results back, by substituting index maps. A reduction
inside is emitted once, in the outermost scope that binds what it depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stagefuse.dsl.dims import Expr, Facts, as_expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType
from stagefuse.dsl.source import Span

from .fuse import Group, flops
from .graph import (
    Concat,
    Contract,
    Gather,
    Graph,
    Indirect,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Scatter,
    Sort,
    View,
    flatten_index,
    split_index,
)
from .kernel_ir import (
    Alloc,
    Buffer,
    Checked,
    Const,
    Fold,
    For,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Op,
    SortRow,
    Statement,
    Store,
    TileProduct,
    Value,
)

CHUNK = 4096
"""Elements of a flat pointwise kernel that one parallel step handles."""
COLUMNS = 256
"""Adjacent columns that a column reduction keeps as accumulators in the first-level cache."""
ROW_TILE = {48: 36, 64: 42, 32: 42, 16: 30}
"""Rows of a product's scratch tile, by panel width: whole register tiles of AVX-512 and AVX2 (9
and 4, 14 and 6, 14 and 6, 30 and 6 rows), in the first-level cache (36 x 48 f32 are 7 KB)."""
TILES_PER_BLOCK = 4
PANEL_GROUP = 2
STAGE_FLOPS = 8
"""A value this dear that several passes over a row need is kept in a scratch row."""

COMBINE = {
    "sum": ("add", 0),
    "prod": ("mul", 1),
    "any": ("or", False),
    "all": ("and", True),
    "max": ("maximum", None),
    "min": ("minimum", None),
}


@dataclass(frozen=True)
class Lowered:
    """A kernel with the graph values that its buffers are, in order."""

    kernel: Kernel
    values: tuple[Ref, ...]
    count: Expr
    grain: Expr
    label: str
    nodes: tuple[int, ...]


@dataclass
class Sites:
    """The places whose data-dependent positions are checked, numbered from 0."""

    spans: list[Span | None] = field(default_factory=list)

    def number(self, span: Span | None) -> int:
        if span not in self.spans:
            self.spans.append(span)
        return self.spans.index(span)


@dataclass
class _Scope:
    """A block under construction, and the loop symbols bound around it and by it."""

    bound: frozenset[str]
    body: list[Statement] = field(default_factory=list)
    known: dict[object, Value] = field(default_factory=dict)


def lower(graph: Graph, group: Group, sites: Sites) -> Lowered:
    """The kernel of a group."""
    return _Lowering(graph, group, sites).run()


def lowest(dtype: DType) -> float | int | bool:
    """The identity of max: minus infinity, the least integer, or false."""
    if dtype.is_float:
        return float("-inf")
    return False if dtype.is_bool else (0 if dtype.kind == "uint" else -(1 << (dtype.bits - 1)))


def highest(dtype: DType) -> float | int | bool:
    """The identity of min."""
    if dtype.is_float:
        return float("inf")
    return True if dtype.is_bool else (1 << (dtype.bits - (dtype.kind == "int"))) - 1


def identity(kind: str, dtype: DType) -> Const:
    """What a reduction of nothing gives."""
    if kind in ("max", "argmax"):
        return Const(lowest(dtype), dtype)
    if kind in ("min", "argmin"):
        return Const(highest(dtype), dtype)
    start = COMBINE[kind][1]
    return Const(float(start or 0) if dtype.is_float else start or 0, dtype)


class _Lowering:
    def __init__(self, graph: Graph, group: Group, sites: Sites) -> None:
        self.graph, self.group, self.sites = graph, group, sites
        self.buffers: dict[Ref, Buffer] = {}
        self.flat = False
        self.scopes: list[_Scope] = []
        self.fresh = 0
        self.tile: tuple[Value, Value] | None = None
        self.column: tuple[Expr, Expr] | None = None
        self.facts: Facts = graph.facts
        self.staged = self._staged()

    def run(self) -> Lowered:
        form: Callable[[], tuple[list[tuple[str, Expr]], Expr]] = {
            "pointwise": self._pointwise,
            "row": self._row,
            "contract": self._contract,
            "scan": self._scan,
            "sort": self._sort,
            "scatter": self._scatter,
        }[self.group.kind]
        self.scopes = [_Scope(frozenset())]
        parallel, work = form()
        body = tuple(self.scopes[0].body)
        count = const(1)
        for _, extent in parallel:
            count = count * extent
        buffers = tuple(self.buffers.values())
        exprs = _exprs_of(body) | {e for b in buffers for e in b.shape} | {e for _, e in parallel}
        loops = {name for name, _ in parallel} | _bound_names(body)
        dims = tuple(sorted(frozenset[str]().union(*(e.symbols() for e in exprs)) - loops))
        kernel = Kernel("", buffers, dims, tuple(parallel), body)
        digest = hashlib.sha256(repr(kernel).encode()).hexdigest()[:10]
        label = self._label()
        kernel = replace(kernel, name=f"k_{digest}", label=label)
        grain = floordiv(const(16384) + work - 1, _at_least_one(work))
        nodes = tuple(sorted(self.group.members))
        return Lowered(kernel, tuple(self.buffers), count, grain, label, nodes)

    def _label(self) -> str:
        root = self.graph.nodes[self.group.roots[0].node]
        return root.label or "kernel"

    # Buffers and scopes

    def _buffer(self, ref: Ref, mode: str) -> Buffer:
        if ref not in self.buffers:
            type = self.graph.type(ref)
            shape = type.shape
            if self.flat:
                shape = (_product(shape),) if shape else ()
            self.buffers[ref] = Buffer(f"b{len(self.buffers)}", type.dtype, shape, mode)
        elif self.buffers[ref].mode != mode:
            self.buffers[ref] = replace(self.buffers[ref], mode="inout")
        return self.buffers[ref]

    def _name(self, prefix: str) -> str:
        self.fresh += 1
        return f"{prefix}{self.fresh}"

    def _emit(self, statement: Statement) -> None:
        self.scopes[-1].body.append(statement)

    def _loop(
        self, index: str, lo: Expr, hi: Expr, body: Callable[[], None], vector: bool = False
    ) -> None:
        self.facts = self.facts.with_ranges({index: (lo, hi - 1)})
        self.scopes.append(_Scope(self.scopes[-1].bound | {index}))
        body()
        scope = self.scopes.pop()
        self._emit(For(index, lo, hi, tuple(scope.body), vector))

    def _nest(self, loops: Sequence[tuple[str, Expr]], body: Callable[[], None]) -> None:
        """Loops over whole axes, the last one a vector loop."""
        if not loops:
            return body()
        (index, extent), rest = loops[0], loops[1:]
        self._loop(index, const(0), extent, lambda: self._nest(rest, body), vector=not rest)

    def _scope_for(self, symbols: frozenset[str]) -> _Scope:
        """The outermost scope that binds these loop symbols."""
        everything = frozenset[str]().union(*(s.bound for s in self.scopes))
        needed = symbols & everything
        return next(s for s in self.scopes if needed <= s.bound)

    # Kernel forms

    def _bind(self, parallel: Sequence[tuple[str, Expr]]) -> None:
        self.scopes[0].bound |= {name for name, _ in parallel}
        self.facts = self.facts.with_ranges({n: (0, e - 1) for n, e in parallel})

    def _store(self, at: Sequence[Expr]) -> None:
        """Stores every root at a position of the domain."""
        for ref in self.group.roots:
            place = at[: self.graph.type(ref).rank] if self.flat else at
            values = tuple(map(Index, place))
            value = self._value(ref, values, ())
            buffer = self._buffer(ref, "out")
            self._emit(Store(buffer.name, values, value))

    def _axes(self, axes: Sequence[int]) -> list[tuple[str, Expr]]:
        return [(f"d{a}", self.group.domain[a]) for a in axes]

    def _pointwise(self) -> tuple[list[tuple[str, Expr]], Expr]:
        domain = self.group.domain
        if not domain:
            self._store(())
            return [], const(1)
        self.flat = self._is_flat()
        total = _product(domain) if self.flat else domain[-1]
        outer = [] if self.flat else self._axes(range(len(domain) - 1))
        index = "d0" if self.flat else f"d{len(domain) - 1}"
        lead = [sym(name) for name, _ in outer]
        if outer:
            parallel, lo, hi = outer, const(0), total
        else:
            parallel = [("chunk", floordiv(total + (CHUNK - 1), CHUNK, self.facts))]
            lo = sym("chunk") * CHUNK
            hi = minimum(lo + CHUNK, total)
        self._bind(parallel)
        work = (total if outer else const(CHUNK)) * max(1, self._cost())
        self._loop(index, lo, hi, lambda: self._store((*lead, sym(index))), vector=True)
        return parallel, work

    def _is_flat(self) -> bool:
        """Whether every operand is read just where the result is written, or is one element."""
        identity = tuple(sym(f"d{i}") for i in range(len(self.group.domain)))
        for member in self.group.members:
            node = self.graph.nodes[member]
            if isinstance(node.primitive, View):
                if self.graph.type(node.operands[0]).shape:
                    return False
            elif not isinstance(node.primitive, Map | Scalar):
                return False
            for ref in node.operands:
                shape = self.graph.type(ref).shape
                if shape and (shape != self.group.domain):
                    return False
        return len(identity) > 0 and all(
            self.graph.type(r).shape == self.group.domain for r in self.group.roots
        )

    def _row(self) -> tuple[list[tuple[str, Expr]], Expr]:
        domain, inner = self.group.domain, self.group.row_axes or ()
        outer = [a for a in range(len(domain)) if a not in inner]
        if not inner and self._is_column():
            return self._columns()
        parallel = self._axes(outer)
        self._bind(parallel)
        position = [sym(f"d{a}") for a in range(len(domain))]
        full = [r for r in self.group.roots if self.graph.type(r).shape == domain]
        for ref in self.group.roots:
            if ref not in full:
                access = self.group.accesses[ref.node][0] or ()
                at = tuple(map(Index, access))
                self._emit(Store(self._buffer(ref, "out").name, at, self._value(ref, at, ())))

        def store() -> None:
            for ref in full:
                at = tuple(map(Index, position))
                value = self._value(ref, at, ())
                self._emit(Store(self._buffer(ref, "out").name, at, value))

        if full:
            self._nest(self._axes(sorted(inner)), store)
        length = _product([domain[a] for a in inner])
        for member in self.group.members:
            node = self.graph.nodes[member]
            if isinstance(node.primitive, Reduce):
                shape = self.graph.type(node.operands[0]).shape
                reduced = _product([shape[a] for a in node.primitive.axes])
                length = length if inner else reduced
        return parallel, _at_least_one(length) * max(1, self._cost())

    def _is_column(self) -> bool:
        """Whether memory runs along the kept axis: then accumulate whole stretches of columns."""
        if not self.group.domain or self.group.domain[-1].as_int() in range(8):
            return False
        for member in self.group.members:
            node = self.graph.nodes[member]
            if isinstance(node.primitive, Reduce):
                rank = self.graph.type(node.operands[0]).rank
                if rank - 1 in node.primitive.axes or node.primitive.kind.startswith("arg"):
                    return False
        return True

    def _columns(self) -> tuple[list[tuple[str, Expr]], Expr]:
        domain = self.group.domain
        last = len(domain) - 1
        blocks = floordiv(domain[last] + (COLUMNS - 1), COLUMNS, self.facts)
        parallel = [*self._axes(range(last)), ("block", blocks)]
        self._bind(parallel)
        lo = sym("block") * COLUMNS
        hi = minimum(lo + COLUMNS, domain[last])
        self.column = (lo, hi)
        position = [sym(f"d{a}") for a in range(len(domain))]
        symbol = f"d{last}"
        self.facts = self.facts.with_ranges({symbol: (0, domain[last] - 1)})
        marks = tuple(map(Index, position))
        for member in sorted(self.group.members):  # accumulators first, in order of the graph
            node = self.graph.nodes[member]
            if isinstance(node.primitive, Reduce):
                access = tuple(map(Index, self.group.accesses[member][0] or ()))
                self._accumulate(Ref(member), access if access else marks)
        self._loop(symbol, lo, hi, lambda: self._store(position), vector=True)
        return parallel, const(COLUMNS * 16)

    def _accumulate(self, ref: Ref, at: tuple[Value, ...]) -> None:
        """Emits the accumulation of a block of columns and remembers where the sums are."""
        assert self.column is not None
        lo, hi = self.column
        node = self.graph.nodes[ref.node]
        primitive = node.primitive
        assert isinstance(primitive, Reduce)
        dtype = node.type.dtype.compute
        name = self._name("columns")
        self._emit(Alloc(name, dtype, (const(COLUMNS),)))
        symbol = f"d{len(self.group.domain) - 1}"
        here = (Index(sym(symbol) - lo),)
        start = identity(primitive.kind, dtype)
        self._loop(symbol, lo, hi, lambda: self._emit(Store(name, here, start)), vector=True)
        operand = node.operands[0]
        shape = self.graph.type(operand).shape
        loops = [(f"f{a}", shape[a]) for a in primitive.axes]
        kept = iter(at)
        inside = tuple(
            Index(sym(f"f{a}")) if a in primitive.axes else next(kept) for a in range(len(shape))
        )
        combine = COMBINE[primitive.kind][0]

        def step() -> None:
            value = _as_dtype(self._value(operand, inside, ()), dtype)
            total = Op(combine, (Load(name, here, dtype), value), dtype)
            self._emit(Store(name, here, total))

        def nest(rest: list[tuple[str, Expr]]) -> None:
            if rest:
                self._loop(rest[0][0], const(0), rest[0][1], lambda: nest(rest[1:]))
            else:
                self._loop(symbol, lo, hi, step, vector=True)

        nest(loops)
        self.scopes[0].known[(ref, at)] = Load(name, here, dtype)

    def _contract(self) -> tuple[list[tuple[str, Expr]], Expr]:
        assert self.group.anchor is not None
        node = self.graph.nodes[self.group.anchor]
        product = node.primitive
        assert isinstance(product, Contract)
        domain = self.group.domain
        panel, row_tile = product.panel, ROW_TILE[product.panel]
        block = row_tile * TILES_PER_BLOCK
        rows = _product([domain[a] for a in product.rows])
        columns = _product([domain[a] for a in product.columns])
        panels = floordiv(columns + (panel - 1), panel, self.facts)
        batch = self._axes(product.batch)
        blocks = floordiv(rows + (block - 1), block, self.facts)
        groups = floordiv(panels + (PANEL_GROUP - 1), PANEL_GROUP, self.facts)
        parallel = [*batch, ("mb", blocks), ("nb", groups)]
        self._bind(parallel)
        dtype = node.type.dtype
        tile = self._name("tile")
        self._emit(Alloc(tile, dtype, (const(row_tile), const(panel))))
        a = self._buffer(node.operands[0], "in")
        packed = self._buffer(node.operands[1], "in")
        base = product.base.substitute({f"i{x}": sym(f"d{x}") for x in product.batch})
        lead = flatten_index([sym(n) for n, _ in batch], [e for _, e in batch])
        first = sym("mb") * block
        end = minimum(first + block, rows)
        panel_end = minimum(sym("nb") * PANEL_GROUP + PANEL_GROUP, panels)

        def one_tile() -> None:
            start = first + sym("t") * row_tile
            count = minimum(end - start, const(row_tile))
            self._emit(
                TileProduct(
                    tile, const(0), const(panel), a.name, base + start * product.row_stride,
                    product.row_stride, const(1), packed.name,
                    (lead * panels + sym("p")) * product.depth * panel,
                    count, product.depth, row_tile, panel,
                )
            )  # fmt: skip
            width = minimum(columns - sym("p") * panel, const(panel))
            self._loop("r", const(0), count, lambda: one_row(start, width))

        def one_row(start: Expr, width: Expr) -> None:
            self.facts = self.facts.with_ranges({"r": (0, row_tile - 1)})
            self._loop("c", const(0), width, lambda: element(start), vector=True)

        def element(start: Expr) -> None:
            self.tile = (Index(sym("r")), Index(sym("c")))
            self.tile_name = tile
            row = split_index(start + sym("r"), [domain[x] for x in product.rows], self.facts)
            column = split_index(
                sym("p") * panel + sym("c"), [domain[x] for x in product.columns], self.facts
            )
            at: dict[int, Expr] = {x: sym(f"d{x}") for x in product.batch}
            at.update(zip(product.rows, row, strict=True))
            at.update(zip(product.columns, column, strict=True))
            self._store([at.get(x, const(0)) for x in range(len(domain))])

        def all_tiles() -> None:
            self._loop("t", const(0), floordiv(end - first + (row_tile - 1), row_tile), one_tile)

        self._loop("p", sym("nb") * PANEL_GROUP, panel_end, all_tiles)
        return parallel, _at_least_one(product.depth) * (PANEL_GROUP * panel)

    def _other_axes(self, axis: int) -> tuple[list[tuple[str, Expr]], list[Expr]]:
        domain = self.group.domain
        parallel = self._axes([a for a in range(len(domain)) if a != axis])
        self._bind(parallel)
        return parallel, [sym(f"d{a}") for a in range(len(domain))]

    def _scan(self) -> tuple[list[tuple[str, Expr]], Expr]:
        node, primitive = self._anchor(Scan)
        axis = primitive.axis
        parallel, at = self._other_axes(axis)
        dtype = node.type.dtype.compute
        total = self._name("total")
        self._emit(Alloc(total, dtype, ()))
        self._emit(Store(total, (), identity(primitive.kind, dtype)))
        here = tuple(map(Index, at))

        def step() -> None:
            value = _as_dtype(self._value(node.operands[0], here, ()), dtype)
            so_far = Op(COMBINE[primitive.kind][0], (Load(total, (), dtype), value), dtype)
            name = self._name("v")
            self._emit(Let(name, so_far))
            self._emit(Store(total, (), Local(name, dtype)))
            out = self._buffer(self.group.roots[0], "out")
            self._emit(Store(out.name, here, Local(name, dtype)))

        self._loop(f"d{axis}", const(0), self.group.domain[axis], step)
        return parallel, _at_least_one(self.group.domain[axis]) * 4

    def _sort(self) -> tuple[list[tuple[str, Expr]], Expr]:
        node, primitive = self._anchor(Sort)
        axis = primitive.axis
        size = self.group.domain[axis]
        parallel, at = self._other_axes(axis)
        keys, order = self._name("keys"), self._name("order")
        dtype = node.type.dtype.compute
        self._emit(Alloc(keys, dtype, (size,)))
        self._emit(Alloc(order, I64, (size,)))
        here: tuple[Value, ...] = tuple(map(Index, at))
        along: tuple[Value, ...] = (Index(sym(f"d{axis}")),)

        def fill() -> None:
            self._emit(Store(keys, along, self._value(node.operands[0], here, ())))

        def spill() -> None:
            for ref, name, kind in zip(
                self.group.roots, (keys, order), (dtype, I64), strict=True
            ):
                out = self._buffer(ref, "out")
                self._emit(Store(out.name, here, Load(name, along, kind)))

        self._loop(f"d{axis}", const(0), size, fill)
        self._emit(SortRow(keys, order, size, primitive.descending))
        self._loop(f"d{axis}", const(0), size, spill)
        return parallel, _at_least_one(size) * 32

    def _scatter(self) -> tuple[list[tuple[str, Expr]], Expr]:
        node, primitive = self._anchor(Scatter)
        axis = primitive.axis
        base, indices, updates = node.operands
        size = self.group.domain[axis]
        parallel, at = self._other_axes(axis)
        ref = self.group.roots[0]
        here: tuple[Value, ...] = tuple(map(Index, at))
        dtype = node.type.dtype

        def copy() -> None:
            value = self._value(base, here, ())
            self._emit(Store(self._buffer(ref, "out").name, here, value))

        def step() -> None:
            wanted = self._value(indices, (Index(sym("u")),), ())
            name = self._name("at")
            checked = Checked(wanted, size, self.sites.number(node.span))
            self._emit(Let(name, checked))
            place: tuple[Value, ...] = (*here[:axis], Local(name, I64), *here[axis + 1 :])
            source = (*here[:axis], Index(sym("u")), *here[axis + 1 :])
            value = self._value(updates, source, ())
            out = self._buffer(ref, "inout")
            if primitive.kind != "set":
                combine = {"add": "add", "max": "maximum"}[primitive.kind]
                value = Op(combine, (Load(out.name, place, dtype), value), dtype.compute)
            self._emit(Store(out.name, place, value))

        self._loop(f"d{axis}", const(0), size, copy)
        count = self.graph.type(updates).shape[axis]
        self._loop("u", const(0), count, step)
        return parallel, _at_least_one(size + count)

    def _anchor(self, kind: type) -> tuple[Node, Any]:
        node = self.graph.nodes[self.group.roots[0].node]
        assert isinstance(node.primitive, kind)
        return node, node.primitive

    # Values

    def _staged(self) -> set[int]:
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
                and flops(node) >= STAGE_FLOPS
                and node.type.shape == self.group.domain
            ):
                chosen.add(member)
        return chosen

    def _cost(self) -> int:
        return sum(flops(self.graph.nodes[m]) for m in self.group.members)

    def _value(self, ref: Ref, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        """The scalar value of a result at a position."""
        node = self.graph.nodes[ref.node]
        type = node.types[ref.result]
        if self.group.kind in ("scan", "sort", "scatter") and ref in self.group.roots:
            return Load(self._buffer(ref, "out").name, at, type.dtype, guard)
        if ref.node not in self.group.members:
            if self.flat:
                at = at[:1] if type.shape else ()
            return Load(self._buffer(ref, "in").name, at, type.dtype, guard)
        primitive = node.primitive
        if isinstance(primitive, Scalar):
            return Const(primitive.value, type.dtype.compute)
        if isinstance(primitive, Map):
            return self._map(node, at, guard)
        if isinstance(primitive, View):
            return self._view(node, at, guard)
        if isinstance(primitive, Position):
            return self._index(primitive.expr, dict(zip(primitive.symbols, at, strict=True)))
        if isinstance(primitive, Gather):
            return self._gather(node, at, guard)
        if isinstance(primitive, Concat):
            return self._concat(node, at, guard)
        if isinstance(primitive, Contract):
            assert self.tile is not None
            return Load(self.tile_name, self.tile, type.dtype)
        if isinstance(primitive, Reduce):
            return self._reduce(ref, at)
        raise AssertionError(f"{primitive} has no value inside a kernel")

    def _map(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        primitive, dtype = node.primitive, node.type.dtype
        assert isinstance(primitive, Map)
        if node.id in self.staged and not guard:
            return self._stage(node, at)
        args = tuple(self._value(ref, at, guard) for ref in node.operands)
        if primitive.fn != "cast":
            return Op(primitive.fn, args, dtype.compute)
        value = _as_dtype(args[0], dtype.compute)
        if dtype.is_small_float and self.graph.type(node.operands[0]).dtype != dtype:
            return Op("round_to", (value,), dtype.compute, dtype)
        return value

    def _stage(self, node: Node, at: tuple[Value, ...]) -> Value:
        """Computes a value for the whole row once, into scratch."""
        inner = sorted(self.group.row_axes or ())
        outer = tuple(v for i, v in enumerate(at) if i not in inner)
        key = ("stage", node.id, outer)
        scope = self._scope_for(_symbols(outer))
        dtype = node.type.dtype.compute
        if key not in scope.known:
            name = self._name("row")
            scope.known[key] = Local(name, dtype)
            depth = self.scopes.index(scope)
            inside, self.scopes = self.scopes, self.scopes[: depth + 1]
            self._emit(Alloc(name, dtype, tuple(self.group.domain[a] for a in inner)))
            loops = [(f"s{a}", self.group.domain[a]) for a in inner]
            spot = tuple(Index(sym(n)) for n, _ in loops)
            place = iter(spot)
            here = tuple(next(place) if i in inner else v for i, v in enumerate(at))

            def fill() -> None:
                assert isinstance(node.primitive, Map)
                self.staged.discard(node.id)
                self._emit(Store(name, spot, self._map(node, here, ())))
                self.staged.add(node.id)

            self._nest(loops, fill)
            self.scopes = inside
        row = scope.known[key]
        assert isinstance(row, Local)
        return Load(row.name, tuple(at[a] for a in inner), dtype)

    def _index(self, expr: Expr, at: Mapping[str, Value]) -> Value:
        """An index expression with its symbols replaced by values."""
        used = {name: at[name] for name in expr.symbols() if name in at}
        if all(isinstance(v, Index) for v in used.values()):
            exprs = {n: v.expr for n, v in used.items() if isinstance(v, Index)}
            return Index(expr.substitute(exprs, self.facts))
        return _expand(expr, used)

    def _view(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        view = node.primitive
        assert isinstance(view, View)
        if self.flat:  # a single element, repeated
            return self._value(node.operands[0], (), guard)
        here = dict(zip(view.symbols, at, strict=True))
        place = tuple(self._index(e, here) for e in view.indices)
        tested = (self._nonneg(self._index(g, here)) for g in view.guard)
        conditions = tuple(c for c in tested if c is not None)
        value = self._value(node.operands[0], place, (*guard, *conditions))
        if not conditions:
            return value
        fill = Const(view.fill, value.dtype)
        if isinstance(value, Load) and not guard:
            return replace(value, fill=view.fill)
        return Op("select", (_all(conditions), value, fill), value.dtype)

    def _nonneg(self, value: Value) -> Value | None:
        if isinstance(value, Index) and self.facts.is_nonneg(value.expr):
            return None
        return Op("ge", (value, Const(0, I64)), BOOL)

    def _gather(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        gather = node.primitive
        assert isinstance(gather, Gather)
        here = dict(zip(gather.symbols, at, strict=True))
        extents = self.graph.type(node.operands[0]).shape
        place: list[Value] = []
        for index, extent in zip(gather.indices, extents, strict=True):
            if not isinstance(index, Indirect):
                place.append(self._index(index, here))
                continue
            spot = tuple(self._index(e, here) for e in index.indices)
            value = self._value(node.operands[index.operand], spot, guard)
            value = _as_dtype(value, I64)
            if index.scale != const(1):
                value = Op("mul", (value, self._index(index.scale, here)), I64)
            if index.offset != const(0):
                value = Op("add", (value, self._index(index.offset, here)), I64)
            place.append(Checked(value, extent, self.sites.number(node.span)))
        filled = _product(extents).as_int()
        if filled is None or filled == 0:
            # an empty table has no element 0 to read instead
            size = Index(_product(extents) - 1)
            if not self.facts.is_nonneg(size.expr):
                guard = (*guard, Op("ge", (size, Const(0, I64)), BOOL))
        return self._value(node.operands[0], tuple(place), guard)

    def _concat(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        axis = node.primitive.axis if isinstance(node.primitive, Concat) else 0
        starts = [const(0)]
        for ref in node.operands:
            starts.append(starts[-1] + self.graph.type(ref).shape[axis])
        position = at[axis]
        result: Value | None = None
        for ref, start, end in reversed(
            list(zip(node.operands, starts[:-1], starts[1:], strict=True))
        ):
            low = Op("ge", (position, Index(start)), BOOL)
            high = Op("lt", (position, Index(end)), BOOL)
            inside = _minus(position, start)
            place = (*at[:axis], inside, *at[axis + 1 :])
            value = self._value(ref, place, (*guard, low, high))
            result = value if result is None else Op("select", (high, value, result), value.dtype)
        assert result is not None
        return result

    def _reduce(self, ref: Ref, at: tuple[Value, ...]) -> Value:
        node = self.graph.nodes[ref.node]
        primitive = node.primitive
        assert isinstance(primitive, Reduce)
        scope = self._scope_for(_symbols(at))
        if self.column is not None and (ref, at) in self.scopes[0].known:
            return self.scopes[0].known[(ref, at)]
        if (ref, at) not in scope.known:
            depth = self.scopes.index(scope)
            inside, self.scopes = self.scopes, self.scopes[: depth + 1]
            operand = node.operands[0]
            shape = self.graph.type(operand).shape
            loops = tuple((f"f{a}", shape[a]) for a in primitive.axes)
            kept = iter(at)
            place = tuple(
                Index(sym(f"f{a}")) if a in primitive.axes else next(kept)
                for a in range(len(shape))
            )
            before = self.facts
            self.facts = before.with_ranges({n: (0, e - 1) for n, e in loops})
            value = self._value(operand, place, ())
            self.facts = before
            dtype = node.type.dtype.compute
            if not primitive.kind.startswith("arg"):
                value = _as_dtype(value, dtype)
            name = self._name("r")
            self._emit(Fold(name, primitive.kind, loops, value, dtype))
            self.scopes = inside
            scope.known[(ref, at)] = Local(name, dtype)
        return scope.known[(ref, at)]


def _product(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total


def _at_least_one(expr: Expr) -> Expr:
    from stagefuse.dsl.dims import maximum

    return maximum(expr, 1)


def _as_dtype(value: Value, dtype: DType) -> Value:
    return value if value.dtype == dtype else Op("cast", (value,), dtype)


def _minus(value: Value, amount: Expr) -> Value:
    if isinstance(value, Index):
        return Index(value.expr - amount)
    return Op("sub", (value, Index(amount)), I64)


def _all(conditions: Sequence[Value]) -> Value:
    result = conditions[0]
    for condition in conditions[1:]:
        result = Op("and", (result, condition), BOOL)
    return result


_FUNCTIONS = {"//": "floordiv", "%": "mod", "min": "minimum", "max": "maximum"}


def _expand(expr: Expr, at: Mapping[str, Value]) -> Value:
    """An index expression as arithmetic on i64 values."""
    total: Value | None = None
    for monomial, coefficient in expr.terms:
        factor: Value | None = None if coefficient == 1 and monomial else Const(coefficient, I64)
        for atom, power in monomial:
            value: Value
            if atom.kind == "sym":
                value = at.get(atom.name, Index(sym(atom.name)))
            else:
                args = tuple(_expand(a, at) for a in atom.args)
                value = Op(_FUNCTIONS[atom.kind], args, I64)
            for _ in range(power):
                factor = value if factor is None else Op("mul", (factor, value), I64)
        assert factor is not None
        total = factor if total is None else Op("add", (total, factor), I64)
    return total or Const(0, I64)


def _symbols(values: Sequence[Value]) -> frozenset[str]:
    """Index symbols in values."""
    found: set[str] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, Index):
            found |= value.expr.symbols()
        elif isinstance(value, Load):
            pending.extend((*value.indices, *value.guard))
        elif isinstance(value, Op):
            pending.extend(value.args)
        elif isinstance(value, Checked):
            pending.append(value.value)
    return frozenset(found)


def _exprs_of(body: Sequence[Statement]) -> set[Expr]:
    """Every index expression in statements."""
    found: set[Expr] = set()

    def value(v: Value) -> None:
        if isinstance(v, Index):
            found.add(v.expr)
        elif isinstance(v, Load):
            for part in (*v.indices, *v.guard):
                value(part)
        elif isinstance(v, Op):
            for part in v.args:
                value(part)
        elif isinstance(v, Checked):
            found.add(v.extent)
            value(v.value)

    for s in body:
        if isinstance(s, Let):
            value(s.value)
        elif isinstance(s, Store):
            for part in (*s.indices, s.value):
                value(part)
        elif isinstance(s, For):
            found |= {s.lo, s.hi} | _exprs_of(s.body)
        elif isinstance(s, Fold):
            found |= {e for _, e in s.loops}
            value(s.value)
        elif isinstance(s, Alloc):
            found |= set(s.shape)
        elif isinstance(s, TileProduct):
            found |= {
                s.dst_offset, s.dst_row, s.a_offset, s.a_row, s.a_col, s.panel_offset, s.rows,
                s.depth,
            }  # fmt: skip
        elif isinstance(s, SortRow):
            found.add(as_expr(s.count))
    return found


def _bound_names(body: Sequence[Statement]) -> set[str]:
    found: set[str] = set()
    for s in body:
        if isinstance(s, For):
            found |= {s.index} | _bound_names(s.body)
        elif isinstance(s, Fold):
            found |= {n for n, _ in s.loops}
    return found
