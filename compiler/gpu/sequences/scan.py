"""Scans along rows by a team: a vector for each lane at a time.

A lane adds up its own elements, the lanes of a warp their totals by shuffles, and the warps theirs
in shared memory; then each element is combined with what came before it.
"""

from __future__ import annotations

from stagefuse.compiler.gpu import scalars
from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.loops import Carry, Visit
from stagefuse.compiler.gpu.memory import VECTOR_BYTES, Slot
from stagefuse.compiler.gpu.shuffles import access_of, code_held
from stagefuse.compiler.gpu.teams import (
    BLOCK_LANES,
    UNKNOWN,
    WARP,
    WARP_ROW,
    WARP_TEAM,
    Team,
    most_of,
)
from stagefuse.compiler.kernel_ir import (
    Alloc,
    For,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Op,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.expressions import COMBINE
from stagefuse.compiler.scalar import identity
from stagefuse.dsl.dims import Expr, const, floordiv, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen


@frozen
class Scan:
    """A loop that stores, for each of its positions, a function of all values up to there."""

    loop: For
    fn: str
    value: KernelValue
    name: str
    out: Store
    first: KernelValue

    @property
    def kind(self) -> str:
        """The reduction that goes along with it."""
        return next(kind for kind, fn in COMBINE.items() if fn == self.fn)


def scan_of(kernel: Kernel) -> Scan | None:
    """The scan that a kernel is, if it goes along rows as they lie in memory."""
    if len(kernel.body) < 3:
        return None
    total, start, loop = kernel.body[-3:]
    if not (isinstance(total, Alloc) and isinstance(start, Store) and isinstance(loop, For)):
        return None
    if total.shape or start.buffer != total.name or len(loop.body) != 3:
        return None
    let, keep, out = loop.body
    if not (isinstance(let, Let) and isinstance(keep, Store) and isinstance(out, Store)):
        return None
    so_far = let.value
    if keep.buffer != total.name or not isinstance(so_far, Op) or len(so_far.args) != 2:
        return None
    before, value = so_far.args
    own = isinstance(before, Load) and before.buffer == total.name
    stored = isinstance(out.value, Local) and out.value.name == let.name
    last = out.indices[-1] if out.indices else None
    along = isinstance(last, Index) and last.expr.as_symbol() == loop.index
    if not (own and stored and along):
        return None
    return Scan(loop, so_far.fn, value, let.name, out, start.value)


def team_of(scan: Scan, facts: Facts) -> Team:
    """A warp for each row if rows are short, else a block."""
    most = most_of(scan.loop.lo, scan.loop.hi, facts)
    return WARP_TEAM if (most or UNKNOWN) <= WARP_ROW else Team(BLOCK_LANES, 1)


class ScanWriter(FoldWriter):
    """The body of a kernel, as far as its scans go."""

    def plain(self, s: For) -> None:
        scan = scan_of(self.kernel) if self.in_team else None
        if scan is None or scan.loop is not s:
            return super().plain(s)
        extent, lanes = self.resolve(s.hi - s.lo), self.team.lanes
        places = [self.reserve(lanes // WARP * 8) for _ in range(2)] if self.team.is_block else []
        width = max(VECTOR_BYTES // max(b.dtype.itemsize for b in self.kernel.buffers), 1)
        width = min(width, 4)

        def chunk(first: Expr, width: int, masked: bool) -> Visit:
            def visit(carry: Carry) -> Carry:
                place = first + sym("chunk'") * (lanes * width) + sym("lane") * width
                mask = self.holds("lt", place, extent) if masked else None
                with self.slot_of(Slot(s.index, self.resolve(s.lo + place), width), mask):
                    return [self._chunk(scan, carry[0], mask, places)]

            return visit

        def chunks(first: Expr, count: Expr, width: int, masked: bool, before: Value) -> Value:
            return self.loop("chunk'", const(0), count, [before], chunk(first, width, masked))[0]

        before = self.value(scan.first)
        if self.divides(width, extent):
            count = floordiv(extent + (lanes * width - 1), lanes * width)
            chunks(const(0), count, width, True, before)
            return
        whole = floordiv(extent, lanes * width)
        before = chunks(const(0), whole, width, False, before)
        self.barrier()  # the next loop begins with the place that this one may have ended with
        first = whole * (lanes * width)
        chunks(first, floordiv(extent - first + (lanes - 1), lanes), 1, True, before)

    def _chunk(
        self, scan: Scan, before: Value, mask: Value | None, places: list[Expr]
    ) -> Value:
        """Stores a vector for each lane; gives what is carried on from the last."""
        nothing = self.code.const(identity(scan.kind, scan.value.dtype.compute), before.type)
        own: list[Value] = []
        for _ in self.elements():
            value = self.value(scan.value)
            value = value if mask is None else mask.select(value, nothing)
            own.append(self._joined(scan, own[-1], value) if own else value)
        lane = self.symbols["lane"] & (WARP - 1)
        up_to_here = self._up_to(scan, own[-1], lane, WARP)
        first = lane.compare("eq", 0)
        lower = first.select(nothing, moved(self.code, up_to_here, "up", 1, 0))
        after = moved(self.code, up_to_here, "idx", WARP - 1, WARP - 1)
        if places:
            lower, after = self._of_warps(scan, lower, after, places)
        lower, after = (self._joined(scan, before, v) for v in (lower, after))
        for scope, value in zip(self.elements(), own, strict=True):
            scope.locals[scan.name] = self._joined(scan, lower, value)
        self.store(scan.out)
        return after

    def _of_warps(
        self, scan: Scan, lower: Value, after: Value, places: list[Expr]
    ) -> tuple[Value, Value]:
        """What comes before a lane in its block, and what all of the block is."""
        code, warps = self.code, self.team.lanes // WARP
        lane, warp = self.symbols["lane"] & (WARP - 1), self.symbols["lane"].lshr(5)
        raw = self._raw(after)
        # two places take turns: who writes one again has met all who read it at the other
        turn = (self.symbols["chunk'"].to("trunc", "i32") & 1).compare("ne", 0)
        place = turn.select(*(self.shared_address(p) for p in places))
        kind = access_of(raw)
        leader = lane.compare("eq", 0)
        code.write(f"st.shared.{kind}", f"[{(place + warp * 8).text}]", raw, guard=leader)
        code.line("bar.sync 0;")
        read = code.fresh(raw.type)
        at = place + (lane & (warps - 1)) * 8
        code.write(f"ld.shared.{kind}", read, f"[{at.text}]")
        total = read.compare("ne", 0) if after.type == "i1" else read
        totals = self._up_to(scan, total, lane, warps)
        whole = moved(code, totals, "idx", warps - 1, WARP - 1)
        earlier = moved(code, totals, "idx", warp - 1, WARP - 1)
        others = self._joined(scan, earlier, lower)
        return warp.compare("eq", 0).select(lower, others), whole

    def _up_to(self, scan: Scan, value: Value, lane: Value, lanes: int) -> Value:
        """Each lane's value combined with those of the lanes below it."""
        step = 1
        while step < lanes:
            other = moved(self.code, value, "up", step, 0)
            value = lane.compare("ge", step).select(self._joined(scan, other, value), value)
            step *= 2
        return value

    def _joined(self, scan: Scan, a: Value, b: Value) -> Value:
        return scalars.apply(self.code, scan.fn, [a, b], scan.value.dtype.compute)


def moved(code: Code, value: Value, way: str, step: int | Value, clamp: int) -> Value:
    """The value of another lane: that so many below, or of that number."""
    if value.type == "i1":
        return moved(code, value.to("zext", "i32"), way, step, clamp).compare("ne", 0)
    if value.type in ("i64", "double"):
        low, high = code.fresh("i32"), code.fresh("i32")
        code.write("mov.b64", f"{{{low.text}, {high.text}}}", code_held(code, value))
        low, high = (moved(code, half, way, step, clamp) for half in (low, high))
        result = code.fresh(value.type)
        code.write("mov.b64", result, f"{{{low.text}, {high.text}}}")
        return result
    result, held = code.fresh(value.type), code_held(code, value)
    lane = step.text if isinstance(step, Value) else step
    code.line(f"shfl.sync.{way}.b32 {result.text}, {held.text}, {lane}, {clamp}, 0xffffffff;")
    return result
