"""Barriers between statements of a team: where one lane needs what another wrote."""

from __future__ import annotations

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import (
    Attend,
    Fold,
    For,
    ForEqual,
    If,
    Kernel,
    Let,
    Load,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.facts import Facts

from .ahead import AheadWriter
from .teams import Team, is_shared


class BarrierWriter(AheadWriter):
    """The body of a kernel, as far as the order of its lanes goes."""

    def __init__(self, kernel: Kernel, facts: Facts, team: Team) -> None:
        super().__init__(kernel, facts)
        self.team = team
        self.unread: set[str] = set()  # memory written since the last barrier
        self.unwritten: set[str] = set()  # memory read since

    def barrier(self) -> None:
        """Lanes of the team wait for each other and see what the others wrote."""
        if self.team.is_block:
            self.code.line("bar.sync 0;")
        elif self.team.lanes > 1:
            self.code.line("bar.warp.sync 0xffffffff;")
        self.unread, self.unwritten = set(), set()

    def order(self, s: Statement) -> None:
        """A barrier before a statement that other lanes' work must precede."""
        reads, writes = self._touched(s)
        if (reads | writes) & self.unread or writes & self.unwritten:
            self.barrier()
        if not isinstance(s, For) or is_shared(s):
            self.unread |= writes
            self.unwritten |= reads

    def _as_well(self, before: tuple[set[str], set[str]]) -> None:
        """What was written and read before something that may not have run, and a barrier in it."""
        self.unread, self.unwritten = self.unread | before[0], self.unwritten | before[1]

    def _touched(self, s: Statement) -> tuple[set[str], set[str]]:
        reads: set[str] = set()
        writes: set[str] = set()
        for x in walk([s]):
            if isinstance(x, TileProduct):
                reads |= {x.a, x.panel}
                writes.add(x.dst)
            elif isinstance(x, Attend):
                writes |= {x.dst, x.totals, *filter(None, [x.most])}
            elif isinstance(x, SortRow):
                writes |= {x.keys, x.order}
            elif isinstance(x, SortDigit):
                writes |= {x.keys, *filter(None, (x.order, x.digits, x.before))}
            elif isinstance(x, Store):
                writes.add(x.buffer)
            for value in _values(x):
                reads |= {p.buffer for p in post_order(value) if isinstance(p, Load)}
        tracked = {
            name for name in reads | writes
            if name in self.written and self.memory[name].space != "registers"
        }  # fmt: skip
        return reads & tracked, writes & tracked


def _values(s: Statement) -> tuple[KernelValue, ...]:
    if isinstance(s, Let | Fold):
        return (s.value,)
    if isinstance(s, ForEqual):
        return (s.first,)
    if isinstance(s, Store):
        return (*s.indices, s.value)
    return (s.condition,) if isinstance(s, If) else ()
