"""Scatters on a GPU: a warp has a range of the axis and some columns, and goes over all updates.

It reads 32 positions at a time, and takes those of its range one after the other, so that every
element is combined with its updates in the order that they are given in, as on the CPU: without an
atomic, and with the same result in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.gpu import scalars
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.gpu.memory import Memory, Scope
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.compiler.graph import Scatter
from stagefuse.compiler.kernel_ir import (
    Checked,
    For,
    ForEqual,
    If,
    Index,
    Let,
    Load,
    Local,
    Op,
    Statement,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import all_of, product_of
from stagefuse.compiler.lower.sequences import is_some, position_of, update_at
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64

from .scan import ScanWriter, moved

WARPS = 2048
"""Warps that are wanted: twice as many would read the positions twice as often."""
COLUMNS = 128
AT_ONCE = 4
"""Positions that a lane has on the way at a time."""
HIT = "hit'"
PROBE = "probe'"


def lower_ranges(low: Lowering) -> Parallel:
    """As many ranges as make enough warps with the other axes."""
    node = low.graph.nodes[low.group.roots[0].node]
    assert isinstance(node.primitive, Scatter)
    domain, axis, rank = low.group.domain, node.primitive.axis, len(low.group.domain)
    size, last = domain[axis], rank - 1
    parallel = low.axes([a for a in range(rank - 1) if a != axis])
    if last != axis:
        blocks = floordiv(domain[last] + (COLUMNS - 1), COLUMNS)
        parallel.append(("block", blocks))
    others = maximum(product_of([e for _, e in parallel]), 1)
    ranges = maximum(minimum(floordiv(others + (WARPS - 1), others), size), 1)
    length = floordiv(size + ranges - 1, ranges)
    parallel.insert(0, ("range", ranges))
    low.bind(parallel)
    lo = sym("range") * length
    hi = minimum(lo + length, size)
    here: tuple[KernelValue, ...] = tuple(Index(sym(f"d{a}")) for a in range(rank))
    base, _, updates = node.operands

    def columns(body: Store) -> For:
        first = sym("block") * COLUMNS
        return For(f"d{last}", first, minimum(first + COLUMNS, domain[last]), (body,), True)

    def copy() -> None:
        low.facts = low.facts.with_ranges({f"d{last}": (0, domain[last] - 1)})
        value = low.value(base, here, ())
        store = Store(low.buffer(low.group.roots[0], "out").name, here, value)
        low.emit(store if last == axis else columns(store))

    def step() -> None:
        name = low.name("at")
        at = Local(name, I64)
        low.emit(Let(name, position_of(low, sym("u"))))
        store = update_at(low, here, at)
        own = [Op("ge", (at, Index(lo)), BOOL), Op("lt", (at, Index(hi)), BOOL)]
        condition = all_of([is_some(size), *own])
        low.emit(If(condition, (store if last == axis else columns(store),)))

    low.loop(f"d{axis}", lo, hi, copy, vector=last == axis)
    count = low.graph.type(updates).shape[axis]
    low.loop("u", const(0), count, step)
    return parallel, const(COLUMNS) * maximum(size + count, 1)


def is_sparse(s: object) -> bool:
    """A loop that does something at some of its positions: where data of the position say so."""
    if not isinstance(s, For) or s.vector or len(s.body) != 2:
        return False
    return isinstance(s.body[0], Let) and isinstance(s.body[1], If)


class ScatterWriter(ScanWriter):
    """The body of a kernel, as far as its scatters go."""

    def plain(self, s: For) -> None:
        if not self.in_team or self.team.lanes != WARP or not is_sparse(s):
            return super().plain(s)
        let, branch = s.body
        assert isinstance(let, Let) and isinstance(branch, If)

        checked = let.value
        loads = checked.value if isinstance(checked, Checked) else checked

        def chunk(carry: Carry) -> Carry:
            firsts = [s.lo + (sym("chunk'") * AT_ONCE + n) * WARP for n in range(AT_ONCE)]
            masks = [self.holds("lt", first + sym("lane"), s.hi) for first in firsts]
            scopes = [Scope() for _ in firsts]
            self.in_team = False
            for value in (loads, checked, branch.condition):  # all loads come first
                for first, mask, scope in zip(firsts, masks, scopes, strict=True):
                    at = {s.index: self.resolve(first + sym("lane"))}
                    with self.when(mask), self.scope(scope), self.binding(**at):
                        found = self.value(value)
                        if value is checked:
                            scope.locals[let.name] = found
                        elif value is branch.condition:
                            scope.locals[HIT] = found & mask
            self.in_team = True
            for first, scope in zip(firsts, scopes, strict=True):
                self._hits(s.index, first, let.name, scope, branch)
            return carry

        step = WARP * AT_ONCE
        self.loop("chunk'", const(0), floordiv(s.hi - s.lo + (step - 1), step), [], chunk)

    def combine(self, s: Store, memory: Memory) -> None:
        assert not self.in_team and self.slot is None and memory.space == "global"
        value, place = self.value(s.value), self.place(memory, s.indices)
        at, bits = self.address(memory, place), memory.dtype.bits
        kind = f"s{bits}" if s.by == "max" and memory.dtype.kind == "int" else f"u{bits}"
        self.code.write(f"red.global.{s.by}.{kind}", at, self._held(value), guard=self.active)

    def for_equal(self, s: ForEqual) -> None:
        """What is computed for several places, then the rest for one after the other."""
        code, shared = self.code, self.in_team
        lets, rest = self._start_of_run(s.body)
        each = s.ahead // WARP if shared else s.ahead
        start = self.value(s.first)
        if self.is_small(self.resolve(s.count + s.ahead)):
            start = start.to("trunc", "i32")
        wanted = self._key_of_run(s, start)
        at = code.variable(start.type, start)
        left = code.fresh("i32")
        last = {let.name: code.fresh(_register(let)) for let in lets} if shared else {}
        head, tail, done = (code.label(name) for name in ("run", "last", "ran"))
        with code.loop_scope(), self.scope():
            code.start(head)
            first = Value(code, at.text, at.type, code.depth)
            self.in_team = False
            if shared:
                first = first + self.symbols["lane"].to("sext", first.type)
            places = [first + n * (WARP if shared else 1) for n in range(each)]
            scopes = [self._run_at(s, lets, place, wanted) for place in places]
            self.in_team = shared
            for scope in scopes:
                if not shared:
                    with self.when(scope.locals[HIT]), self.scope(scope):
                        self.statements(rest)
                    continue
                hits = code.fresh("i32")
                code.write("vote.sync.ballot.b32", hits, scope.locals[HIT], "0xffffffff")
                code.write("popc.b32", left, hits)
                for name, value in last.items():
                    code.set(value, scope.locals[name])
                code.branch_if(hits.compare("eq", -1), tail, holds=False)
                for lane in range(WARP):
                    self._lane_of_run(scope.locals, last, lane, rest)
            if not shared:
                code.branch_if(scopes[-1].locals[HIT], done, holds=False)
            bits = "64" if at.type == "i64" else "32"
            code.write(f"add.s{bits}", at, at, code.const(s.ahead, at.type))
            code.branch(head)
        code.start(tail)
        if shared:
            self._end_of_run(last, left, rest)
        code.start(done)

    def _end_of_run(self, last: dict[str, Value], left: Value, rest: Sequence[Statement]) -> None:
        """The rest for the places that fewer than all lanes have."""

        def body(carry: Carry) -> Carry:
            self._lane_of_run(last, last, self.index(sym(HIT), "i32"), rest)
            return carry

        one, ends = self.code.const(1, "i32"), (const(0), const(WARP - 1))
        self._counted(HIT, self.code.const(0, "i32"), left, one, ends, [], body, const(1))

    def _lane_of_run(
        self,
        held: Mapping[str, Value],
        names: Iterable[str],
        lane: int | Value,
        rest: Sequence[Statement],
    ) -> None:
        """The rest, of what a lane has computed ahead."""
        scope = Scope()
        for name in names:
            scope.locals[name] = moved(self.code, held[name], "idx", lane, WARP - 1)
        with self.scope(scope):
            self.statements(rest)

    def _start_of_run(self, body: Sequence[Statement]) -> tuple[list[Let], Sequence[Statement]]:
        """What of a body can be computed ahead, since it reads nothing that is written."""
        lets = []
        for s in body:
            reads = post_order(s.value) if isinstance(s, Let) else ()
            written = any(isinstance(p, Load) and p.buffer in self.written for p in reads)
            if not isinstance(s, Let) or written:
                break
            lets.append(s)
        return lets, body[len(lets) :]

    def _key_of_run(self, s: ForEqual, place: Value) -> Value:
        """What the buffer holds at a place."""
        with self.named(**{PROBE: (place, const(0), s.count - 1)}):
            at = self.address(self.memory[s.buffer], (sym(PROBE), None))
            (found,) = self._access(self.memory[s.buffer], at, 1)
        return found

    def _run_at(self, s: ForEqual, lets: Sequence[Let], place: Value, wanted: Value) -> Scope:
        """What is computed ahead for a place, and whether it holds what is wanted."""
        inside, scope = place.compare("lt", self.index(s.count, place.type)), Scope()
        with self.when(inside):
            hit = self._key_of_run(s, place).compare("eq", wanted) & inside
        bound = {s.index: (place, const(0), s.count - 1)}
        with self.when(hit), self.scope(scope), self.named(**bound):
            for let in lets:
                scope.locals[let.name] = self.value(let.value)
        scope.locals[HIT] = hit
        return scope

    def _hits(self, index: str, first: Expr, name: str, known: Scope, branch: If) -> None:
        """What the loop does at each of 32 positions where its condition holds, in their order."""
        code, found = self.code, known.locals[name]
        left = code.fresh("i32")
        code.write("vote.sync.ballot.b32", left, known.locals[HIT], "0xffffffff")
        head, done = code.label("hit"), code.label("hits")
        with code.loop_scope(), self.scope():
            code.start(head)
            some = code.fresh("i1")
            code.write("setp.ne.s32", some, left, code.const(0, "i32"))
            code.branch_if(some, done, holds=False)
            rest, lowest, at = (code.fresh("i32") for _ in range(3))
            code.write("add.s32", rest, left, code.const(-1, "i32"))
            code.write("not.b32", lowest, rest)
            code.write("and.b32", lowest, lowest, left)
            code.write("bfind.u32", at, lowest)
            code.write("and.b32", left, left, rest)
            bound = {index: first + sym(HIT)}
            with self.named(**{HIT: (at, const(0), const(WARP - 1))}), self.binding(**bound):
                self.scopes[-1].locals[name] = moved(code, found, "idx", at, WARP - 1)
                self.statements(branch.body)
            self.barrier()
            code.branch(head)
        code.start(done)


def _register(let: Let) -> str:
    return scalars.REGISTER[let.value.dtype.compute.name]
