"""Who executes a parallel step of a kernel: one lane, a warp, or a block.

A team shares the loops of its step that promise independent iterations, and reductions; the rest
it does in step. Rows short enough are unrolled, so that their elements stay in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import walk, work_of
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Attend,
    Checked,
    Fold,
    For,
    ForEqual,
    Index,
    Kernel,
    Let,
    Load,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

WARP = 32
BLOCK_LANES = 256
"""Lanes of a block whose teams are smaller than it."""
PRODUCT_LANES = 128
UNKNOWN = 4096
"""What a size without a bound counts as."""
HEAVY, POSITIONS = 64, 16
"""Operations, or positions from data, of an element of which a lane does one after the other: of
several that are written out, registers hold too few values, and ptxas takes long."""
MOST_IN_REGISTERS = 32
"""Elements of a row that one lane holds when loops are unrolled."""
PART_ROW, PART_ELEMENTS = 128, 8
"""The most elements of rows that parts of warps take, and how many each lane has."""
WARP_ROW = 1024
"""The most elements of one step's rows that a warp takes."""
BLOCKS = ((1024, 128), (8192, 256), (1 << 62, 512))
"""Lanes of a block that takes a row, by the most elements that it has."""


@frozen
class Team:
    """`lanes` execute a step; a block holds `per_block` teams. One lane, a part of a warp, or whole
    warps; more than one warp are a block. If `across` is set, a shared loop has that many times
    `width` elements at most, and the lanes that have the same ones share the folds inside it.
    `resident`: blocks of an SM that the kernel is compiled for, if that is not left to ptxas. A
    block has `helpers` more threads, which do what one of its statements wants and then end."""

    lanes: int
    per_block: int
    across: int = 0
    width: int = 1
    resident: int = 0
    helpers: int = 0

    @property
    def threads(self) -> int:
        return self.lanes * self.per_block + self.helpers

    @property
    def down(self) -> int:
        """Lanes that share the folds of one element."""
        return self.lanes // self.across if self.across else 1

    @property
    def is_block(self) -> bool:
        return self.lanes > WARP

    @property
    def is_part(self) -> bool:
        """Whether lanes beside these do another step by the same instructions."""
        return 1 < self.lanes < WARP


LANE = Team(1, BLOCK_LANES)
WARP_TEAM = Team(WARP, BLOCK_LANES // WARP)
COLUMN_LANES = 512
LOADING = 1024
"""Threads of an SM of a kernel that only reduces, only computes elements, or goes down columns by
single lanes: ptxas then leaves each enough registers for all its loads to be under way at once."""
REDUCERS = 1 << 17
"""Lanes that keep a device's memory busy with reductions of rows."""
LOADS = 8
"""Vectors that a lane should have of a row to make sharing it with more lanes worth it."""
WINDOW, SLIDING, LINE = 32, 64, 1024
"""Elements of a window that one lane reduces by itself, of one that moves along with lanes, and of
one that does so along a single axis, where there are many."""
SHARED = 8
"""Windows that share an element, about: so many fewer lanes keep memory busy."""


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
    team = _of_statements(kernel, statements, facts)
    if team is not None:
        return team
    loops = list(shared_loops(kernel.body))
    arrays = any(isinstance(s, Alloc) and s.shape for s in statements)
    if loops:
        return _of_loops(kernel, loops, arrays, facts)
    if arrays:
        return WARP_TEAM
    light = kernel.parallel and _goes_along(kernel)
    return replace(LANE, resident=LOADING // LANE.threads) if light else LANE


def _of_statements(kernel: Kernel, statements: Sequence[Statement], facts: Facts) -> Team | None:
    """The team of a kernel by a statement of it that all lanes take part in, or that no two may
    do at once; None where it has only loops."""
    first = {type(s): s for s in reversed(statements)}
    if isinstance(s := first.get(SortRow), SortRow):
        return _sorters(kernel, facts.bounds(s.count)[1])
    if isinstance(s := first.get(SortDigit), SortDigit):
        return _by_digits(kernel, s, facts)
    if isinstance(s := first.get(Attend), Attend):
        return Team(2 * s.mr * s.ways, 1)  # 16 rows a warp
    if TileProduct in first:
        return _multipliers(kernel, statements, facts)
    if ForEqual in first:
        far = any(isinstance(s, ForEqual) and s.ahead >= WARP for s in statements)
        return WARP_TEAM if far else LANE
    if any(isinstance(s, Store) and s.by for s in statements):
        return LANE
    if kernel.parallel and any(b.mode == "inout" for b in kernel.buffers):
        return WARP_TEAM  # a scatter
    return None


def _multipliers(kernel: Kernel, statements: Sequence[Statement], facts: Facts) -> Team:
    """The team of a product: lanes for each 64 rows or 128 columns of its largest tile."""
    products = [s for s in statements if isinstance(s, TileProduct)]
    tiles = max(1, *(max(s.mr // 64, -(-s.nr // 128)) for s in products))
    if _are_computed(kernel, facts):
        tiles = 2
    return Team(PRODUCT_LANES * tiles, 1)


def _of_loops(
    kernel: Kernel, loops: Sequence[tuple[tuple[str, Expr, Expr], ...]], arrays: bool, facts: Facts
) -> Team:
    """The team of a kernel whose step is shared loops. `arrays`: it has scratch."""
    most = max(_most(nest, facts) for nest in loops)
    columns = None if arrays else _columns(kernel, facts)
    if columns is not None:
        return columns
    if not kernel.parallel and most > 1024:
        return Team(1024, 1)
    if not arrays and most <= _by_one_lane(kernel, facts):
        return LANE
    if most <= PART_ROW and _steps_alike(kernel):
        lanes = 1 << (-(-most // PART_ELEMENTS) - 1).bit_length()
        return Team(max(lanes, 4), BLOCK_LANES // max(lanes, 4))
    if not arrays and all(isinstance(s, Fold | Let | Store) for s in kernel.body):
        return _by_windows(kernel, facts) or _reducers(kernel, most, facts)
    if most * _rows_of_a_step(kernel) <= WARP_ROW:
        return WARP_TEAM
    lanes = next(lanes for limit, lanes in BLOCKS if most <= limit)
    if not kernel.parallel or _few(kernel, facts):
        lanes = 1024
    if is_plain([s for s in kernel.body if not isinstance(s, Alloc)]):
        return Team(lanes, 1, resident=max(1, LOADING // lanes))
    return Team(lanes, 1)


def _steps_alike(kernel: Kernel) -> bool:
    """Whether a step reduces rows, or moves one from where data says, and all steps run the same
    instructions, whatever their number and data, and keep nothing in memory."""
    outer = {name for name, _ in kernel.parallel}
    nests = list(shared_loops(kernel.body))
    ends = {n for nest in nests for _, lo, hi in nest for n in lo.symbols() | hi.symbols()}
    if not outer or outer & ends:
        return False
    if not any(isinstance(s, Fold) for s in kernel.body) and not _is_gathered(kernel):
        return False
    return all(
        isinstance(s, Fold | Let | Store) or (isinstance(s, For) and _plain(nest_of(s)[-1]))
        for s in kernel.body
    )


def _is_gathered(kernel: Kernel) -> bool:
    """Whether a step is elements that lie where data says."""
    values = (s.value for s in walk(kernel.body) if isinstance(s, Let | Store))
    return any(isinstance(part, Checked) for v in values for part in post_order(v))


def _goes_along(kernel: Kernel) -> bool:
    """Whether each step is loops with little to do in them, and little else."""
    loops = [s for s in kernel.body if isinstance(s, For)]
    plain = all(isinstance(x, Let | Store) for s in loops for x in s.body)
    bodies = (kernel.body, *(s.body for s in loops))
    return bool(loops) and plain and all(work_of(b) <= LOADS for b in bodies)


def _sorters(kernel: Kernel, most: int | None) -> Team:
    """The team of a sort: two pairs of elements or more for a lane. Rows of any length are likely
    to be short where there are several."""
    lanes = BLOCK_LANES
    while lanes < 1024 and (not kernel.parallel if most is None else most > 4 * lanes):
        lanes *= 2
    return Team(lanes, 1)


def _are_computed(kernel: Kernel, facts: Facts) -> bool:
    """Whether a kernel is a product of few rows of 16 bits by panels that lanes compute, of which
    there are enough columns for all warps of a larger block: computing takes more than multiplying
    does."""
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    found = [
        (s, s.body[0]) for s in walk(kernel.body)
        if isinstance(s, For) and len(s.body) == 1 and isinstance(s.body[0], TileProduct)
    ]  # fmt: skip
    for s, product in found:
        assert isinstance(product, TileProduct)
        left, most = dtypes.get(product.a), most_of(s.lo, s.hi, facts)
        if product.element is None or left is None or left.bits >= 32 or most is None:
            return False
        across = PRODUCT_LANES // 16 // max(product.mr // 32, 1)  # warps beside each other
        if product.mr not in (32, 64) or most * product.nr % (8 * across):
            return False
    return bool(found)


def lanes_for(most: int) -> int:
    """Lanes of a block that sorts up to so many elements by digits."""
    return 256 if most <= 1024 else 512


def _by_digits(kernel: Kernel, s: SortDigit, facts: Facts) -> Team:
    """The team of a sort by digits: up to 8 elements for a lane, all of them in registers, of which
    half of an SM's threads have enough if elements are of 8 bytes."""
    lanes = lanes_for(facts.bounds(s.count)[1] or UNKNOWN)
    sizes = {x.name: x.dtype.itemsize for x in walk(kernel.body) if isinstance(x, Alloc)}
    threads = LOADING if sizes[s.keys] < 8 else LOADING // 2
    return Team(lanes, 1, resident=threads // lanes)


def _rows_of_a_step(kernel: Kernel) -> int:
    """How many operands a step reads a row of: not those of which all steps read the same. Of loops
    one after the other, as those of a concatenation are, the most that one of them reads."""
    outer = {name for name, _ in kernel.parallel}
    bodies = [(s,) for s in kernel.body] if is_plain(kernel.body) else [tuple(kernel.body)]
    return max([1, *(len(_rows_read(body, outer)) for body in bodies)])


def _rows_read(body: Sequence[Statement], outer: set[str]) -> set[str]:
    found = set()
    for s in walk(body):
        if not isinstance(s, Let | Fold | Store):
            continue
        for part in (p for p in post_order(s.value) if isinstance(p, Load)):
            names = {n for i in part.indices if isinstance(i, Index) for n in i.expr.symbols()}
            if names & outer and names - outer:
                found.add(part.buffer)
    return found


def is_plain(body: Sequence[Statement]) -> bool:
    """Whether a step is shared loops that only load, compute and store."""
    return all(isinstance(s, For) and _plain(s) for s in body)


def _plain(s: For) -> bool:
    return is_shared(s) and all(isinstance(x, Let | Store) for x in s.body)


def _columns(kernel: Kernel, facts: Facts) -> Team | None:
    """The team of a kernel whose step is one shared loop of few iterations, around folds of many
    elements: lanes take adjacent iterations as vectors, where memory runs along them."""
    loop = kernel.body[0] if len(kernel.body) == 1 else None
    if not isinstance(loop, For):
        return None
    folds = [s for s in loop.body if isinstance(s, Fold)]
    if not is_shared(loop) or any(not isinstance(s, Fold | Let | Store) for s in loop.body):
        return None
    deep = max((_most([(n, Expr(()), e) for n, e in s.loops], facts) for s in folds), default=0)
    most = _most([(loop.index, loop.lo, loop.hi)], facts)
    if deep <= WARP or most > COLUMN_LANES or any(s.kind.startswith("arg") for s in folds):
        return None
    width = _vector_of_columns(kernel, loop, folds, facts)
    across = 1
    while across < min(-(-most // width), WARP):
        across *= 2
    return Team(COLUMN_LANES, 1, across, width, LOADING // COLUMN_LANES)


def _vector_of_columns(kernel: Kernel, loop: For, folds: Sequence[Fold], facts: Facts) -> int:
    """Adjacent iterations of a loop whose elements are vectors of 16 bytes of the narrowest that
    its folds read along it; 1 if they need not be aligned."""
    buffers = {b.name: b for b in kernel.buffers}
    sizes, ends = set[int](), [loop.lo, *smaller_of(loop.hi)]
    for part in (p for s in folds for p in post_order(s.value) if isinstance(p, Load)):
        buffer, place, step = buffers[part.buffer], const(0), const(1)
        for index, extent in reversed(list(zip(part.indices, buffer.shape, strict=True))):
            place = place + index.expr * step if isinstance(index, Index) else place
            step = step * extent
        if place.coefficient(loop.index) == const(1):
            sizes.add(buffer.dtype.itemsize)
            ends.append(place.substitute({loop.index: loop.lo}))
    width = 16 // min(sizes) if sizes else 1
    while width > 1 and not all(facts.divides(e, width) for e in ends):
        width //= 2
    return width


def _by_one_lane(kernel: Kernel, facts: Facts) -> int:
    """Elements that one lane folds by itself: more of them where they are of windows, along which
    memory does not run: which several axes have, or which others overlap; many of those of a
    line that are so many that single lanes keep memory busy."""
    folds = [s for s in walk(kernel.body) if isinstance(s, Fold)]
    if folds and all(_slides(s) for s in folds):
        lines = all(len(s.loops) == 1 for s in folds)
        return LINE if lines and _rows(kernel, facts) * SHARED >= REDUCERS else SLIDING
    return WINDOW if all(sum(e.as_int() != 1 for _, e in s.loops) > 1 for s in folds) else 8


def _slides(s: Fold) -> bool:
    """Whether a fold moves along an axis of a tensor together with what is around it."""
    own = {name for name, _ in s.loops}
    loads = (part for part in post_order(s.value) if isinstance(part, Load))
    places = (i.expr.symbols() for x in loads for i in x.indices if isinstance(i, Index))
    return any(names & own and names - own for names in places)


def _rows(kernel: Kernel, facts: Facts) -> int:
    """The steps that a kernel has at least."""
    rows = const(1)
    for _, extent in kernel.parallel:
        rows = rows * extent
    return facts.bounds(rows)[0] or 1


def _by_windows(kernel: Kernel, facts: Facts) -> Team | None:
    """The team of a kernel that only reduces windows, along whose last axis memory runs, where they
    are so many that parts of warps, with the channels of a place each, keep memory busy."""
    folds = [s for s in kernel.body if isinstance(s, Fold)]
    most = max(s.loops[-1][1].as_int() or PART_ROW + 1 for s in folds)
    lanes = max(2, 1 << (-(-most // PART_ELEMENTS) - 1).bit_length())
    fills = _rows(kernel, facts) * lanes * SHARED >= REDUCERS
    if most > PART_ROW or most < 4 or not fills or not _steps_alike(kernel):
        return None
    if not all(len(s.loops) > 1 and _slides(s) for s in folds):
        return None
    return Team(lanes, BLOCK_LANES // lanes)


def _reducers(kernel: Kernel, most: int, facts: Facts) -> Team:
    """The team of a kernel that only reduces rows: a warp, or more where rows are few."""
    count, lanes = _rows(kernel, facts), WARP
    while lanes < 1024 and count * lanes < REDUCERS and most > lanes * 4 * LOADS:
        lanes *= 2
    team = Team(lanes, 1) if lanes > WARP else Team(WARP, 2)  # of small blocks few idle at the end
    return replace(team, resident=LOADING // team.threads)


def is_heavy(kernel: Kernel, body: Sequence[Statement]) -> bool:
    """Whether elements take many operations each, and are in no row that is read again."""
    if any(isinstance(s, Fold) for s in walk(kernel.body)):
        return False
    values = [part for s in body if isinstance(s, Let | Store) for part in post_order(s.value)]
    positions = sum(isinstance(part, Checked) for part in values)
    return work_of(body) > HEAVY or positions > POSITIONS


def most_of(lo: Expr, hi: Expr, facts: Facts) -> int | None:
    """The most iterations that a loop can be proved to have."""
    ends = smaller_of(hi)
    if len(ends) > 1:
        known = [e for e in (most_of(lo, end, facts) for end in ends) if e is not None]
        return min(known) if known else None
    return facts.bounds(hi - lo)[1]


def smaller_of(expr: Expr) -> tuple[Expr, ...]:
    """The expressions of which one is the smallest, or the one itself."""
    if len(expr.terms) == 1 and expr.terms[0][1] == 1 and len(expr.terms[0][0]) == 1:
        atom, power = expr.terms[0][0][0]
        if power == 1 and atom.kind == "min":
            return atom.args
    return (expr,)


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
