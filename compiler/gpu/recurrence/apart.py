"""Stages whose lanes need nothing that others wrote: each reads what it wrote itself."""

from __future__ import annotations

from stagefuse.compiler.gpu.private import accesses
from stagefuse.compiler.gpu.teams import is_shared, smaller_of
from stagefuse.compiler.kernel_ir import For, Index, Kernel, Let, Store
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import const

from .stage import StageWriter

Place = tuple[str | None, ...]
"""Where in all axes but the first an element is: the index that it is along each, None for 0."""


def is_apart(writer: StageWriter) -> bool:
    """Whether each lane of a stage, which has the same elements at each step, reads at those alone
    what the stage writes. Along their first axis, that of what recurrences carry, it may read at
    any place."""
    kernel, stage = writer.kernel, writer.stage
    needed = _indices(kernel)
    if needed is None or writer.team.lanes > 1 and not any(isinstance(s, For) for s in kernel.body):
        return False
    numbers = dict(zip((b.name for b in kernel.buffers), stage.buffers, strict=True))
    own = {b.name: b.mode for b in kernel.buffers}
    written = {numbers[name] for name, mode in own.items() if mode != "in"}
    read = {numbers[name] for name, mode in own.items() if mode != "out"}
    places: dict[int, set[Place | None]] = {}
    for access in accesses(kernel.body):
        number = numbers.get(access.buffer)
        if number is None:
            return False
        if number in written & read:
            places.setdefault(number, set()).add(_place(access.indices, needed))
    return all(len(found) == 1 and None not in found for found in places.values())


def _indices(kernel: Kernel) -> frozenset[str] | None:
    """The indices that tell the elements of a kernel apart that is one nest of loops; None of
    others."""
    body, loops = kernel.body, list[For]()
    while len(body) == 1 and isinstance(body[0], For) and is_shared(body[0]):
        loops.append(body[0])
        body = body[0].body
    if not all(isinstance(s, Let | Store) for s in body):
        return None
    found = {name for name, _ in kernel.parallel}
    for loop in loops:
        ends = loop.lo.symbols() | loop.hi.symbols()
        if ends & found:  # stretches of an axis, which no other index is along
            if len(found) > 1 or len(loops) > 1 or not _is_stretch(loop, *found):
                return None
            found = set()
    return frozenset(found | {loop.index for loop in loops})


def _is_stretch(loop: For, block: str) -> bool:
    """Whether a loop has no element that it has in another block."""
    length = loop.lo.coefficient(block)
    if length is None or length.as_int() is None or loop.lo.substitute({block: 0}) != const(0):
        return False
    return any(end == loop.lo + length for end in smaller_of(loop.hi))


def _place(indices: tuple[KernelValue, ...], needed: frozenset[str]) -> Place | None:
    """An element's place by bare indices, each once; None if it is another."""
    found: list[str | None] = []
    for index in indices[1:]:
        if not isinstance(index, Index):
            return None
        if index.expr == const(0):
            found.append(None)
        elif index.expr.as_symbol() in needed:
            found.append(index.expr.as_symbol())
        else:
            return None
    first = indices[0] if indices else Index(const(0))
    named = [name for name in found if name is not None]
    if not isinstance(first, Index) or first.expr.symbols() & needed or set(named) != needed:
        return None
    return tuple(found) if len(named) == len(needed) else None
