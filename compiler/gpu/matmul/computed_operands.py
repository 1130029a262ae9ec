"""Right operands of products that are computed on their way into shared memory: of codes, say.

A lane computes some rows by a vector of adjacent columns of each stage, so that a panel is never in
memory. What it reads for that it has in registers a whole stage before: it computes what was read,
stores that in shared memory, and starts to read for the stage after, which is under way while the
tensor cores multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.memory import Memory, Slot
from stagefuse.compiler.kernel_ir import Const, Index, Load, Op, TileProduct
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dtypes import BOOL, F32, I32, I64

from .async_copies import Copies, Copy, Tile

ROWS = (4, 2)
"""Rows that a lane may compute together, which share bytes of codes and scales."""
WIDTHS = (8, 4)
"""Adjacent columns that it may take."""
MOST_AHEAD = 32
"""Registers that a lane has for what it reads a stage before; what takes more is read when it is
computed."""
STAGE = "stage'"

Number = tuple[int, ...]
"""Which of a lane's loads for a stage one is."""
Read = Callable[[Number, Memory, str, int], tuple[Value, ...]]
"""What gives the registers of so many elements from an address."""


def vector(
    w: FoldWriter, value: KernelValue, slot: Slot, at: Mapping[str, Expr], mask: Value | None,
    any_outside: bool = False, together: int = 1,
) -> list[Value]:  # fmt: skip
    """A value at adjacent elements, other indices being at places; where a mask does not hold 0,
    or what it makes of zeros if `any_outside` will do. So many places from a multiple of their
    number on share what is the same for them."""
    with _at(w, slot, at, mask, together):
        found = [w.value(value) for _ in w.elements()]
    if mask is None or mask.known == 1 or any_outside:
        return found
    zero = w.code.const(0.0, "float")
    return [mask.select(value, zero) for value in found]


def start_vector(
    w: FoldWriter, loads: Sequence[Load], slot: Slot, at: Mapping[str, Expr], mask: Value | None,
    together: int = 1, read: Read | None = None, joined: Sequence[tuple[Load, ...]] = (),
) -> None:  # fmt: skip
    """Reads what `vector` takes apart later, by loads whose positions are known, or by one of those
    that are joined; into registers that `read` gives, if it is given."""
    with _at(w, slot, at, mask, together):
        for n, _ in enumerate(w.elements()):
            for m, load in enumerate(loads):
                w.start_reading(load, None if read is None else partial(read, (n, m)))
            for some in joined:
                w.start_reading_one(*some)


@contextmanager
def _at(
    w: FoldWriter, slot: Slot, at: Mapping[str, Expr], mask: Value | None, together: int
) -> Iterator[None]:
    before, w.together = w.together, together
    with w.slot_of(slot, mask), w.binding(**at):
        yield
    w.together = before


def _numbered(read: Read, lead: Number) -> Read:
    """The same for some of the loads, whose numbers begin so."""
    return lambda which, memory, at, count: read((*lead, *which), memory, at, count)


def plain_loads(value: KernelValue) -> list[Load]:
    """The loads of a value whose positions are known before anything is read."""
    loads = [x for x in post_order(value) if isinstance(x, Load)]
    return [x for x in loads if not x.guard and all(isinstance(i, Index) for i in x.indices)]


def joined_loads(value: KernelValue) -> list[tuple[Load, ...]]:
    """Loads of one dtype of which a value has one or another, or something else, as indices say."""
    found = list[tuple[Load, ...]]()
    for x in post_order(value):
        if not isinstance(x, Op) or x.fn != "select":
            continue
        loads = [a for a in x.args[1:] if isinstance(a, Load) and a.guard and _is_known(a)]
        alike = len({a.stored for a in loads}) == 1 and _are_apart(x.args[0], loads)
        found += [tuple(loads)] if alike else [(a,) for a in loads]
    return found


def _are_apart(condition: KernelValue, loads: Sequence[Load]) -> bool:
    """Whether one of two loads at most is done: one where an index is below an end, the other where
    it is not."""
    if len(loads) != 2 or condition not in loads[0].guard or not isinstance(condition, Op):
        return False
    low, end = condition.args
    if condition.fn != "lt" or not (isinstance(low, Index) and isinstance(end, Index)):
        return False
    return Op("ge", (Index(low.expr - end.expr), Const(0, I64)), BOOL) in loads[1].guard


def _is_known(load: Load) -> bool:
    """Whether where a load reads, and whether it does, is known before anything is read."""
    tests = [p for g in load.guard for p in (g.args if isinstance(g, Op) else (g,))]
    return all(isinstance(p, Index | Const) for p in (*load.indices, *tests))


def row_of_panel(
    w: FoldWriter, s: TileProduct, k: Expr, column: Expr, width: int, mask: Value | None,
    together: int = 1,
) -> list[Value]:  # fmt: skip
    """Adjacent elements of a row of a panel that is computed, as `vector` has them."""
    assert s.element is not None
    slot = Slot(s.c, w.resolve(column), width)
    return vector(w, s.element, slot, {s.k: w.resolve(k)}, mask, together=together)


def rounded_pairs(code: Code, values: Sequence[Value], dtype: str) -> list[Value]:
    """Elements in f16 or bf16, two in a word."""
    form = f"cvt.rn.{dtype}x2.f32"  # the upper half comes first
    pairs = zip(values[1::2], values[::2], strict=True)
    return [code.pure(form, "i32", high, low) for high, low in pairs]


class Computed(Copies):
    """A lane's part of both operands: the left one copied, the right one computed. `begin`: the
    place in the depth where the tile's begins."""

    widths: ClassVar[tuple[int, ...]] = WIDTHS

    def __init__(
        self, writer: FoldWriter, tile: Tile, ring: Value, begin: Expr | None = None
    ) -> None:
        super().__init__(writer, tile, ring)
        self.ring, self.begin = ring, begin or const(0)
        self.rows, self.width = min(
            ((rows, width) for width in self.widths for rows in ROWS),
            key=lambda each: self._turns(*each) * each[0] * each[1],
        )
        self.turns = range(self._turns(self.rows, self.width))
        depth = writer.resolve(tile.s.depth)
        self.whole = writer.divides(tile.depth, depth)
        stages = floordiv(depth + (tile.depth - 1), tile.depth)
        self.last = writer.resolve(maximum(stages - 1, 0, writer.facts))
        self.some = None if writer.facts.is_positive(depth) else writer.holds("gt", depth, const(0))
        assert tile.s.element is not None
        self.loads = plain_loads(tile.s.element)
        self.first: list[tuple[Value, Value]] = []
        self.next: tuple[Value, Value] | None = None
        self.ahead: dict[Number, tuple[Value, ...]] = {}
        """Registers with what is read for the next stage."""

    def _right(self, ring: Value) -> list[Copy]:
        return []

    def _turns(self, rows: int, width: int) -> int:
        """How often all lanes compute some rows by so many columns for a stage."""
        units = self.tile.depth // rows * (self.tile.columns // width)
        return -(-units // self.writer.team.lanes)

    # Stages

    def issue(self, number: int, some: Value) -> None:
        super().issue(number, some)
        code = self.writer.code
        self.fill(code.const(number, "i32"), code.const(number * self.tile.stage_bytes, "i32"))

    def issue_next(self, some: Value, reading: Value, number: Value) -> None:
        super().issue_next(some, reading, number)
        self.next = number, self.before(reading)

    def finish(self) -> None:
        assert self.next is not None
        self.fill(*self.next)

    def fill(self, number: Value, into: Value) -> None:
        """Computes this lane's elements of a stage and stores them at an offset, and starts to
        read for the stage after; stages come in order. The first ones, whose numbers are known,
        wait until all of them are read."""
        if number.known is not None:
            self.first.append((number, into))
            return
        w = self.writer
        # the registers are loaded again while what is made of them here is still known
        had = {n: tuple(w.code.variable(v.type, v) for v in x) for n, x in self.ahead.items()}

        def found(which: Number, memory: Memory, at: str, count: int) -> tuple[Value, ...]:
            return had.get(which) or w.read_words(memory, at, count)

        def again(which: Number, memory: Memory, at: str, count: int) -> tuple[Value, ...]:
            return w.read_words(memory, at, count, self.ahead.get(which, ()))

        if had:
            self._start(number, found)
        self._compute(number, into)
        w.under_way = {}
        if had:
            self._start(number + 1, again)
            w.under_way = {}

    def ready(self) -> None:
        w = self.writer
        for number, _ in self.first:
            self._start(number)
        words = sum(len(x) for x in w.under_way.values())
        if self.tile.stages > 1 and words <= MOST_AHEAD * len(self.first):
            after = w.code.const(len(self.first), "i32")
            self._start(w.code.variable("i32", after), self._keep)
        for number, into in self.first:
            self._compute(number, into)
        w.under_way = {}

    def _keep(self, which: Number, memory: Memory, at: str, count: int) -> tuple[Value, ...]:
        """Registers that a load is made into for every stage from this one on."""
        self.ahead[which] = self.writer.read_words(memory, at, count)
        return self.ahead[which]

    def _start(self, number: Value, read: Read | None = None) -> None:
        """Starts to read for a stage."""
        w, s = self.writer, self.tile.s
        with self.at_stage(number):
            for turn in self.turns:
                for n, (slot, k, mask) in enumerate(self._rows(turn)):
                    own = None if read is None else _numbered(read, (turn, n))
                    start_vector(w, self.loads, slot, {s.k: k}, mask, self.rows, own)

    def _compute(self, number: Value, into: Value) -> None:
        """Computes and stores what was read for a stage."""
        w, s = self.writer, self.tile.s
        assert s.element is not None
        with self.at_stage(number):
            for turn in self.turns:
                for n, (slot, k, mask) in enumerate(self._rows(turn)):
                    found = vector(w, s.element, slot, {s.k: k}, mask, together=self.rows)
                    self._store(turn, n, found, into)

    @contextmanager
    def at_stage(self, number: Value) -> Iterator[None]:
        """Inside, the stage at hand is that of a number, or the last one before it."""
        w, known = self.writer, number.known
        if known is not None:
            with w.binding(**{STAGE: minimum(const(known), self.last, w.facts)}):
                yield
            return
        here = w.code.intrinsic("smin", number, w.index(self.last, "i32"))
        with w.named(**{STAGE: (here, const(0), self.last)}):
            yield

    # Elements

    def _place(self, turn: int) -> tuple[Expr, Expr, Value]:
        """The first row and column of a lane's elements in a stage, and whether it has them."""
        w, tile = self.writer, self.tile
        across = tile.columns // self.width
        flat = sym("lane") + turn * w.team.lanes
        row, column = floordiv(flat, across) * self.rows, mod(flat, across) * self.width
        if tile.depth // self.rows * across == len(self.turns) * w.team.lanes:
            return row, column, w.code.const(1, "i1")
        return row, column, w.holds("lt", row, const(tile.depth))

    def _rows(self, turn: int) -> Iterator[tuple[Slot, Expr, Value | None]]:
        """Some of this lane's elements of the stage at hand, those of a row together: columns, row
        of the panel, and whether it is one. Memory may be touched meanwhile if there are any."""
        w, tile, s = self.writer, self.tile, self.tile.s
        row, column, own = self._place(turn)
        panel, inside = floordiv(column, s.nr), mod(column, s.nr)
        # columns behind the last panel are never stored, whatever they are
        here = w.resolve(tile.lo + minimum(panel, tile.panels - 1))
        slot = Slot(s.c, w.resolve(inside), self.width)
        for n in range(self.rows):
            with w.when(own), w.when(self.some), w.binding(**{tile.name: here}):
                k = sym(STAGE) * tile.depth + row + n
                mask = None if self.whole else w.holds("lt", k, s.depth)
                yield slot, w.resolve(self.begin + k), mask

    def _store(self, turn: int, n: int, values: list[Value], into: Value) -> None:
        """Stores a row of elements at an offset; halves in pairs, which one instruction rounds."""
        w, tile = self.writer, self.tile
        dtype = w.memory[tile.s.a].dtype
        memory = Memory("stage", F32 if tile.size == 4 else I32, (), "shared", self.ring)
        row, column, own = self._place(turn)
        if tile.size == 2:
            values = rounded_pairs(w.code, values, dtype.name)
        start, offset = self.target(row, column, n)
        start = start + into
        with w.when(own):
            for first in range(0, len(values), 4):
                at = f"[{start.text}+{offset + first * 4}]"
                w.write(memory, at, values[first : first + 4])

    def target(self, row: Expr, column: Expr, n: int) -> tuple[Value, int]:
        """Where in the first stage an element n rows below another lies: address and offset."""
        tile = self.tile
        start = self.ring + self.writer.index((row * tile.pitch + column) * tile.size, "i32")
        return start, tile.left_bytes + n * tile.pitch * tile.size
