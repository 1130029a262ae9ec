"""Scatters of rows whose positions are sorted: a warp has some columns of one row of the result.

It reads them from the base, goes through the row's updates, if there are any, and stores them. So
the base is read and the result written once, in vectors, however many updates there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.memory import VECTOR_BYTES
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Checked,
    Const,
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
from stagefuse.compiler.lower.expressions import all_of
from stagefuse.compiler.lower.sequences import combined, is_some
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64, U32

from .runs import BESIDE, Runs, beside, lower_copied, lower_long_runs, lower_runs
from .unordered import latest, lower_unset

Lower = Callable[[Lowering], Parallel]


def ordered(group: Group, axis: int) -> Iterator[tuple[Lower, str, Expr]]:
    """The kernels of a scatter behind those that sort its positions, what they are called, and for
    which sizes they are, as 1 or 0."""
    along, wide, rows = axis == len(group.domain) - 1, beside(group, axis), const(0)
    if not along:
        rows = minimum(floordiv(group.domain[-1], BESIDE), const(1))
    yield lower_unset, "unset", rows
    yield lower_firsts, "firsts", rows
    yield lower_rows, "rows", rows
    yield lower_copied, "copied", 1 - rows
    yield lower_runs, "runs", 1 - rows
    yield partial(lower_long_runs, by_warps=True), "long runs by warps", 1 - wide
    yield partial(lower_long_runs, by_warps=False), "long runs by lanes", wide - rows


def lower_firsts(low: Lowering) -> Parallel:
    """Where the run of each position begins."""
    runs = Runs(low)
    parallel = [("k", runs.count)]
    low.bind(parallel)
    key = runs.key(Index(sym("k")))
    first = Op("not", (runs.same(Index(sym("k") - 1), key),), BOOL)
    number = Op("cast", (Index(sym("k") + 1),), U32)
    store = Store(latest(low, "inout"), (runs.position(key),), number, "max")
    low.branch(all_of(runs.some(first)), lambda: low.emit(store))
    return parallel, const(1)


def lower_rows(low: Lowering) -> Parallel:
    """Columns of a row of the result: those of the base, combined with their updates."""
    runs = Runs(low)
    domain, last, dtype = low.group.domain, len(low.group.domain) - 1, runs.node.type.dtype
    base, _, updates = runs.node.operands
    width = WARP * VECTOR_BYTES // dtype.itemsize
    blocks = floordiv(domain[last] + (width - 1), width)
    parallel = [*low.axes(range(last)), ("block", blocks)]
    low.bind(parallel)
    total, source = low.name("total"), low.name("source")
    low.emit(Alloc(total, dtype, (const(width),)))
    begin = sym("block") * width
    here = runs.along(Index(sym(f"d{runs.axis}")))
    cell = (Index(sym(f"d{last}") - begin),)

    def columns(body: Callable[[], None]) -> None:
        low.loop(f"d{last}", begin, minimum(begin + width, domain[last]), body, vector=True)

    def copy() -> None:
        low.emit(Store(total, cell, low.value(base, here, ())))

    def update() -> None:
        at = Checked(Local(source, I64), runs.count, 0, proved=True)
        value, name = low.value(updates, runs.along(at), ()), low.name("v")
        result = combined(runs.kind, Load(total, cell, dtype), value, dtype)
        low.emit(Let(name, result))
        low.emit(Store(total, cell, Local(name, dtype.compute)))

    def store() -> None:
        out = low.buffer(runs.ref, "out").name
        low.emit(Store(out, here, Load(total, cell, dtype)))

    columns(copy)
    first = Load(latest(low, "in"), (here[runs.axis],), U32)
    place = Op("sub", (Op("cast", (first,), I64), Const(1, I64)), I64)
    begun = Checked(place, runs.count, 0, proved=True)

    def run() -> None:
        low.facts = low.facts.with_ranges({"run": (0, runs.count - 1)})
        low.scopes.append(Scope(low.scopes[-1].bound | {"run"}))
        low.emit(Let(source, runs.source(Index(sym("run")))))
        columns(update)
        body = tuple(low.scopes.pop().body)
        low.emit(ForEqual("run", runs.keys(), runs.count, begun, WARP, body))

    conditions: list[KernelValue] = [Op("ne", (first, Const(0, U32)), BOOL)]
    if not low.facts.is_positive(runs.count):
        conditions.append(is_some(runs.count))
    low.branch(all_of(conditions), run)
    columns(store)
    return parallel, const(width)
