"""Folds: each lane reduces its elements, then the lanes of the team by shuffles.

Warps of a block meet in shared memory. The order of a reduction depends on sizes alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import arithmetic, is_short
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import Fold, Load, Statement
from stagefuse.compiler.scalar import identity
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import DType

from . import scalars
from .fold_runs import runs
from .index import INT32
from .ir import Code, Value
from .loops import UNROLL, Carry, Visit
from .memory import Slot
from .private import MOST_WORK, is_fixed
from .shuffles import access_of, shuffled
from .teams import WARP
from .tensor_maps import TensorMap
from .versions import VersionWriter

NOWHERE = {"i32": (1 << 31) - 1, "i64": (1 << 63) - 1}
FEW = 4
DEEP = 8
"""Rows of a column that a lane has on the way at a time."""
MOST_LOADS = 8
"""Of an element, up to which those of several vectors are under way; those of one vector are for
twice as many."""


class FoldWriter(VersionWriter):
    """The body of a kernel, as far as its reductions go. `extremes`: those that `argmax` and
    `argmin` found among the statements being written, each with its fold."""

    extremes: tuple[tuple[Fold, Value], ...] = ()

    def statements(self, body: Sequence[Statement]) -> None:
        before, self.extremes = self.extremes, ()
        for run in runs(body):
            folds = [s for s in run if isinstance(s, Fold)]
            if not folds:
                self.extremes = ()  # what they are of may be written
            if len(folds) == 1 or not self._fold_together(folds):
                super().statements(run)
        self.extremes = before

    def _fold_together(self, folds: Sequence[Fold]) -> bool:
        """Reduces in one loop what is over the same elements, if lanes share that."""
        if not folds or any(map(self._is_tiny, folds)):
            return False
        if self.in_team:
            for s in folds:
                self.order(s)
            for s, total in zip(folds, self._fold_by_team(folds), strict=True):
                self.scopes[-1].locals[s.name] = self._finished(s, total)
        elif self.team.across and self.slot is not None and not any(map(is_short, folds)):
            self._fold_columns(folds, self.slot)
        else:
            return False
        self.forget()
        return True

    def fold(self, s: Fold) -> None:
        found = self._found_already(s)
        if found is not None:
            self.scopes[-1].locals[s.name] = found
            return
        if self.in_team and not self._is_tiny(s):
            (total,) = self._fold_by_team([s])
            self.scopes[-1].locals[s.name] = self._finished(s, total)
            if s.kind.startswith("arg"):
                self.extremes += ((s, total[0]),)
            return
        if self.team.across and self.slot is not None and not is_short(s):
            return self._fold_columns([s], self.slot)
        if self.slot is not None and self.slot.width > 1 and is_fixed(s):
            return self._fold_slot(s, self.slot)
        for scope in self.elements():
            with self._alone():
                scope.locals[s.name] = self._finished(s, self._fold_here(s))

    def _found_already(self, s: Fold) -> Value | None:
        """The extreme of values of which the place of the extreme was looked for before."""
        for other, value in self.extremes:
            same = self._unique(other.value) is self._unique(s.value) and other.loops == s.loops
            if same and other.kind == f"arg{s.kind}":
                return value
        return None

    def _is_tiny(self, s: Fold) -> bool:
        """Whether each lane folds it all by itself: few elements, none in another's registers."""
        for part in post_order(s.value):
            if isinstance(part, Load) and part.buffer in self.memory:
                memory = self.memory[part.buffer]
                if memory.shape and memory.space == "registers":
                    return False
        sizes = [extent.as_int() for _, extent in s.loops]
        total = 1
        for size in sizes:
            total *= FEW + 1 if size is None else size
        return total <= FEW and is_short(s)

    # Steps

    def _kind(self, s: Fold) -> str:
        """The type of a position in this fold."""
        most = 1
        for _, extent in s.loops:
            size = self.most(extent)
            most = INT32 + 1 if size is None else most * max(size, 0)
        return "i32" if most <= INT32 else "i64"

    def _start(self, s: Fold) -> Carry:
        if not s.kind.startswith("arg"):
            return [self.code.const(identity(s.kind, s.dtype), scalars.REGISTER[s.dtype.name])]
        dtype = s.value.dtype.compute
        kind = self._kind(s)
        first = self.code.const(identity(s.kind, dtype), scalars.REGISTER[dtype.name])
        return [first, self.code.const(NOWHERE[kind], kind)]

    def _step(self, s: Fold, total: Carry) -> Carry:
        """One more element, unless this lane has none here."""
        value = self.value(s.value)
        if self.mask is not None:
            value = self.mask.select(value, self._start(s)[0])
        if s.kind.startswith("arg"):
            flat = const(0)
            for name, extent in s.loops:
                flat = flat * extent + sym(name)
            place = self.index(flat, self._kind(s))
            ahead = _ahead(s.kind, total[0], value, s.value.dtype)
            return [ahead.select(value, total[0]), ahead.select(place, total[1])]
        return [combine(self.code, s.kind, total[0], value, s.dtype)]

    def _finished(self, s: Fold, total: Carry) -> Value:
        if not s.kind.startswith("arg"):
            return total[0]
        place = total[1]
        place = place.compare("eq", NOWHERE[place.type]).select(
            self.code.const(0, place.type), place
        )
        return place.to("sext", "i64")

    # One lane

    def _fold_here(self, s: Fold) -> Carry:
        before, self.mask = self.mask, None
        try:
            if is_short(s):
                return self._fold_unrolled(s)
            return self._fold_nest(s, 0, self._start(s))
        finally:
            self.mask = before

    def _fold_unrolled(self, s: Fold) -> Carry:
        """A fold over a few positions, written out."""
        total = self._start(s)
        for place in _places(s):
            with self.binding(**place), self.scope():
                total = self._step(s, total)
        return total

    def _fold_nest(self, s: Fold, depth: int, total: Carry) -> Carry:
        if depth == len(s.loops):
            return self._step(s, total)
        many = UNROLL if depth == len(s.loops) - 1 else 1
        return self._several(
            *s.loops[depth], total, lambda carry: self._fold_nest(s, depth + 1, carry), many
        )

    def _several(self, name: str, extent: Expr, carry: Carry, body: Visit, many: int) -> Carry:
        """A loop that every lane runs by itself, so many steps at a time."""

        def step(at: Expr, present: Carry) -> Carry:
            with self.binding(**{name: at}):
                return body(present)

        size = self.resolve(extent)
        zero = self.code.const(0, "i32" if self.is_small(size + many) else "i64")
        ends = (const(0), size - 1)
        return self.strided(f"{name}'", zero, size, 1, carry, step, ends, many)

    def _fold_slot(self, s: Fold, slot: Slot) -> None:
        """A fold for each element of a slot, all at once, so that they are read together."""

        def nest(depth: int, carry: Carry) -> Carry:
            if depth == len(s.loops):
                return self._turn([s], slot, carry)
            name, extent = s.loops[depth]
            return self.loop(name, const(0), extent, carry, lambda c: nest(depth + 1, c))

        before, self.mask = self.mask, None
        totals = self._start(s) * slot.width
        if is_short(s):
            for place in _places(s):
                with self.binding(**place):
                    totals = self._turn([s], slot, totals)
        else:
            totals = nest(0, totals)
        self.mask = before
        for scope, total in zip(self.elements(), totals, strict=True):
            scope.locals[s.name] = total

    def _turn(self, folds: Sequence[Fold], slot: Slot, carry: Carry) -> Carry:
        """One step of the folds of a slot's elements, of each fold all of them one after the other;
        what it computes stays in it."""
        scopes = [replace(x, values=dict(x.values), locals=dict(x.locals)) for x in slot.scopes]
        self.slot = replace(slot, scopes=scopes)
        found = list(carry)
        for number, _ in enumerate(self.elements()):
            for place, s in enumerate(folds):
                at = place * slot.width + number
                found[at] = self._step(s, [carry[at]])[0]
        self.slot = slot
        return found

    # Columns

    def _fold_columns(self, folds: Sequence[Fold], slot: Slot) -> None:
        """Folds for each element of a slot, all at once: lanes that have the same elements share
        their longest loop."""
        s = folds[0]
        sizes = [self.most(extent) for _, extent in s.loops]
        longest = max(range(len(sizes)), key=lambda n: (sizes[n] is None, sizes[n] or 0))
        name, extent = s.loops[longest]
        rest = (*s.loops[:longest], *s.loops[longest + 1 :])
        extent = self.resolve(extent)
        kind = "i32" if self.is_small(extent + DEEP * self.team.down) else "i64"
        start, deep = self.index(sym("row'"), kind), 1 if rest else DEEP

        def nest(depth: int, carry: Carry) -> Carry:
            if depth == len(rest):
                return self._turn(folds, slot, carry)
            many = DEEP if depth == len(rest) - 1 else 1
            return self._several(*rest[depth], carry, lambda c: nest(depth + 1, c), many)

        def body(place: Expr, carry: Carry) -> Carry:
            with self.binding(**{name: place}):
                return nest(0, carry)

        before, self.mask = self.mask, None
        ends = (const(0), extent - 1)
        carry = [total for s in folds for total in self._start(s) * slot.width]
        totals = self.strided(f"{name}'", start, extent, self.team.down, carry, body, ends, deep)
        self.mask = before
        for place, s in enumerate(folds):
            own = totals[place * slot.width : (place + 1) * slot.width]
            for scope, total in zip(self.elements(), self._meet(s, own), strict=True):
                scope.locals[s.name] = total

    def _meet(self, s: Fold, totals: Carry) -> Carry:
        """The reductions over the lanes that have the same columns, in their order: by shuffles
        in a warp, then in shared memory."""
        code, team = self.code, self.team
        step = WARP // 2
        while step >= team.across:
            totals = [combine(code, s.kind, t, shuffled(code, t, step), s.dtype) for t in totals]
            step //= 2
        raws = [self._raw(t) for t in totals]
        access = access_of(raws[0])
        unit, count = 8 if access.endswith("64") else 4, team.across * len(totals)
        row = count * unit
        start = self.shared_address(self.reserve(team.lanes // WARP * row))
        if self.in_loop():
            code.line("bar.sync 0;")  # the last reductions here may not have been read
        lane = self.symbols["lane"]
        column = start + self.symbols["column'"] * unit
        first = (lane & (WARP - 1)).compare("lt", team.across)
        at = column + lane.lshr(5) * row
        for number, raw in enumerate(raws):
            place = f"[{at.text}+{number * team.across * unit}]"
            code.write(f"st.shared.{access}", place, raw, guard=first)
        self.barrier()
        for turn in range(0, count, team.lanes):
            self._sum_of_warps(s, raws[0], start, (turn, count, unit))
        self.barrier()
        found: Carry = []
        for number, total in enumerate(totals):
            read = code.fresh(raws[0].type)
            place = f"[{column.text}+{number * team.across * unit}]"
            code.write(f"ld.shared.{access}", read, place)
            found.append(read.compare("ne", 0) if total.type == "i1" else read)
        return found

    def _sum_of_warps(self, s: Fold, raw: Value, start: Value, of: tuple[int, int, int]) -> None:
        """What a lane's element of rows in shared memory comes to over the warps' rows, into the
        first one. `of`: the first lane's element, how many there are, and their bytes."""
        code, (turn, count, unit) = self.code, of
        access, logical = access_of(raw), s.dtype.name == "bool"
        lane = self.symbols["lane"] + turn
        own = None if count - turn >= self.team.lanes else lane.compare("lt", count)
        at, whole = start + lane * unit, None
        for warp in range(self.team.lanes // WARP):
            read = code.fresh(raw.type)
            if own is not None:
                code.set(read, code.const(0, raw.type))
            code.write(
                f"ld.shared.{access}", read, f"[{at.text}+{warp * count * unit}]", guard=own
            )
            value = read.compare("ne", 0) if logical else read
            whole = value if whole is None else combine(code, s.kind, whole, value, s.dtype)
        assert whole is not None
        code.write(f"st.shared.{access}", f"[{at.text}]", self._raw(whole), guard=own)

    # A team

    def _fold_by_team(self, folds: Sequence[Fold]) -> list[Carry]:
        """What folds over the same loops come to."""
        s = folds[0]
        loops = [(name, const(0), extent) for name, extent in s.loops]
        outer, inner = self._divide(loops)
        many, most = (any(self._reads_many(s, n * MOST_LOADS) for s in folds) for n in (1, 2))
        heavy = arithmetic(s.value for s in folds) > MOST_WORK and not self._in_cells(folds)
        width = 1 if most else self.width_of(inner)
        starts = [self._start(s) for s in folds]
        ends = list(itertools.accumulate(map(len, starts)))

        def visit(carry: Carry) -> Carry:
            found: Carry = []
            for _ in self.elements():
                own = carry[len(found) : len(found) + ends[-1]]
                for s, start, end in zip(folds, starts, ends, strict=True):
                    found += self._step(s, own[end - len(start) : end])
            return found

        def nest(depth: int, carry: Carry) -> Carry:
            if depth == len(outer):
                self.straight = True
                unroll, at_once = (False, 1) if many or heavy else (True, UNROLL)
                carry = self.spread(inner, width, carry, visit, unroll, at_once)
                self.straight = False
                return carry
            name, lo, hi = outer[depth]
            return self.loop(name, lo, hi, carry, lambda c: nest(depth + 1, c))

        totals = nest(0, [value for start in starts for value in start] * width)
        found: list[Carry] = []
        for s, start, end in zip(folds, starts, ends, strict=True):
            total = totals[end - len(start) : end]
            for number in range(1, width):
                first = number * ends[-1] + end - len(start)
                other = totals[first : first + len(start)]
                if len(total) > 1:
                    total = better(s.kind, total, other, s.value.dtype)
                else:
                    total = [combine(self.code, s.kind, total[0], other[0], s.dtype)]
            found.append(self._across(s, total))
        return found

    def _reads_many(self, s: Fold, most: int) -> bool:
        """Whether an element takes more loads than that, as one does that is chosen among the parts
        of a concatenation: registers then hold those of one vector, or of one element, alone."""
        loads = [part for part in post_order(s.value) if isinstance(part, Load)]
        return len(loads) > most and not self._in_cells([s])

    def _in_cells(self, folds: Sequence[Fold]) -> bool:
        """Whether folds read scratch in registers, which only unrolled loops can."""
        parts = (part for s in folds for part in post_order(s.value))
        buffers = {part.buffer for part in parts if isinstance(part, Load)}
        return any(self.memory[buffer].space == "registers" for buffer in buffers)

    def _divide(
        self, loops: list[tuple[str, Expr, Expr]]
    ) -> tuple[list[tuple[str, Expr, Expr]], list[tuple[str, Expr, Expr]]]:
        """Loops in step, and loops that the team shares: as many inner ones as fill it."""
        number, most = len(loops), 1
        while number and most < self.team.lanes:
            number -= 1
            high = self.most(loops[number][2])
            most *= self.team.lanes if high is None else high
        return loops[:number], loops[number:]

    def _across(self, s: Fold, total: Carry) -> Carry:
        """The reduction over the lanes of the team; all get the result."""
        total = self._butterfly(s, total, min(self.team.lanes, WARP))
        if not self.team.is_block:
            return total
        warps = self.team.lanes // WARP
        code = self.code
        lane = self.symbols["lane"]
        places = [self.reserve(warps * 8) for _ in total]
        if self.in_loop():
            code.line("bar.sync 0;")  # the last reduction here may not have been read
        leader = (lane & (WARP - 1)).compare("eq", 0)
        warp = lane.lshr(5)
        raws = [self._raw(v) for v in total]
        for place, raw in zip(places, raws, strict=True):
            at = self.shared_address(place) + warp * 8
            code.write(f"st.shared.{access_of(raw)}", f"[{at.text}]", raw, guard=leader)
        self.barrier()
        found: Carry = []
        for place, raw, value in zip(places, raws, total, strict=True):
            at = self.shared_address(place) + (lane & (warps - 1)) * 8
            read = code.fresh(raw.type)
            code.write(f"ld.shared.{access_of(raw)}", read, f"[{at.text}]")
            found.append(read.compare("ne", 0) if value.type == "i1" else read)
        return self._butterfly(s, found, warps)

    def _raw(self, value: Value) -> Value:
        raw = value.to("zext", "i32") if value.type == "i1" else value
        return self._held(raw)

    def _butterfly(self, s: Fold, total: Carry, lanes: int) -> Carry:
        step = lanes // 2
        while step:
            other = [shuffled(self.code, v, step) for v in total]
            if s.kind.startswith("arg"):
                total = better(s.kind, total, other, s.value.dtype)
            else:
                total = [combine(self.code, s.kind, total[0], other[0], s.dtype)]
            step //= 2
        return total

    # What the kernel's frame provides

    def reserve(self, size: int) -> Expr:
        """Bytes of shared memory of the block, as their offset."""
        raise NotImplementedError

    def shared_address(self, offset: Expr) -> Value:
        raise NotImplementedError

    def tensor_map(self, map: TensorMap) -> Value:
        """The address of a tensor map of the kernel."""
        raise NotImplementedError

    def in_loop(self) -> bool:
        """Whether what is written now may run again."""
        return self.code.depth > 0


def _places(s: Fold) -> Iterator[dict[str, Expr]]:
    """The places of a fold whose extents are known, in order."""
    extents = [range(extent.as_int() or 0) for _, extent in s.loops]
    for place in itertools.product(*extents):
        yield {name: const(p) for (name, _), p in zip(s.loops, place, strict=True)}


def combine(code: Code, kind: str, total: Value, value: Value, dtype: DType) -> Value:
    """One step of a fold; sums and products may be reassociated."""
    if total.text == code.const(identity(kind, dtype), total.type).text:
        return value
    code.contract = True
    if kind == "sum":
        return total + value
    if kind == "prod":
        return total * value
    if kind == "any":
        return total | value
    if kind == "all":
        return total & value
    return scalars.extreme(code, total, value, dtype, kind)


def _ahead(kind: str, a: Value, b: Value, dtype: DType) -> Value:
    """Whether a value is more extreme than another: NaN is more so than numbers are. It is not
    where both are alike, so that of values in their order the first one stays."""
    if dtype.is_float:
        no_further = b.compare("le" if kind == "argmax" else "ge", a)
        return (no_further | a.is_nan()) ^ 1
    return b.compare("gt" if kind == "argmax" else "lt", a, dtype.kind == "uint" or dtype.is_bool)


def better(kind: str, total: Carry, other: Carry, dtype: DType) -> Carry:
    """The more extreme of two (value, position): NaN first, then the earlier position."""
    a, b = total[0], other[0]
    same = b.compare("eq", a)
    if dtype.is_float:
        same = same | (a.is_nan() & b.is_nan())
    ahead = _ahead(kind, a, b, dtype) | (same & other[1].compare("lt", total[1]))
    return [ahead.select(b, a), ahead.select(other[1], total[1])]
