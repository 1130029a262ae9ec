"""What a kernel's shared loops allow: vectors of adjacent elements, scratch in registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stagefuse.compiler.cpu.bodies import arithmetic, walk
from stagefuse.compiler.cpu.values import parts, post_order
from stagefuse.compiler.kernel_ir import (
    COMPUTED,
    Alloc,
    Attend,
    Checked,
    Fold,
    For,
    ForEqual,
    If,
    Index,
    Let,
    Load,
    Local,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .memory import VECTOR_BYTES
from .teams import MOST_IN_REGISTERS, WARP, is_shared, is_warp_loop, most_of, nest_of

if TYPE_CHECKING:
    from .loops import LoopWriter

MOST_AT_ONCE = 64
"""Elements of a fold of which lanes have several at once."""
MOST_WORK = 200
"""Operations of an element, up to which several vectors are under way: of more it is not the loads
that take long, and ptxas takes seconds for all that are written out."""
Nest = tuple[tuple[str, Expr, Expr], ...]
Guard = tuple[KernelValue, ...]


@frozen
class Access:
    """A load or store, and the shared nest of loops around it: None where all lanes do the same.

    `simple`: no loop or branch lies between.
    """

    buffer: str
    indices: tuple[KernelValue, ...]
    nest: Nest | None
    simple: bool


def accesses(body: tuple[Statement, ...], nest: Nest | None = None) -> Iterator[Access]:
    """Every access of a step."""
    for s in body:
        if isinstance(s, TileProduct):
            yield from (Access(n, (), None, False) for n in (s.dst, s.a, s.panel))
        elif isinstance(s, Attend):
            read = (x.buffer for x in (s.queries, s.keys, s.values) if x != COMPUTED)
            names = (s.dst, s.totals, s.most, *read)
            yield from (Access(n, (), None, False) for n in names if n)
        elif isinstance(s, SortRow):
            yield from (Access(n, (), None, False) for n in (s.keys, s.order))
        elif isinstance(s, SortDigit):
            made = (s.keys, s.order, s.digits, s.before)
            yield from (Access(n, (), None, False) for n in made if n)
        elif isinstance(s, For) and is_warp_loop(s):
            yield from accesses(s.body, nest)
        elif isinstance(s, For):
            yield from _of_loop(s, nest)
        elif isinstance(s, Fold):
            own = tuple((n, const(0), e) for n, e in s.loops) if nest is None else nest
            yield from _of_values((s.value,), own, nest is None or is_fixed(s))
        elif isinstance(s, ForEqual):
            yield Access(s.buffer, (), None, False)
            yield from _of_values((s.first,), nest, False)
            yield from accesses(s.body, nest)
        elif isinstance(s, If):
            yield from _of_values((s.condition,), nest, False)
            for a in accesses(s.body, nest):
                yield a if nest is None else Access(a.buffer, a.indices, a.nest, False)
        elif isinstance(s, Let):
            yield from _of_values((s.value,), nest, True)
        elif isinstance(s, Store):
            yield Access(s.buffer, s.indices, nest, True)
            yield from _of_values((*s.indices, s.value), nest, True)


def _of_loop(s: For, nest: Nest | None) -> Iterator[Access]:
    if nest is None and is_shared(s):
        loops = nest_of(s)
        own = tuple((f.index, f.lo, f.hi) for f in loops)
        simple = all(is_simple(x) for x in loops[-1].body)
        for a in accesses(loops[-1].body, own):
            yield Access(a.buffer, a.indices, a.nest, a.simple and simple)
        return
    for a in accesses(s.body, nest):
        yield a if nest is None else Access(a.buffer, a.indices, a.nest, False)


def is_fixed(s: Fold) -> bool:
    """Whether a fold is of a few elements, always as many, and no place is asked for: lanes may
    then have several at once. Of one of many, more lanes are better."""
    total = 1
    for _, extent in s.loops:
        total *= extent.as_int() or MOST_AT_ONCE + 1
    return total <= MOST_AT_ONCE and not s.kind.startswith("arg")


def is_simple(s: Statement) -> bool:
    """Whether what a statement does to several elements at once is plain."""
    return isinstance(s, Let | Store) or (isinstance(s, Fold) and is_fixed(s))


def _of_values(
    values: tuple[KernelValue, ...], nest: Nest | None, simple: bool
) -> Iterator[Access]:
    for value in values:
        for part in post_order(value):
            if isinstance(part, Load):
                yield Access(part.buffer, part.indices, nest, simple)


def vector_width(writer: LoopWriter, body: tuple[Statement, ...] | None = None) -> int:
    """Adjacent elements a lane takes at a time, so that the widest accesses are 16 bytes."""
    if writer.team.across:
        return writer.team.width
    body = writer.kernel.body if body is None else body
    dtypes = {b.name: b.dtype for b in writer.kernel.buffers}
    shapes = {b.name: b.shape for b in writer.kernel.buffers}
    for s in walk(body):
        if isinstance(s, Alloc):
            dtypes[s.name], shapes[s.name] = s.dtype, s.shape
    found, ends = [], set[Expr]()
    for a in accesses(body):
        if a.nest is None or not a.simple or not a.indices or a.buffer not in shapes:
            continue
        if _steps_by_one(a, shapes[a.buffer]):
            found.append(dtypes[a.buffer])
            ends.update(a.nest[-1][1:])
    if not found or writer.team.lanes == 1:
        return 1
    if writer.team.resident:  # it only reduces, and most bytes are of what is narrowest
        wide = VECTOR_BYTES // min(d.itemsize for d in found)
        known = [writer.resolve(e) for e in ends]
        light = arithmetic(s.value for s in body if isinstance(s, Fold)) <= MOST_WORK
        if light and all(isinstance(s, Fold | Let | Store) for s in body):
            # rows of whole vectors are a version
            known = [e for e in known if writer.divides(2, e) or not e.symbols()]
        while wide > 1 and not all(writer.divides(wide, e) for e in known):
            wide //= 2
        return wide
    width = VECTOR_BYTES // max(d.itemsize for d in found)
    narrow = any(d.itemsize == 1 or d.is_int and d.bits == 16 for d in found)
    return min(width, 4) if narrow else min(width, 8)


def positions(body: Sequence[Statement]) -> dict[Checked, Guard]:
    """The positions from data that each element of statements reads, in order, where what guards
    them holds: not those that are read under other conditions too, nor what is bound there."""
    bound, found = {s.name for s in body if isinstance(s, Let)}, dict[Checked, set[Guard]]()
    for s in body:
        roots = [s.value, *getattr(s, "indices", ())] if isinstance(s, Let | Store) else []
        stack: list[tuple[KernelValue, Guard]] = [(root, ()) for root in reversed(roots)]
        while stack:
            part, guard = stack.pop()
            if isinstance(part, Checked):
                found.setdefault(part, set()).add(guard)
                continue
            if isinstance(part, Load) and part.guard:
                stack += [(g, guard) for g in part.guard]
                stack += [(i, (*guard, *part.guard)) for i in reversed(part.indices)]
            else:
                stack += [(p, guard) for p in reversed(parts(part))]
    return {
        part: next(iter(guards))
        for part, guards in found.items()
        if len(guards) == 1 and not bound & _locals((part, *next(iter(guards))))
    }


def _locals(values: Sequence[KernelValue]) -> set[str]:
    return {p.name for v in values for p in post_order(v) if isinstance(p, Local)}


def _steps_by_one(a: Access, shape: tuple[Expr, ...]) -> bool:
    assert a.nest is not None
    name = a.nest[-1][0]
    symbolic, stride = const(0), const(1)
    for index, extent in reversed(list(zip(a.indices, shape, strict=True))):
        if isinstance(index, Index):
            symbolic = symbolic + index.expr * stride
        stride = stride * extent
    return symbolic.coefficient(name) == const(1)


def private_arrays(writer: LoopWriter) -> set[str]:
    """Scratch of which each lane touches only its own elements, few enough for registers."""
    found = {
        s.name: s for s in walk(writer.kernel.body) if isinstance(s, Alloc) and len(s.shape) == 1
    }
    widths: dict[str, set[int]] = {}
    for a in accesses(writer.kernel.body):
        if a.buffer not in found:
            continue
        if not _is_own(writer, a):
            del found[a.buffer]
            continue
        assert a.nest is not None
        widths.setdefault(a.buffer, set()).add(writer.width_of(a.nest))
    return {name for name in found if len(widths.get(name, ())) == 1}


def _is_own(writer: LoopWriter, a: Access) -> bool:
    if a.nest is None or len(a.nest) != 1 or not a.simple or len(a.indices) != 1:
        return False
    name, lo, hi = a.nest[0]
    (index,) = a.indices
    if not isinstance(index, Index) or index.expr != sym(name) - lo:
        return False
    width = writer.width_of(a.nest)
    most = most_of(lo, hi, writer.facts)
    if most is None or writer.team.lanes == 1:
        return False
    by_warps = any(is_warp_loop(s) for s in walk(writer.kernel.body))
    lanes = WARP if by_warps else writer.team.lanes
    return -(-most // (lanes * width)) * width <= MOST_IN_REGISTERS


def turns_apart(writer: LoopWriter, s: For, width: int) -> bool:
    """Whether a warp's square goes between shared memory and vectors of global memory that need not
    be aligned: single elements of lanes beside each other are then one access, and those of a lane
    several."""
    nest = nest_of(s)
    if len(nest) == 1 or writer.team.is_block:
        return False
    found = list(accesses((s,)))
    index, lo = nest[-1].index, nest[-1].lo
    far = [a for a in found if writer.memory[a.buffer].space == "global"]
    if len(far) == len(found):
        return False
    places = [writer.symbolic(writer.memory[a.buffer], a.indices) for a in far]
    return any(
        not writer.divides(width, writer.resolve(p.substitute({index: lo})))
        for p in places
        if p.coefficient(index) == const(1)
    )


def scatters(writer: LoopWriter, body: Sequence[Statement]) -> bool:
    """Whether statements store single elements at places in global memory that are read from data:
    what lanes beside each other store lies together only if their elements do."""
    return any(
        isinstance(s, Store)
        and writer.memory[s.buffer].space == "global"
        and s.indices != ()
        and not isinstance(s.indices[-1], Index)
        for s in body
    )
