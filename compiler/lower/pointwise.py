"""Pointwise kernels: flat stretches of elements, or rows of the innermost axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise

from stagefuse.compiler.cpu.merging import as_one
from stagefuse.compiler.graph import Concat, Gather, Graph, Map, Node, Scalar, View
from stagefuse.compiler.kernel_ir import For
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym

from .blocks import Parallel
from .expressions import product_of
from .values import Lowering

ROWS = 64
"""Of a block of rows that are one stretch."""
LIGHT = 16
"""Operations of all parts of a concatenation that are done for each element, at most."""
LOOPS = 512
"""For the parts of a concatenation, at most."""


def lower_pointwise(low: Lowering) -> Parallel:
    domain = low.group.domain
    if not domain:
        low.store(())
        return [], const(1)
    low.flat = low.flat or _is_flat(low)
    packed = None if low.flat else _packed_axis(low)
    if packed is not None:
        return _together(low, packed)
    total = product_of(domain) if low.flat else domain[-1]
    outer = [] if low.flat else low.axes(range(len(domain) - 1))
    index = "d0" if low.flat else f"d{len(domain) - 1}"
    lead = [sym(name) for name, _ in outer]
    parallel, lo, hi = (outer, const(0), total) if outer else _chunks(low, total)
    low.bind(parallel)
    work = (total if outer else const(low.schedule.chunk)) * max(1, low.cost())
    _by_parts(low, (index, lo, hi), lambda at: low.store((*lead, at)))
    return parallel, work


def in_blocks(low: Lowering, made: Parallel) -> Parallel:
    """A pointwise kernel that was made; its rows in blocks, where these are one stretch of all that
    is read and written, as those of a channel are: a loop over a block then becomes one with that
    over a row."""
    parallel, work = made
    body = low.scopes[0].body
    shapes = {b.name: b.shape for b in low.buffers.values()}
    loops: list[For] = []
    match body:
        case [For(vector=True) as loop] if loop.lo == const(0):
            whole: For | None = loop
            for name, extent in reversed(parallel):
                whole = whole and as_one(For(name, const(0), extent, (whole,)), whole, shapes)
                if whole is None:
                    break
                loops.append(For(name, const(0), extent, ()))
    if not loops:
        return parallel, work
    *inner, last = loops
    first = sym(f"{last.index}s") * ROWS
    for outer in (*inner, replace(last, lo=first, hi=minimum(first + ROWS, last.hi))):
        body[:] = [replace(outer, body=tuple(body))]
        work = work * (minimum(last.hi, ROWS) if outer.index == last.index else outer.hi)
    blocks = (f"{last.index}s", floordiv(last.hi + (ROWS - 1), ROWS))
    outside = [*parallel[: len(parallel) - len(loops)], blocks]
    low.bind(outside)
    return outside, work


def _packed_axis(low: Lowering) -> int | None:
    """A short axis whose elements lie side by side at positions that are read from data, the
    channels of a pixel; or one of what is `_turned`."""
    domain, found = low.group.domain, set()
    for member in low.group.members:
        node = low.graph.nodes[member]
        gather, accesses = node.primitive, low.group.accesses.get(member, [])
        if not isinstance(gather, Gather) or low.graph.type(node.operands[0]).dtype.bits != 8:
            continue
        last = gather.indices[-1]
        if not isinstance(last, Expr) or all(isinstance(i, Expr) for i in gather.indices):
            return None
        for access in accesses:
            if access is None:
                return None
            found.add(last.substitute(dict(zip(gather.symbols, access, strict=True))))
    axes = [a for a, size in enumerate(domain) if found == {sym(f"d{a}")} and len(domain) > 1]
    if not found:
        axes = _turned(low)
    short = [a for a in axes if domain[a].as_int() in range(2, low.schedule.packed + 1)]
    return short[0] if short else None


def _turned(low: Lowering) -> list[int]:
    """Axes of which one of the result and what is read has adjacent elements, where the other one
    has rows: the last one, where something is read along the one before, and those along which
    something is read."""
    last = len(low.group.domain) - 1
    read = [at for ref in low.group.loads(low.graph) for at in low.group.accesses.get(ref.node, [])]
    found = []
    for at in read:
        axis = at[-1].as_symbol() if at and sym(f"d{last}") in at else None
        if axis is not None and axis != f"d{last}":
            found += [last] if axis == f"d{last - 1}" else []
            found += [a for a in range(last) if axis == f"d{a}"]
    return found


def _together(low: Lowering, packed: int) -> Parallel:
    """Rows of the innermost axis but a packed one, whose elements are computed together: positions
    are the same for all, or rows of what is read or of the result are elements of the other."""
    domain, count = low.group.domain, low.group.domain[packed].as_int() or 1
    along = max(a for a in range(len(domain)) if a != packed)
    outer = low.axes([a for a in range(len(domain)) if a not in (along, packed)])
    parallel, lo, hi = (outer, const(0), domain[along]) if outer else _chunks(low, domain[along])
    low.bind(parallel)
    at = [sym(f"d{a}") for a in range(len(domain))]

    def body() -> None:
        for element in range(count):
            at[packed] = const(element)
            low.store(at)

    low.loop(f"d{along}", lo, hi, body, vector=True)
    steps = domain[along] if outer else const(low.schedule.chunk)
    return parallel, steps * (count * max(1, low.cost()))


def _chunks(low: Lowering, total: Expr) -> tuple[list[tuple[str, Expr]], Expr, Expr]:
    """Steps that take a stretch of so many elements, and where one begins and ends."""
    chunk = low.schedule.chunk
    lo = sym("chunk") * chunk
    steps = [("chunk", floordiv(total + (chunk - 1), chunk, low.facts))]
    return steps, lo, minimum(lo + chunk, total)


def _by_parts(low: Lowering, loop: tuple[str, Expr, Expr], body: Callable[[Expr], None]) -> None:
    """A vector loop along the last axis; one for each part of a concatenation, or a few of them, if
    there is one: otherwise every element would be chosen among those of all parts."""
    index, lo, hi = loop
    facts, (axis, parts) = low.facts, _parts(low)

    def along(start: Expr, end: Expr) -> None:
        low.loop(index, start, end, lambda: body(sym(index)), vector=True)

    def within(start: Expr, end: Expr) -> None:
        low.facts = facts.with_ranges({axis: (start, end - 1)})
        along(lo, hi)

    for start, end in parts:
        if axis != index:
            low.when([sym(axis) - start, end - 1 - sym(axis)], partial(within, start, end))
        elif (lo, end) == (const(0), start + 1) and facts.prove_le(end, hi):  # else cut before it
            body(start)
        else:
            along(maximum(lo, start, facts), minimum(hi, end, facts))
        low.facts = facts
    if not parts:
        along(lo, hi)


def _parts(low: Lowering) -> tuple[str, list[tuple[Expr, Expr]]]:
    """The axis of the concatenation in the kernel that has most parts, and where the stretches of
    it begin and end that have loops of their own: some parts each, of which their loop chooses.
    None if there is no concatenation, or one loop chooses among all."""
    nodes = [low.graph.nodes[member] for member in low.group.members]
    found = [n for n in nodes if isinstance(n.primitive, Concat) and _is_whole(low, n)]
    if not found:
        return "", []
    node = max(found, key=lambda n: len(n.operands))
    assert isinstance(node.primitive, Concat)
    ends = _ends(low, node, const(0))
    starts = [const(0), *ends[:-1]]
    each = low.schedule.parts if low.cost() <= LIGHT else 1  # else all would be computed
    count = min(-(-len(ends) // each), LOOPS)
    if count == 1:
        return "", []
    cuts = [len(ends) * n // count for n in range(count + 1)]
    stretches = [(starts[a], ends[b - 1]) for a, b in pairwise(cuts)]
    size = low.group.domain[node.primitive.axis]
    if not low.facts.prove_le(size, ends[-1]):  # who reads it may be longer: padded
        stretches.append((ends[-1], size))
    return f"d{node.primitive.axis}", stretches


def _ends(low: Lowering, node: Node, start: Expr) -> list[Expr]:
    """Where the parts of a concatenation end that begins at `start`, and those of a part that is
    one itself, in the same kernel: if it is of known size, or there would be ever longer sums."""
    assert isinstance(node.primitive, Concat)
    found: list[Expr] = []
    for ref, begin, end in zip(node.operands, *low.stretches(node), strict=True):
        inner, is_known = low.graph.nodes[ref.node], (end - begin).as_int() is not None
        if is_known and ref.node in low.group.members and inner.primitive == node.primitive:
            found += _ends(low, inner, start + begin)
        else:
            found.append(start + end)
    return found


def _is_whole(low: Lowering, node: Node) -> bool:
    """Whether a concatenation is read just where the result is written, along its axis."""
    assert isinstance(node.primitive, Concat)
    axis = node.primitive.axis
    accesses = low.group.accesses.get(node.id, [])
    return all(at is not None and at[axis] == sym(f"d{axis}") for at in accesses)


def is_flat(graph: Graph, domain: tuple[Expr, ...], members: Iterable[int]) -> bool:
    """Whether nodes read every operand just where the result is written, or one element."""
    for member in members:
        node = graph.nodes[member]
        if isinstance(node.primitive, View):
            if graph.type(node.operands[0]).shape or node.primitive.guard:
                return False
        elif not isinstance(node.primitive, Map | Scalar):
            return False
        for ref in node.operands:
            shape = graph.type(ref).shape
            if shape and shape != domain:
                return False
    return True


def _is_flat(low: Lowering) -> bool:
    shapes = {low.graph.type(r).shape for r in low.group.roots}
    return shapes == {low.group.domain} and is_flat(low.graph, low.group.domain, low.group.members)
