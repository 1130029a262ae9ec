"""Scatters whose results do not depend on the order of updates, by atomic operations.

Integers are added to, or compared with, the elements of the base where these lie. An element that
is set has the last of its updates, which is the one of the greatest number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.gpu.transposed import lower_elements
from stagefuse.compiler.graph import Graph, Scatter
from stagefuse.compiler.kernel_ir import Buffer, Checked, Const, Index, Let, Load, Local, Op, Store
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import all_of
from stagefuse.compiler.lower.sequences import is_some, position_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import BOOL, I32, I64, U32

from .runs import Scattered, beside, lower_copied

FEW = 256
"""Elements up to which many updates are sorted: atomic operations on one element wait for each
other, which took 265 us for PyTorch's 1,000,000 into 256 on an H200."""
Lower = Callable[[Lowering], Parallel]
LATEST = 8
"""The number of the buffer with one more than the last update of each position, or than the place
of the first one among sorted ones, or 0."""


def unordered(graph: Graph, group: Group) -> Iterator[tuple[Lower, str, Expr]]:
    """The kernels of a scatter in any order, what they are called, and for which sizes they are, as
    1 or 0; none if there is an order."""
    node = graph.nodes[group.roots[0].node]
    assert isinstance(node.primitive, Scatter)
    one, wide = const(1), beside(group, node.primitive.axis)
    if node.primitive.kind == "set":
        yield from ((lower_unset, "unset", one), (lower_latest, "latest", one))
        yield partial(lower_chosen, by_lanes=False), "chosen", wide
        yield partial(lower_chosen, by_lanes=True), "chosen by lanes", 1 - wide
    elif node.type.dtype in (I32, I64):
        yield from ((lower_copied, "copied", one), (lower_updates, "updates", one))


def lower_updates(low: Lowering) -> Parallel:
    """Each update combined with its element."""
    scattered = Scattered(low)
    parallel = scattered.parallel("u", scattered.count)
    at = _position(low)
    value = low.value(scattered.node.operands[2], scattered.along(Index(sym("u"))), ())
    out = low.buffer(scattered.ref, "inout").name
    store = Store(out, scattered.along(at), value, scattered.kind)
    _where(low, scattered.some(), store)
    return parallel, const(1)


def lower_unset(low: Lowering) -> Parallel:
    """No position has an update yet."""
    parallel = [("n", Scattered(low).size)]
    low.bind(parallel)
    low.emit(Store(latest(low, "out"), (Index(sym("n")),), Const(0, U32)))
    return parallel, const(1)


def lower_latest(low: Lowering) -> Parallel:
    """The last update of each position."""
    scattered = Scattered(low)
    parallel = [("u", scattered.count)]
    low.bind(parallel)
    at = _position(low)
    number = Op("cast", (Index(sym("u") + 1),), U32)
    _where(low, scattered.some(), Store(latest(low, "inout"), (at,), number, "max"))
    return parallel, const(1)


def lower_chosen(low: Lowering, by_lanes: bool) -> Parallel:
    """Each element, or its last update; a lane has one of those that are few for a position."""
    scattered = Scattered(low)
    base, _, updates = scattered.node.operands

    def chosen(at: tuple[KernelValue, ...]) -> KernelValue:
        axis, count = scattered.axis, scattered.count
        last = Load(latest(low, "in"), (at[axis],), U32)
        conditions: list[KernelValue] = [Op("ne", (last, Const(0, U32)), BOOL)]
        if not low.facts.is_positive(count):
            conditions.append(is_some(count))
        place = Op("sub", (Op("cast", (last,), I64), Const(1, I64)), I64)
        source = Checked(place, count, 0, proved=True)
        update = low.value(updates, (*at[:axis], source, *at[axis + 1 :]), tuple(conditions))
        return Op("select", (all_of(conditions), update, low.value(base, at, ())), update.dtype)

    low.products[scattered.ref] = chosen
    if not by_lanes:
        return lower_elements(low)
    parallel = low.axes(range(len(low.group.domain)))
    low.bind(parallel)
    low.store([sym(name) for name, _ in parallel])
    return parallel, const(1)


def _position(low: Lowering) -> KernelValue:
    """Where the update of this step goes."""
    name = low.name("at")
    low.emit(Let(name, position_of(low, sym("u"))))
    return Local(name, I64)


def _where(low: Lowering, conditions: list[KernelValue], store: Store) -> None:
    if not conditions:
        return low.emit(store)
    low.branch(all_of(conditions), lambda: low.emit(store))


def latest(low: Lowering, mode: str) -> str:
    """The name of the buffer with one number for each position."""
    scattered = Scattered(low)
    made = Buffer(f"b{len(low.buffers)}", U32, (scattered.size,), mode)
    return low.buffers.setdefault(parts_of(scattered.ref, LATEST), made).name
