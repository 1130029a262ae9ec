"""Who executes a parallel step of a kernel: one lane, a warp, or a block.

A team shares the loops of its step that promise independent iterations, and reductions; the rest
it does in step. Rows short enough are unrolled, so that their elements stay in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Attend,
    Fold,
    For,
    Index,
    Kernel,
    Let,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.facts import Facts

WARP = 32
BLOCK_LANES = 256
"""Lanes of a block whose teams are smaller than it."""
PRODUCT_LANES = 128
UNKNOWN = 4096
"""What a size without a bound counts as."""
MOST_IN_REGISTERS = 32
"""Elements of a row that one lane holds when loops are unrolled."""


@dataclass(frozen=True)
class Team:
    """`lanes` execute a step; a block holds `per_block` teams. One lane, or whole warps; more
    than one warp are a block. If `across` is set, a shared loop has that many elements at most,
    and the lanes that have the same one share the folds inside it."""

    lanes: int
    per_block: int
    across: int = 0

    @property
    def threads(self) -> int:
        return self.lanes * self.per_block

    @property
    def down(self) -> int:
        """Lanes that share the folds of one element."""
        return self.lanes // self.across if self.across else 1

    @property
    def is_block(self) -> bool:
        return self.lanes > WARP


LANE = Team(1, BLOCK_LANES)
WARP_TEAM = Team(WARP, BLOCK_LANES // WARP)
COLUMN_TEAM = Team(1024, 1, WARP)


def shared_loops(body: Sequence[Statement]) -> Iterator[tuple[tuple[str, Expr, Expr], ...]]:
    """The loops of a step that a team shares, outermost only, as (index, lo, hi) of each nest."""
    for s in body:
        if isinstance(s, Fold):
            yield tuple((name, Expr(()), extent) for name, extent in s.loops)
        elif isinstance(s, For) and is_shared(s):
            yield tuple((f.index, f.lo, f.hi) for f in nest_of(s))
        elif isinstance(s, For):
            yield from shared_loops(s.body)
        elif hasattr(s, "body"):
            yield from shared_loops(s.body)


def is_shared(s: For) -> bool:
    """Whether iterations are independent: promised, or plain from what is stored."""
    return s.vector or _stores_apart(s)


def is_warp_loop(s: Statement) -> bool:
    """A loop over rows between two products: a warp takes a row, its lanes the elements."""
    inside = {type(x) for x in s.body} if isinstance(s, For) else set()
    return isinstance(s, For) and s.vector and {Fold, For} <= inside


def nest_of(s: For) -> list[For]:
    """A loop and what is perfectly nested in it, as far as all are independent."""
    found = [s]
    while len(found[-1].body) == 1:
        (inner,) = found[-1].body
        if not isinstance(inner, For) or not is_shared(inner):
            break
        if any(f.index in inner.lo.symbols() | inner.hi.symbols() for f in found):
            break
        found.append(inner)
    return found


def _stores_apart(s: For) -> bool:
    """A loop of stores, each at its own index, into what the loop does not read."""
    stores = [x for x in s.body if isinstance(x, Store)]
    if len(stores) != len(s.body) or not stores:
        return False
    written = {x.buffer for x in stores}
    if _reads(stores) & written:
        return False
    return all(any(_is(i, s.index) for i in x.indices) for x in stores)


def _is(value: object, name: str) -> bool:
    return isinstance(value, Index) and value.expr.as_symbol() == name


def _reads(stores: Sequence[Store]) -> set[str]:
    from stagefuse.compiler.cpu.values import post_order
    from stagefuse.compiler.kernel_ir import Load

    return {
        part.buffer
        for store in stores
        for value in (*store.indices, store.value)
        for part in post_order(value)
        if isinstance(part, Load)
    }


def choose(kernel: Kernel, facts: Facts) -> Team:
    """The team for a kernel, by how much there is for it to share."""
    statements = list(walk(kernel.body))
    if any(isinstance(s, SortRow) for s in statements):
        return Team(BLOCK_LANES, 1)
    attends = [s for s in statements if isinstance(s, Attend)]
    if attends:
        return Team(2 * attends[0].mr, 1)  # 16 rows a warp
    products = [s for s in statements if isinstance(s, TileProduct)]
    if products:
        return Team(PRODUCT_LANES * max(1, max(s.mr for s in products) // 64), 1)
    if kernel.parallel and any(b.mode == "inout" for b in kernel.buffers):
        return LANE  # a scatter's steps are one after the other: lanes take other axes
    loops = list(shared_loops(kernel.body))
    arrays = any(isinstance(s, Alloc) and s.shape for s in statements)
    if not loops:
        return LANE if not arrays else WARP_TEAM
    most = max((_most(nest, facts) for nest in loops), default=0)
    if not arrays and most <= WARP and _folds_deep(kernel.body, facts):
        return COLUMN_TEAM
    if not kernel.parallel and most > 1024:
        return Team(1024, 1)
    if most <= 8 and not arrays:
        return LANE
    if most <= 1024:
        return WARP_TEAM
    lanes = BLOCK_LANES if most <= 8192 else 512
    if not kernel.parallel or _few(kernel, facts):
        lanes = 1024
    return Team(lanes, 1)


def _folds_deep(body: Sequence[Statement], facts: Facts) -> bool:
    """Whether a step is one shared loop around folds of many elements."""
    if len(body) != 1 or not isinstance(body[0], For) or not is_shared(body[0]):
        return False
    folds = [s for s in body[0].body if isinstance(s, Fold)]
    others = [s for s in body[0].body if not isinstance(s, Fold | Let | Store)]
    if not folds or others:
        return False
    return max(_most([(n, Expr(()), e) for n, e in s.loops], facts) for s in folds) > WARP


def most_of(lo: Expr, hi: Expr, facts: Facts) -> int | None:
    """The most iterations that a loop can be proved to have."""
    if len(hi.terms) == 1 and hi.terms[0][1] == 1 and len(hi.terms[0][0]) == 1:
        atom, power = hi.terms[0][0][0]
        if power == 1 and atom.kind == "min":
            ends = [most_of(lo, arg, facts) for arg in atom.args]
            known = [e for e in ends if e is not None]
            return min(known) if known else None
    return facts.bounds(hi - lo)[1]


def _most(nest: Sequence[tuple[str, Expr, Expr]], facts: Facts) -> int:
    """About how many iterations a nest has; unknown sizes count as many."""
    total = 1
    for _, lo, hi in nest:
        most = most_of(lo, hi, facts)
        total *= UNKNOWN if most is None else max(most, 0)
    return total


def _few(kernel: Kernel, facts: Facts) -> bool:
    most = 1
    for _, extent in kernel.parallel:
        high = facts.bounds(extent)[1]
        if high is None:
            return False
        most *= max(high, 1)
    return most < 64
