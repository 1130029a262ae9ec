"""Statements of a step: loops that a team shares or runs in step, branches, stores, barriers.

At team level all lanes run the same statements on the same values, and one of them stores. Inside
a shared loop each lane has elements of its own, one after the other in a row of slots: slot j of
lane l holds elements (j * lanes + l) * width .. + width - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from stagefuse.compiler.cpu.bodies import walk, work_of
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Attend,
    Fold,
    For,
    ForEqual,
    If,
    Kernel,
    Let,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.facts import Facts

from .barriers import BarrierWriter
from .ir import Value
from .memory import VECTOR_BYTES, Group, Memory, Scope, Slot
from .private import accesses, is_simple, scatters, turns_apart
from .teams import (
    MOST_IN_REGISTERS,
    Team,
    is_heavy,
    is_shared,
    is_warp_loop,
    most_of,
    nest_of,
)

UNROLL = 4
LIGHT = 64
"""Values of several steps of a loop that are worth writing out to have more loads under way."""
Carry = list[Value]
Visit = Callable[[Carry], Carry]
Nest = Sequence[tuple[str, Expr, Expr]]


class LoopWriter(BarrierWriter):
    """The body of a kernel, as far as its control flow goes."""

    def __init__(self, kernel: Kernel, facts: Facts, team: Team) -> None:
        super().__init__(kernel, facts, team)
        self.width = 1
        self.in_team = team.lanes > 1
        self.slot: Slot | None = None
        self.mask: Value | None = None
        self.straight = False  # the body of a shared loop has neither loops nor branches
        self.exists: Value | None = None  # whether the kernel has this team's step, if not always

    # Statements

    def statements(self, body: Sequence[Statement]) -> None:
        for s in body:
            if self.in_team:
                self.order(s)
            self.statement(s)
            self.forget()

    def statement(self, s: Statement) -> None:
        if isinstance(s, Let):
            for scope in self.elements():
                scope.locals[s.name] = self.value(s.value)
        elif isinstance(s, Store):
            self.store(s)
        elif isinstance(s, For):
            if self.in_team and is_warp_loop(s):
                self.by_warps(s)
            elif self.in_team and is_shared(s):
                self.share(s)
            else:
                self.plain(s)
        elif isinstance(s, ForEqual):
            self.for_equal(s)
        elif isinstance(s, If):
            self.branch(s)
        elif isinstance(s, Fold):
            self.fold(s)
        elif isinstance(s, TileProduct):
            self.product(s)
        elif isinstance(s, Attend):
            self.attend(s)
        elif isinstance(s, SortRow):
            self.sort(s)
        elif isinstance(s, SortDigit):
            self.sort_digit(s)
        elif not isinstance(s, Alloc):
            raise TypeError(f"unknown statement {s}")

    def fold(self, s: Fold) -> None:
        raise NotImplementedError

    def for_equal(self, s: ForEqual) -> None:
        raise NotImplementedError

    def product(self, s: TileProduct) -> None:
        raise NotImplementedError

    def attend(self, s: Attend) -> None:
        raise NotImplementedError

    def sort(self, s: SortRow) -> None:
        raise NotImplementedError

    def sort_digit(self, s: SortDigit) -> None:
        raise NotImplementedError

    def combine(self, s: Store, memory: Memory) -> None:
        raise NotImplementedError

    # Stores

    def store(self, s: Store) -> None:
        memory = self.memory[s.buffer]
        if s.by:
            return self.combine(s, memory)
        if memory.space == "registers":
            for _ in self.elements():
                self.write_cell(memory, self.place(memory, s.indices), self.value(s.value))
            return
        if self.slot is not None:
            return self._store_group(s, memory)
        with self.by(self.first_lane() if self.in_team else None):
            at = self.address(memory, self.place(memory, s.indices))
            value = self.value(s.value)
            with self.when(self.exists):
                self.write(memory, at, [value])

    def first_lane(self) -> Value:
        return self.symbols["lane"].compare("eq", 0)

    def _store_group(self, s: Store, memory: Memory) -> None:
        """One store of all elements, if they are adjacent and aligned."""
        found = []
        self.fetched = {}
        only = self.only_one()
        for _ in self.elements():
            with self.by(only):
                value = self.value(s.value)
                place = self.place(memory, s.indices)
                vector = self.vector_of(memory, place)
                found.append((value, place[1], vector, self.address(memory, place)))
        self.fetched = None
        offsets = {o.text if o is not None else "" for _, o, _, _ in found}
        width = 1
        if len(found) > 1 and found[0][2] is not None and len(offsets) == 1:
            width = min(len(found), VECTOR_BYTES // memory.dtype.itemsize)
            width = min(width, 4) if memory.dtype.itemsize == 1 else width
        with self.when(only), self.when(self.exists):
            for n in range(0, len(found), width):
                self.write(memory, found[n][3], [v for v, _, _, _ in found[n : n + width]])

    def only_one(self) -> Value | None:
        """Of lanes that have the same element, the one that stores."""
        return self.symbols["row'"].compare("eq", 0) if self.team.across else None

    def elements(self) -> Iterator[Scope]:
        """The scopes of the elements of this lane's slot, entered one after the other."""
        slot = self.slot
        if slot is None:
            yield self.scopes[-1]
            return
        for number, scope in enumerate(slot.scopes):
            before = self.group
            self.group = None
            if slot.width > 1:
                self.group = Group(slot.name, slot.first, slot.width, number)
            with self.scope(scope), self.binding(**{slot.name: slot.first + number}):
                yield scope
            self.group = before

    def forget(self) -> None:
        super().forget()
        if self.slot is not None:
            inner, self.scopes = self.scopes, self.slot.scopes
            super().forget()
            self.scopes = inner

    # Loops

    def plain(self, s: For) -> None:
        """A loop that every lane runs by itself, or all in step."""

        before = set(self.unread), set(self.unwritten)
        _, writes = self._touched(s) if self.in_team else (set[str](), set[str]())

        def body(carry: Carry) -> Carry:
            self.statements(s.body)
            if self.in_team and (self.unread or self.unwritten & writes):
                self.barrier()
            return carry

        self.loop(s.index, s.lo, s.hi, [], body)
        if not self.facts.is_positive(self.resolve(s.hi - s.lo)):
            self._as_well(before)

    def loop(self, name: str, lo: Expr, hi: Expr, carry: Carry, body: Visit) -> Carry:
        """A counted loop; what it carries changes in place."""
        code = self.code
        first, last = self.resolve(lo), self.resolve(hi)
        kind = "i32" if self.is_small(first) and self.is_small(last) else "i64"
        start = self._value(first, kind)
        step = code.const(1, kind)
        end = self._value(last, kind)
        return self._counted(name, start, end, step, (lo, hi - 1), carry, body)[0]

    def strided(
        self,
        name: str,
        start: Value,
        end: Expr,
        step: int,
        carry: Carry,
        body: Callable[[Expr, Carry], Carry],
        ends: tuple[Expr, Expr],
        unroll: int = UNROLL,
        before: Callable[[Expr], None] = lambda _: None,
    ) -> Carry:
        """A loop in steps, several of them at a time so that their loads are on the way together;
        `body` gets the position, and so does what comes before the bodies of several steps."""
        code, last = self.code, self._value(end, start.type)
        if unroll == 1:
            only = code.const(step, start.type)
            found = self._counted(
                name, start, last, only, ends, carry, lambda c: body(sym(name), c)
            )
            return found[0]
        step_value = code.const(step, start.type)
        many = code.const(step * unroll, start.type)

        def several(present: Carry) -> Carry:
            with self._together():
                for n in range(unroll):
                    with self.scope():
                        before(sym(name) + n * step)
                for n in range(unroll):
                    with self.scope():
                        present = body(sym(name) + n * step, present)
            return present

        extent, whole = ends[1] + 1 - ends[0], step * unroll
        turns = floordiv(extent, whole), floordiv(mod(extent, whole) + (step - 1), step)
        carry, at = self._counted(
            name, start, last - step * (unroll - 1), many, ends, carry, several, turns[0]
        )
        rest, _ = self._counted(
            name, at, last, step_value, ends, carry, lambda c: body(sym(name), c), turns[1]
        )
        return rest

    def _counted(
        self,
        name: str,
        start: Value,
        end: Value,
        step: Value,
        ends: tuple[Expr, Expr],
        carry: Carry,
        body: Visit,
        turns: Expr | None = None,
    ) -> tuple[Carry, Value]:
        """A loop from `start` while below `end`, `turns` times or as often as steps are between
        the ends; gives what it carries, and where it ended."""
        code = self.code
        counter = code.variable(start.type, start)
        totals = [code.variable(v.type, v) for v in carry]
        head, done = code.label("loop"), code.label("end")
        self.note_turns(head, ends, step.known, turns)
        with code.loop_scope(), self.scope():
            code.start(head)
            inner = Value(code, counter.text, counter.type, code.depth)
            code.branch_if(inner.compare("lt", end), done, holds=False)
            with self.named(**{name: (inner, *ends)}):
                present = [Value(code, t.text, t.type, code.depth) for t in totals]
                for total, result in zip(present, body(present), strict=True):
                    code.set(total, result)
            bits = "64" if counter.type == "i64" else "32"
            code.write(f"add.s{bits}", counter, counter, step)
            code.branch(head)
        code.start(done)
        return totals, counter

    def by_warps(self, s: For) -> None:
        raise NotImplementedError

    def share(self, s: For) -> None:
        """A nest of independent iterations, divided among the lanes."""
        nest = nest_of(s)
        body = nest[-1].body
        loops = [(f.index, f.lo, f.hi) for f in nest]

        def visit(carry: Carry) -> Carry:
            self.statements(body)
            return carry

        self.straight = simple = all(isinstance(x, Let | Store) for x in body)
        in_cells = self._touches_cells(s)
        apart = simple and not in_cells and scatters(self, body)
        heavy = simple and not in_cells and is_heavy(self.kernel, body)
        cut = self._whole(loops) if simple and not (apart or in_cells or heavy) else None
        if cut is None:
            even = all(is_simple(x) for x in body)
            width = self.width_of(loops) if not apart and (even or self.team.across) else 1
            if width > 1 and turns_apart(self, s, width):
                width = 1
            at_once = UNROLL if simple and work_of(body) * width <= LIGHT else 1
            self.spread(loops, width, [], visit, not heavy, at_once)
            self.straight = False
            return
        (index, lo, hi, whole), code = cut, self.code
        part, done = code.label("part"), code.label("done")
        code.branch_if(self.holds("ge", hi - lo, whole), part, holds=False)
        with code.branch_scope(), self.scope():
            self.spread([(index, lo, lo + whole)], self.width, [], visit)
        code.branch(done)
        code.start(part)
        with code.branch_scope(), self.scope():
            self.spread([(index, lo, hi)], 1, [], visit, unroll=False, at_once=1)
        code.start(done)
        self.straight = False

    def _together(self) -> AbstractContextManager[None]:
        """Around iterations that are written out one after the other."""
        return self.noting_late() if self.straight else nullcontext()

    def _touches_cells(self, s: For) -> bool:
        """Whether it uses scratch in registers, which only unrolled loops can."""
        buffers = {a.buffer for a in accesses((s,))}
        return any(self.memory[b].space == "registers" and self.memory[b].shape for b in buffers)

    def _whole(self, loops: Nest) -> tuple[str, Expr, Expr, Expr] | None:
        """A loop that is of one full length, but for the last step of the kernel."""
        if len(loops) != 1:
            return None
        index, lo, hi = loops[0]
        length = self.resolve(hi - lo)
        most = most_of(lo, hi, self.facts)
        if most is None or length.as_int() is not None or most % (self.team.lanes * self.width):
            return None
        if self._cut(hi, lo + most) is None or not self.divides(self.width, self.resolve(lo)):
            return None
        if self.width > 1 and self.divides(self.width, self.resolve(hi)):
            return None  # in whole vectors, which predicates tell from those behind the end
        return index, lo, hi, const(most)

    def _cut(self, hi: Expr, whole: Expr) -> Expr | None:
        """The other end if an end is the smaller of a full one and another."""
        if len(hi.terms) != 1 or hi.terms[0][1] != 1 or len(hi.terms[0][0]) != 1:
            return None
        atom, power = hi.terms[0][0][0]
        if power != 1 or atom.kind != "min" or whole not in atom.args:
            return None
        return atom.args[1 - atom.args.index(whole)]

    def width_of(self, loops: Nest) -> int:
        """Adjacent elements of the innermost loop that a lane takes at a time."""
        _, lo, hi = loops[-1]
        fits = all(self.divides(self.width, self.resolve(e)) for e in (lo, hi))
        return self.width if fits else 1

    def spread(
        self,
        loops: Nest,
        width: int,
        carry: Carry,
        visit: Visit,
        unroll: bool = True,
        at_once: int = UNROLL,
    ) -> Carry:
        """Visits this lane's elements of nested loops: written out, or some at once in a loop."""
        extents = [self.resolve(hi - lo) for _, lo, hi in loops]
        total = const(1)
        for extent in extents:
            total = total * extent
        most: int | None = 1
        for _, lo, hi in loops:
            longest = most_of(self.resolve(lo), self.resolve(hi), self.facts)
            most = None if most is None or longest is None else most * longest
        lanes = self.team.across or self.team.lanes
        slots = None if most is None else -(-most // (lanes * width))
        if not unroll or slots is None or slots * width > MOST_IN_REGISTERS:
            return self._spread_loop(loops, extents, total, width, carry, visit, at_once)
        (_, lo, hi), *others = loops
        end = None if others else self._cut(hi, lo + slots * lanes * width)
        if end is not None:  # what lies behind a full loop is behind the other end too
            total = self.resolve(end - lo)
        with self._together():
            for number in range(slots):
                unit = sym("column'" if self.team.across else "lane") + number * lanes
                mask = None
                if not self.facts.is_nonneg(total - 1 - unit * width):
                    mask = self.holds("lt", unit * width, total)
                carry = self._visit(loops, extents, unit, width, mask, carry, visit)
        return carry

    def _spread_loop(
        self,
        loops: Nest,
        extents: list[Expr],
        total: Expr,
        width: int,
        carry: Carry,
        visit: Visit,
        at_once: int,
    ) -> Carry:
        lanes = self.team.lanes
        kind = "i32" if self.is_small(total + UNROLL * lanes * width) else "i64"
        start = self.index(sym("lane") * width, kind)
        name = f"{loops[-1][0]}'"
        self.multiples[name] = width

        def body(flat: Expr, present: Carry) -> Carry:
            return self._visit(loops, extents, flat, width, None, present, visit, scaled=True)

        ends = (const(0), total - 1)
        return self.strided(name, start, total, lanes * width, carry, body, ends, at_once)

    def _visit(
        self,
        loops: Nest,
        extents: list[Expr],
        unit: Expr,
        width: int,
        mask: Value | None,
        carry: Carry,
        visit: Visit,
        scaled: bool = False,
    ) -> Carry:
        """One slot: binds the indices of the nest to a place in it."""
        flat = unit if scaled else unit * width
        places: dict[str, Expr] = {}
        for (name, lo, _), extent in reversed(list(zip(loops[1:], extents[1:], strict=True))):
            places[name] = self.resolve(lo) + mod(flat, extent, self.facts)
            flat = floordiv(flat, extent, self.facts)
        name, lo, _ = loops[0]
        places[name] = self.resolve(lo) + flat
        last = loops[-1][0]
        with self.slot_of(Slot(last, self.resolve(places[last]), width), mask):
            with self.binding(**places):
                return visit(carry)

    @contextmanager
    def slot_of(self, slot: Slot, mask: Value | None) -> Iterator[None]:
        """Inside, values are those of a lane's elements, where a mask holds."""
        slot.scopes = [Scope() for _ in range(slot.width)]
        before = self.slot, self.in_team, self.mask
        self.slot, self.in_team, self.mask = slot, False, mask
        try:
            with self.when(mask):
                yield
        finally:
            self.slot, self.in_team, self.mask = before

    # Branches

    def branch(self, s: If) -> None:
        if self.slot is not None and self.slot.width > 1:
            raise AssertionError("a branch has one element at a time")
        for scope in self.elements():
            condition = self.value(s.condition)
            loops = any(isinstance(x, For | Fold | ForEqual) for x in walk(s.body))
            if not loops and not self.in_team:
                with self.when(condition), self._alone(), self.scope():
                    self.statements(s.body)
                continue
            code = self.code
            done, before = code.label("else"), (set(self.unread), set(self.unwritten))
            if self.active is not None:
                condition = condition & self.active
            code.branch_if(condition, done, holds=False)
            with code.branch_scope(), self._alone(), self.scope():
                self.statements(s.body)
            code.start(done)
            self._as_well(before)
            del scope

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside the scope of one element."""
        before = self.slot
        self.slot = None
        try:
            yield
        finally:
            self.slot = before
