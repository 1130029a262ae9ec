"""Loops, branches and stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial

from stagefuse.compiler.kernel_ir import (
    Checked,
    For,
    If,
    Let,
    Load,
    Statement,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue

from . import scalars, units
from .bodies import at_most, is_adjacent, is_loop, values_of, walk
from .checks import CheckWriter
from .ir import Value
from .values import post_order

SHORT_LOOP = 64
LANES = 16
"""Of a vector of f32, where there are masks."""
HALF = 8
"""Of one where there are none."""
MANY_LOOPS = 16
"""A concatenation has a loop for each part."""
Body = Callable[[Value, list[Value]], list[Value]]
Joined = tuple[Value, Callable[[Value, Value], Value]]
"""Of an accumulator: what it may begin with anywhere, and how the results of two parts are one."""
Case = AbstractContextManager[None]


class LoopWriter(CheckWriter):
    """The function of a kernel, as far as its control flow goes."""

    @abstractmethod
    def statement(self, s: Statement) -> None:
        """Writes one statement."""

    def statements(self, body: Sequence[Statement]) -> None:
        done = 0
        while done < len(body):
            done += self.first_of(body[done:])
            self.forget()

    def first_of(self, body: Sequence[Statement]) -> int:
        """Writes the first of some statements, and those that become one with it; how many."""
        self.statement(body[0])
        return 1

    def _store(self, s: Store) -> None:
        memory = self.memory[s.buffer]
        value = scalars.to_memory(self.code, self.value(s.value), memory.dtype)
        if s.buffer in self.tiles:
            tile, place = self.tiles[s.buffer]
            kind = scalars.MEMORY[memory.dtype.name]
            at = self.code.pure(f"getelementptr {kind}, ptr {tile.text}, i64 {place.text}", "ptr")
        else:
            at = self._address(memory, s.indices)
        self.code.line(
            f"store {value.type} {value.text}, ptr {at.text}, align {memory.dtype.itemsize}"
            f"{memory.alias}{self._access()}"
        )

    def _if(self, s: If) -> None:
        code = self.code
        inside, after = code.label("then"), code.label("endif")
        code.branch_if(self.value(s.condition), inside, after)
        code.start(inside)
        with self._scope():
            self.statements(s.body)
        code.branch(after)
        code.start(after)

    @cached_property
    def _many_loops(self) -> bool:
        """Whether a kernel has so many loops that each is widened once, as short ones are: wider
        ones take LLVM three times as long."""
        return sum(isinstance(s, For) for s in walk(self.kernel.body)) > MANY_LOOPS

    def _looked_through(self, s: For) -> None:
        """A loop; if it checks positions from data, they are looked through first."""
        known = [] if self._many_loops else self._scanned(s)
        if not known:
            self._for(s)
            return

        def loop() -> list[Value]:
            self._for(s)
            return []

        lo, hi, holds = self.index(s.lo), self.index(s.hi), self.code.const(1, "i1")
        checks = [v for v in known if isinstance(v, Checked)]
        for condition in known[len(checks) :]:
            holds = holds & self.value(condition)
        scan = partial(self._out_of_range, s.index, checks)
        start = [(holds ^ 1).to("zext", "i64")]
        end = holds.select(hi, lo)
        bad = self._loop(lo, end, start, scan, known, {s.index}, True, True)
        self._either(bad[0].compare("eq", 0), partial(self._holding, known), loop)

    def _for(self, s: For) -> None:
        lo, hi = self.index(s.lo), self.index(s.hi)
        if rest := self._repeats(s):
            lanes, after = rest
            self._plain(s, lo, hi - after)
            lo = hi - lanes
        self._plain(s, lo, hi)

    def _repeats(self, s: For) -> tuple[int, int] | None:
        """Of a short loop on a target without masks, whose last vector may begin so early that it
        is whole, the vector's elements and how many of them are new: the others are computed and
        stored twice, the same both times."""
        size = (s.hi - s.lo).as_int()
        if self.module.level == "v4" or not s.vector or size is None or size > SHORT_LOOP:
            return None
        lanes = HALF if size > HALF else HALF // 2
        if size <= lanes or size % lanes == 0 or self._many_loops:
            return None
        stored = {x.buffer for x in s.body if isinstance(x, Store)}
        read = {v.buffer for value in values_of(s.body) for v in post_order(value)
                if isinstance(v, Load)}  # fmt: skip
        if (shared := self.row_in_result) is not None and shared.row in read:
            read.add(shared.store.buffer)  # the row lies there
        plain = all(isinstance(x, Let | Store) for x in s.body) and not stored & read
        return (lanes, size % lanes) if plain and is_adjacent(values_of(s.body), s.index) else None

    def _plain(self, s: For, lo: Value, hi: Value) -> None:
        """A loop of kernel IR between two bounds."""
        innermost = not any(is_loop(x) for x in walk(s.body))

        def body(i: Value, _: list[Value]) -> list[Value]:
            self.scopes[-1].indices[s.index] = i
            self.statements(s.body)
            return []

        ahead = list(values_of(s.body))
        short = (
            self._many_loops or at_most(s.hi - s.lo, SHORT_LOOP) or at_most(s.hi, SHORT_LOOP)
        )
        masked = is_adjacent(ahead, s.index)
        self._loop(lo, hi, [], body, ahead, {s.index}, s.vector, innermost, short, masked)

    def _loop(
        self,
        lo: Value,
        hi: Value,
        start: list[Value],
        body: Body,
        ahead: Sequence[KernelValue],
        bound: set[str],
        parallel: bool,
        innermost: bool,
        short: bool = False,
        masked: bool = False,
        joined: Joined | None = None,
    ) -> list[Value]:
        """A counted loop with accumulators; checks among `ahead` that it does not change go
        before it. A `short` loop is widened once, not interleaved. Where a loop may be `masked`,
        what is left over of whole vectors is done under a mask and not one by one: in a short loop
        after it, if it is not short itself. An accumulator that can be `joined` begins anew there,
        so that the lanes of both loops are added up side by side and not in turn."""
        code = self.code
        if innermost:
            again = partial(
                self._loop, lo, hi, start, body, ahead, bound, parallel, True, short, masked, joined
            )
            if fit := self._words_fit(ahead, bound):
                return self._either(fit, self._fitting, again)
            if not self._many_loops and self._divides_by_one(ahead, bound):
                quick = units.has(code, units.loaded(code), "quotients")
                return self._either(quick, self._dividing, again)
        if masked and not short and innermost and self._leaves_rest(lo, hi):
            span = hi - lo  # less than 0 where a part of a row begins after the row's end
            span = span.compare("gt", 0).select(span, code.const(0, "i64"))
            middle = lo + (span & -(LANES if self._vectors(lo, hi) else SHORT_LOOP))
            whole = self._loop(lo, middle, start, body, ahead, bound, parallel, True)
            begin = [joined[0]] if joined else whole
            rest = self._loop(middle, hi, begin, body, ahead, bound, parallel, True, True, True)
            return [joined[1](whole[0], rest[0])] if joined else rest
        masked = masked and short and self.module.level == "v4"
        with_group = parallel and innermost

        def metadata(group: str) -> str:
            return self._loop_metadata(group, innermost, short, masked, self._vectors(lo, hi))

        return self._counted((lo, hi), start, body, ahead, bound, masked, with_group, metadata)

    def _either(
        self, known: Value, case: Callable[[bool], Case], loop: Callable[[], list[Value]]
    ) -> list[Value]:
        """A loop written twice: for where something is known that makes it simpler, and not."""
        code, after = self.code, self.code.label("after")
        cases = [(code.label("known"), True), (code.label("unknown"), False)]
        code.branch_if(known, cases[0][0], cases[1][0])
        ends: list[tuple[str, list[Value]]] = []
        for label, holds in cases:
            code.start(label)
            with self._scope(), case(holds):
                results = loop()
            ends.append((code.block, results))
            code.branch(after)
        code.start(after)
        (one, first), (other, second) = ends
        return [
            code.emit(f"phi {a.type} [ {a.text}, %{one} ], [ {b.text}, %{other} ]", a.type)
            for a, b in zip(first, second, strict=True)
        ]

    def _counted(
        self,
        ends: tuple[Value, Value],
        start: list[Value],
        body: Body,
        ahead: Sequence[KernelValue],
        bound: set[str],
        masked: bool,
        with_group: bool,
        metadata: Callable[[str], str],
    ) -> list[Value]:
        """The blocks of a loop, its accumulators as phis; `with_group`, its accesses are of a
        group, since they do not depend on each other."""
        code, (lo, hi) = self.code, ends
        kind, first, end = "i64", lo, hi
        if masked:  # a mask of 16 lanes is made of one vector of numbers, and not of two
            kind, first, end = "i32", code.const(0, "i32"), (hi - lo).to("trunc", "i32")
        enter, loop, after = code.label("enter"), code.label("loop"), code.label("after")
        before = code.block
        code.branch_if(lo.compare("lt", hi), enter, after)
        code.start(enter)
        with self._scope():
            self._hoist(ahead, bound)
            group = self.module.distinct("distinct !{}") if with_group else ""
            if group:
                self.groups.append(group)
            entered = code.block
            code.branch(loop)
            code.start(loop)
            heads = len(code.lines)
            n = code.value(code.fresh("i"), kind)
            totals = [code.value(code.fresh("s"), v.type) for v in start]
            with self._scope():
                results = body(n if kind == "i64" else lo + n.to("zext", "i64"), totals)
            latch = code.block
            following = code.emit(f"add nuw nsw {kind} {n.text}, 1", kind)
            again = code.emit(f"icmp slt {kind} {following.text}, {end.text}", "i1")
            code.branch_if(again, loop, after, metadata(group))
            phis = [
                f"  {n.text} = phi {kind} [ {first.text}, %{entered} ],"
                f" [ {following.text}, %{latch} ]"
            ]
            for begun, total, result in zip(start, totals, results, strict=True):
                phis.append(
                    f"  {total.text} = phi {total.type} [ {begun.text}, %{entered} ],"
                    f" [ {result.text}, %{latch} ]"
                )
            code.lines[heads:heads] = phis
            if group:
                self.groups.pop()
        code.start(after)
        return [
            code.emit(
                f"phi {first.type} [ {first.text}, %{before} ], [ {result.text}, %{latch} ]",
                first.type,
            )
            for first, result in zip(start, results, strict=True)
        ]

    def _vectors(self, lo: Value, hi: Value) -> int | None:
        """How many vectors there are in a loop of known size that is better not divided into four
        at a time and a rest: of 5 to 15 vectors alone, or of 6 or 10 and one of fewer lanes."""
        size = _known_size(lo, hi)
        if self.module.level != "v4" or size is None:
            return None
        vectors, rest = divmod(size, LANES)
        fits = 4 < vectors < 16 if rest == 0 else vectors in (6, 10) and rest & (rest - 1) == 0
        return vectors if fits else None

    def _leaves_rest(self, lo: Value, hi: Value) -> bool:
        """Whether a loop may do other than whole vectors, on a target that has masks."""
        size = _known_size(lo, hi)
        return self.module.level == "v4" and (size is None or size % LANES != 0)

    def _loop_metadata(
        self, group: str, innermost: bool, short: bool, masked: bool, vectors: int | None = None
    ) -> str:
        if not innermost:
            return ""
        properties = []
        if group:
            properties.append(self.module.node(f'!{{!"llvm.loop.parallel_accesses", {group}}}'))
        if short:
            properties.append(self.module.node('!{!"llvm.loop.interleave.count", i32 1}'))
            properties.append(self.module.node('!{!"llvm.loop.unroll.disable"}'))
            if masked:
                name = "llvm.loop.vectorize.predicate.enable"
                properties.append(self.module.node(f'!{{!"{name}", i1 true}}'))
        elif vectors:  # as many at a time as leave no rest
            count = next((n for n in (4, 2) if vectors % n == 0), 1)
            properties.append(self.module.node(f'!{{!"llvm.loop.interleave.count", i32 {count}}}'))
        else:  # a third of the compile time, for loops that the vectoriser interleaves
            properties.append(self.module.node('!{!"llvm.loop.unroll.runtime.disable"}'))
        return f", !llvm.loop {self.module.loop(properties)}"


def _known_size(lo: Value, hi: Value) -> int | None:
    """The turns of a loop between two constants."""
    if not (lo.text.isdigit() and hi.text.isdigit()):
        return None
    return int(hi.text) - int(lo.text)
