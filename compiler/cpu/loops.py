"""Loops, branches and stores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from stagefuse.compiler.kernel_ir import (
    Checked,
    For,
    If,
    Load,
    Statement,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue

from . import scalars
from .bodies import at_most, is_adjacent, is_loop, values_of, walk
from .ir import Value
from .reading import ValueWriter
from .values import parts

SHORT_LOOP = 64
Body = Callable[[Value, list[Value]], list[Value]]


class LoopWriter(ValueWriter):
    """The function of a kernel, as far as its control flow goes."""

    @abstractmethod
    def statement(self, s: Statement) -> None:
        """Writes one statement."""

    def statements(self, body: Sequence[Statement]) -> None:
        for s in body:
            self.statement(s)
            self._forget()

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

    def _for(self, s: For) -> None:
        self._plain(s, self.index(s.lo), self.index(s.hi))

    def _plain(self, s: For, lo: Value, hi: Value) -> None:
        """A loop of kernel IR between two bounds."""
        innermost = not any(is_loop(x) for x in walk(s.body))

        def body(i: Value, _: list[Value]) -> list[Value]:
            self.scopes[-1].indices[s.index] = i
            self.statements(s.body)
            return []

        ahead = list(values_of(s.body))
        short = at_most(s.hi - s.lo, SHORT_LOOP) or at_most(s.hi, SHORT_LOOP)
        masked = short and is_adjacent(s.body, s.index)
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
    ) -> list[Value]:
        """A counted loop with accumulators; checks among `ahead` that it does not change go
        before it. A `short` loop is widened once, not interleaved; where it is `masked`, what is
        left over is done under a mask and not one by one."""
        code = self.code
        enter, loop, after = code.label("enter"), code.label("loop"), code.label("after")
        before = code.block
        code.branch_if(lo.compare("lt", hi), enter, after)
        code.start(enter)
        with self._scope():
            self._hoist(ahead, bound)
            group = self.module.distinct("distinct !{}") if parallel and innermost else ""
            if group:
                self.groups.append(group)
            entered = code.block
            code.branch(loop)
            code.start(loop)
            heads = len(code.lines)
            i = code.value(code.fresh("i"), "i64")
            totals = [code.value(code.fresh("s"), v.type) for v in start]
            with self._scope():
                results = body(i, totals)
            latch = code.block
            following = code.emit(f"add nsw i64 {i.text}, 1", "i64")
            again = code.emit(f"icmp slt i64 {following.text}, {hi.text}", "i1")
            code.branch_if(again, loop, after, self._loop_metadata(group, innermost, short, masked))
            phis = [
                f"  {i.text} = phi i64 [ {lo.text}, %{entered} ], [ {following.text}, %{latch} ]"
            ]
            for first, total, result in zip(start, totals, results, strict=True):
                phis.append(
                    f"  {total.text} = phi {total.type} [ {first.text}, %{entered} ],"
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

    def _loop_metadata(self, group: str, innermost: bool, short: bool, masked: bool) -> str:
        if not innermost:
            return ""
        properties = []
        if group:
            properties.append(self.module.node(f'!{{!"llvm.loop.parallel_accesses", {group}}}'))
        if short:
            properties.append(self.module.node('!{!"llvm.loop.interleave.count", i32 1}'))
            properties.append(self.module.node('!{!"llvm.loop.unroll.disable"}'))
            if masked and self.module.level == "v4":
                name = "llvm.loop.vectorize.predicate.enable"
                properties.append(self.module.node(f'!{{!"{name}", i1 true}}'))
        else:  # a third of the compile time, for loops that the vectoriser interleaves
            properties.append(self.module.node('!{!"llvm.loop.unroll.runtime.disable"}'))
        return f", !llvm.loop {self.module.loop(properties)}"

    def _hoist(self, ahead: Sequence[KernelValue], bound: set[str]) -> None:
        """Computes the checks that a loop would repeat, each under the guards around it."""
        done: set[int] = set()
        stack: list[tuple[KernelValue, tuple[KernelValue, ...]]] = [
            (self._unique(value), ()) for value in ahead
        ]
        checks: list[tuple[Checked, tuple[KernelValue, ...]]] = []
        while stack:
            value, guards = stack.pop()
            if id(value) in done:
                continue
            done.add(id(value))
            if isinstance(value, Checked) and not value.proved:
                checks.append((value, guards))
            inner = guards
            if isinstance(value, Load):
                inner = (*guards, *value.guard)
                stack.extend((part, guards) for part in value.guard)
            rest = value.indices if isinstance(value, Load) else parts(value)
            stack.extend((part, inner) for part in rest)
        for value, guards in reversed(checks):
            fixed = all(self._is_fixed(v, bound) for v in (value, *guards))
            if fixed and self._known(value) is None:
                self.scopes[-1].values[id(value)] = self._checked(value, guards)

    def _is_fixed(self, value: KernelValue, bound: set[str]) -> bool:
        names = self._free(value)
        if self._is_volatile(value) or names & bound:
            return False
        known: set[str] = set()
        for scope in self.scopes:
            known |= scope.indices.keys() | {f"%{n}" for n in scope.locals}
        return names <= known
