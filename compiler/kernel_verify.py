"""Checks that a kernel is one, for all sizes in the range of its dimensions.

Invariants, as `VerifyError` numbers them:

1. Nothing is bound twice where one sees the other: buffers, dimensions, loop indices, scalars,
   scratch.
2. Every name is bound before its use: a buffer or scratch, a scalar, an index or dimension.
3. Dtypes agree: loads with their buffer, stores with its compute dtype, operands with what the
   scalar function takes and gives; conditions are bool, positions i64.
4. An access has as many positions as its buffer has axes.
5. Stores go to scratch and to out and inout buffers, loads come from scratch and any buffer; what
   is only read is `in`.
6. Where all guards and conditions hold, each load and store is in bounds.
7. A product's and a sort's scratch is as large as what they touch, and of a dtype they take.
8. Kinds of folds and of stores and modes of buffers are ones that exist; folds have their kind's
   dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dtypes import BF16, BOOL, F16, F32, I32, I64, U32, DType
from stagefuse.dsl.facts import Facts

from .cpu.values import Unique, post_order
from .errors import VerifyError
from .graph_verify import REDUCTIONS
from .kernel_ir import (
    COMPUTED,
    Alloc,
    Attend,
    Buffer,
    Checked,
    Const,
    Fold,
    For,
    ForEqual,
    If,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Op,
    Operand,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
    Value,
)
from .kernel_text import print_statement
from .proofs.bounds import Bounds, size_of
from .scalar import FUNCTIONS
from .verify_products import tile_product
from .verify_sorts import sort_digit, sort_row

WIDEST = (-(1 << 63), (1 << 63) - 1)


def verify_kernel(kernel: Kernel, facts: Facts, bounds: Bounds | None = None) -> Bounds:
    """The bounds as left by the checks: what is open in them could be neither proved nor broken.

    Raises VerifyError.
    """
    check = Check(Bounds() if bounds is None else bounds)
    names = [*(b.name for b in kernel.buffers), *kernel.dims, *(n for n, _ in kernel.parallel)]
    for name in names:
        if names.count(name) > 1:
            raise VerifyError(1, f"`{name}` is bound twice", f"kernel {kernel.name}")
    for buffer in kernel.buffers:
        if buffer.mode not in ("in", "out", "inout"):
            raise VerifyError(8, f"`{buffer.name}` has no mode `{buffer.mode}`")
    scope = Scope(facts, frozenset((*kernel.dims, *(n for n, _ in kernel.parallel))))
    scope.buffers.update((b.name, b) for b in kernel.buffers)
    for name, extent in kernel.parallel:
        check.symbols(scope, extent, f"parallel {name} in {extent}")
        scope.enter_loop(name, const(0), extent)
    check.block(kernel.body, scope)
    return check.bounds


@dataclass
class Scope:
    """What is bound at a place: facts with all loops, conditions that hold, names."""

    facts: Facts
    indices: frozenset[str]
    guards: tuple[Expr, ...] = ()
    buffers: dict[str, Buffer] = field(default_factory=dict)
    scalars: dict[str, DType] = field(default_factory=dict)
    meaning: dict[str, Expr] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)

    def inner(self) -> Scope:
        return replace(
            self, buffers=dict(self.buffers), scalars=dict(self.scalars),
            meaning=dict(self.meaning), checked=set(self.checked),
        )  # fmt: skip

    def enter_loop(self, name: str, lo: Expr, hi: Expr) -> None:
        self.facts = self.facts.with_ranges({name: (lo, hi - 1)})
        self.indices |= {name}
        self.guards = (*self.guards, hi - lo - 1)

    def binds(self, name: str) -> bool:
        return name in self.indices or name in self.buffers or name in self.scalars


class Check:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.unique = Unique()
        self.data: dict[int, tuple[str, tuple[int, IntEnd]]] = {}
        self.at: Statement | None = None

    def fail(self, invariant: int, message: str, where: str = "") -> None:
        text = where or ("" if self.at is None else print_statement(self.at))
        raise VerifyError(invariant, message, text)

    def block(self, body: Sequence[Statement], scope: Scope) -> None:
        for statement in body:
            self.at = statement
            RULES[type(statement)](self, statement, scope)

    def bind(self, scope: Scope, name: str) -> None:
        if scope.binds(name):
            self.fail(1, f"`{name}` is bound already")

    def symbols(self, scope: Scope, expr: Expr, where: str = "") -> None:
        unknown = expr.symbols() - scope.indices
        if unknown:
            self.fail(2, f"`{min(unknown)}` in {expr} is not bound here", where)

    def buffer(self, scope: Scope, name: str) -> Buffer:
        if name not in scope.buffers:
            self.fail(2, f"there is no buffer `{name}` here")
        return scope.buffers[name]

    # Values

    def value(self, root: Value, scope: Scope) -> Value:
        """The unique object of a value that satisfies every invariant here."""
        root = self.unique(root)
        for value in post_order(root):
            if id(value) not in scope.checked:
                self._one(value, scope)
                scope.checked.add(id(value))
        return root

    def typed(self, root: Value, scope: Scope, dtype: DType, what: str) -> Value:
        if root.dtype != dtype:
            self.fail(3, f"{what} is {root.dtype}, not {dtype}")
        return self.value(root, scope)

    def _one(self, value: Value, scope: Scope) -> None:
        if isinstance(value, Index):
            self.symbols(scope, value.expr)
        elif isinstance(value, Local):
            if value.name not in scope.scalars:
                self.fail(2, f"the scalar `{value.name}` is not bound here")
            if scope.scalars[value.name] != value.dtype:
                self.fail(3, f"the scalar `{value.name}` is {scope.scalars[value.name]}")
        elif isinstance(value, Checked):
            self.symbols(scope, value.extent)
            self.symbols(scope, value.length)
            if value.value.dtype != I64:
                self.fail(3, f"a position is i64, not {value.value.dtype}")
        elif isinstance(value, Op):
            self._op(value)
        elif isinstance(value, Load):
            self._load(value, scope)

    def _op(self, op: Op) -> None:
        if op.fn == "round_to":
            if op.to is None or len(op.args) != 1 or {op.dtype, op.args[0].dtype} != {F32}:
                self.fail(3, "round_to rounds f32 to a storage dtype")
            return
        fn = FUNCTIONS.get(op.fn)
        if fn is None or len(op.args) != fn.arity:
            return self.fail(3, f"there is no function `{op.fn}` of {len(op.args)} operands")
        if op.fn == "select" and op.args[0].dtype != BOOL:
            self.fail(3, "the condition of select is not bool")
        own = op.args[1:] if op.fn == "select" else op.args
        dtypes = {a.dtype for a in own}
        if len(dtypes) != 1 or not fn.takes(own[0].dtype):
            given = ", ".join(str(a.dtype) for a in op.args)
            self.fail(3, f"`{op.fn}` does not take {given}")
        wanted = {"bool": BOOL, "given": op.dtype, "same": own[0].dtype}[fn.result]
        if op.dtype != wanted or op.dtype != op.dtype.compute:
            self.fail(3, f"`{op.fn}` gives {wanted}, not {op.dtype}")

    def _load(self, load: Load, scope: Scope) -> None:
        buffer = self.buffer(scope, load.buffer)
        if load.stored != buffer.dtype:
            self.fail(3, f"`{buffer.name}` holds {buffer.dtype}, not {load.stored}")
        guards: list[Expr] = []
        for guard in load.guard:
            if guard.dtype != BOOL:
                self.fail(3, "a guard is not bool")
            guards.extend(self.conditions(guard, scope))
        self.access(buffer, load.indices, scope, guards)

    def access(
        self, buffer: Buffer, places: Sequence[Value], scope: Scope, guards: Sequence[Expr]
    ) -> None:
        """Invariants 3, 4 and 6 of one access."""
        if len(places) != len(buffer.shape):
            self.fail(4, f"`{buffer.name}` has {len(buffer.shape)} axes, not {len(places)}")
        for place, extent in zip(places, buffer.shape, strict=True):
            if place.dtype != I64:
                self.fail(3, f"a position is i64, not {place.dtype}")
            self.inside(buffer.name, self.expr(place, scope), extent, scope, guards)

    def inside(
        self, name: str, index: Expr, extent: Expr, scope: Scope, guards: Sequence[Expr]
    ) -> None:
        data = dict(self.data.values())
        facts = scope.facts.with_ranges(data) if data else scope.facts
        conditions = (*guards, *scope.guards)
        for symbol in sorted(index.symbols() & data.keys()):
            # a checked position in nothing is 0, which is not inside nothing
            end = data[symbol][1]
            if isinstance(end, Expr):
                why = self.bounds.inside(const(0), end + 1, facts, conditions, self.text)
                if why is not None:
                    self.fail(6, f"`{name}`: there is no position in nothing: {why}")
        why = self.bounds.inside(index, extent, facts, conditions, self.text)
        if why is not None:
            self.fail(6, f"`{name}`: {why}")

    def text(self) -> str:
        return "" if self.at is None else print_statement(self.at)

    # Values as expressions

    def expr(self, value: Value, scope: Scope) -> Expr:
        """A value as an expression; what is read from data is a symbol with its range."""
        value = self.unique(value)
        if isinstance(value, Index):
            return value.expr
        if isinstance(value, Const):
            return const(int(value.value))
        if isinstance(value, Local) and value.name in scope.meaning:
            return scope.meaning[value.name]
        if isinstance(value, Op) and value.fn in _ARITHMETIC and value.dtype == I64:
            return _ARITHMETIC[value.fn](*(self.expr(a, scope) for a in value.args))
        if id(value) not in self.data:
            high: IntEnd = WIDEST[1]
            low = 0 if isinstance(value, Checked) else WIDEST[0]
            if isinstance(value, Checked):
                high = value.extent - value.length
            self.data[id(value)] = (f"$data{len(self.data)}", (low, high))
        return sym(self.data[id(value)][0])

    def conditions(self, value: Value, scope: Scope) -> list[Expr]:
        """Expressions that are at least 0 where a bool value holds; what else it says is left."""
        if not isinstance(value, Op) or len(value.args) != 2:
            return []
        a, b = value.args
        if value.fn == "and":
            return [*self.conditions(a, scope), *self.conditions(b, scope)]
        if a.dtype != I64 or value.fn not in ("ge", "gt", "le", "lt", "eq"):
            return []
        x, y = self.expr(a, scope), self.expr(b, scope)
        return {
            "ge": [x - y], "gt": [x - y - 1], "le": [y - x], "lt": [y - x - 1],
            "eq": [x - y, y - x],
        }[value.fn]  # fmt: skip


IntEnd = Expr | int
_ARITHMETIC: dict[str, Callable[..., Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "floordiv": floordiv,
    "mod": mod,
    "minimum": minimum,
    "maximum": maximum,
}


def _let(check: Check, s: Let, scope: Scope) -> None:
    value = check.value(s.value, scope)
    check.bind(scope, s.name)
    scope.scalars[s.name] = value.dtype
    if value.dtype == I64:
        scope.meaning[s.name] = check.expr(value, scope)


def _store(check: Check, s: Store, scope: Scope) -> None:
    buffer = check.buffer(scope, s.buffer)
    if buffer.mode == "in":
        check.fail(5, f"`{buffer.name}` is only read")
    if s.by and (s.by not in ("add", "max") or buffer.dtype not in (I32, I64, U32)):
        check.fail(8, f"there is no `{s.by}` of {buffer.dtype} in any order")
    if s.by and buffer.mode != "inout":
        check.fail(5, f"`{buffer.name}` is combined with, so it is read")
    for place in s.indices:
        check.value(place, scope)
    check.typed(s.value, scope, buffer.dtype.compute, "the stored value")
    check.access(buffer, s.indices, scope, ())


def _for(check: Check, s: For, scope: Scope) -> None:
    for end in (s.lo, s.hi):
        check.symbols(scope, end)
    check.bind(scope, s.index)
    inner = scope.inner()
    inner.enter_loop(s.index, s.lo, s.hi)
    check.block(s.body, inner)


def _for_equal(check: Check, s: ForEqual, scope: Scope) -> None:
    buffer = check.buffer(scope, s.buffer)
    check.symbols(scope, s.count)
    if buffer.dtype != U32 or len(buffer.shape) != 1:
        check.fail(3, f"`{s.buffer}` is not u32 along one axis")
    check.typed(s.first, scope, I64, "where it begins")
    check.access(buffer, (s.first,), scope, ())
    check.inside(s.buffer, s.count, buffer.shape[0] + 1, scope, ())
    check.bind(scope, s.index)
    inner = scope.inner()
    inner.enter_loop(s.index, const(0), s.count)
    check.block(s.body, inner)


def _fold(check: Check, s: Fold, scope: Scope) -> None:
    inner = scope.inner()
    for name, extent in s.loops:
        check.symbols(inner, extent)
        check.bind(inner, name)
        inner.enter_loop(name, const(0), extent)
    if s.kind not in REDUCTIONS:
        check.fail(8, f"there is no fold `{s.kind}`")
    value = check.value(s.value, inner)
    wanted = I64 if s.kind.startswith("arg") else value.dtype
    if s.dtype != wanted or (s.kind in ("any", "all") and s.dtype != BOOL):
        check.fail(8, f"a {s.kind} of {value.dtype} is not {s.dtype}")
    check.bind(scope, s.name)
    scope.scalars[s.name] = s.dtype


def _alloc(check: Check, s: Alloc, scope: Scope) -> None:
    check.bind(scope, s.name)
    for size in s.shape:
        check.symbols(scope, size)
    scope.buffers[s.name] = Buffer(s.name, s.dtype, s.shape, "scratch")


def _if(check: Check, s: If, scope: Scope) -> None:
    condition = check.typed(s.condition, scope, BOOL, "the condition")
    inner = scope.inner()
    inner.guards = (*inner.guards, *check.conditions(condition, scope))
    check.block(s.body, inner)


def _attend(check: Check, s: Attend, scope: Scope) -> None:
    operands = [x for x in (s.queries, s.keys, s.values) if x != COMPUTED]
    dtypes = {check.buffer(scope, x.buffer).dtype for x in operands}
    made = [check.buffer(scope, name) for name in (s.dst, s.totals, *filter(None, [s.most]))]
    if len(dtypes) != 1 or not dtypes <= {F32, F16, BF16} or {b.dtype for b in made} != {F32}:
        check.fail(7, "attention is of f32, f16 or bf16 into f32")
    if {b.mode for b in made} != {"scratch"}:
        check.fail(5, "the results of attention are scratch")
    exprs = [s.dst_row, s.rows, s.lo, s.hi, *(() if s.extent is None else (s.extent,))]
    for x in operands:
        exprs += [x.offset, x.along, x.across, x.step]
    for expr in exprs:
        check.symbols(scope, expr)
    if check.bounds.broken(s.mr - s.rows, scope.facts, scope.guards, check.text) is not None:
        check.fail(7, f"{s.rows} rows may be more than {s.mr}")
    most = s.hi if s.extent is None else s.extent
    if check.bounds.broken(most - s.hi, scope.facts, scope.guards, check.text) is not None:
        check.fail(7, f"{s.hi} keys may be more than {most}")
    inner = scope.inner()
    for name, lo, hi in ((s.row, const(0), s.rows), (s.key, s.lo, most)):
        check.bind(inner, name)
        inner.enter_loop(name, lo, hi)
    _computed(check, s, inner)
    check.bind(inner, s.raw)
    inner.scalars[s.raw] = F32
    check.typed(s.score, inner, F32, "a score")
    check.typed(s.keep, inner, BOOL, "what keeps a score")
    r, j = sym(s.row), sym(s.key)
    ends: list[tuple[Operand, Expr, Expr]] = []
    for last in (0, 1):
        k, c = (s.depth - 1) * last, (s.columns - 1) * last
        ends += [(s.queries, r, const(k)), (s.keys, const(k), j), (s.values, j, const(c))]
    for x, a, b in (end for end in ends if end[0] != COMPUTED):
        buffer = scope.buffers[x.buffer]
        place = x.place(a, b, inner.facts)
        if x.run:  # whole runs, whose numbers bounds see through
            inner.enter_loop("run'", const(0), floordiv(s.rows + (x.run - 1), x.run))
            inner.enter_loop("row'", const(0), const(x.run))
            place = x.offset + sym("run'") * x.along + sym("row'") * x.step + b * x.across
        check.inside(buffer.name, place, size_of(buffer.shape), inner, ())
    if s.ways != 1 and (s.ways < 1 or not s.most):
        check.fail(7, "keys are dealt out in one way or more, with their greatest scores")
    last_row = r + (s.ways - 1) * s.mr
    places = (last_row * s.dst_row + s.columns - 1, last_row, last_row)
    for buffer, index in zip(made, places, strict=False):
        check.inside(buffer.name, index, size_of(buffer.shape), inner, ())


def _computed(check: Check, s: Attend, scope: Scope) -> None:
    """The elements of keys and values that are computed, inside the loops over rows and keys."""
    both = (s.keys, s.key_element, s.depth), (s.values, s.value_element, s.columns)
    for operand, element, count in both:
        if (element is not None) != (operand == COMPUTED):
            check.fail(7, "keys and values are either in a buffer or computed")
        if element is None:
            continue
        inner = scope.inner()
        check.bind(inner, s.feature)
        inner.enter_loop(s.feature, const(0), const(count))
        check.typed(element, inner, F32, "an element of keys or values")


Rule = Callable[[Check, Any, Scope], None]
RULES: dict[type, Rule] = {
    Let: _let,
    Store: _store,
    For: _for,
    ForEqual: _for_equal,
    Fold: _fold,
    Alloc: _alloc,
    If: _if,
    TileProduct: tile_product,
    Attend: _attend,
    SortDigit: sort_digit,
    SortRow: sort_row,
}
"""What each statement must satisfy."""
