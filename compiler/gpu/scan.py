"""Scans along rows by a warp: 32 elements at a time, each with what came before it."""

from __future__ import annotations

from dataclasses import dataclass

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
from stagefuse.dsl.dims import const, floordiv, sym

from . import scalars
from .folds import FoldWriter, code_held
from .ir import Code, Value
from .loops import Carry, Slot
from .teams import WARP


@dataclass(frozen=True)
class Scan:
    """A loop that stores, for each of its positions, a function of all values up to there."""

    loop: For
    fn: str
    value: KernelValue
    out: Store
    first: KernelValue


def scan_of(kernel: Kernel) -> Scan | None:
    """The scan that a kernel is, if it goes along rows as they lie in memory."""
    if len(kernel.body) != 3:
        return None
    total, start, loop = kernel.body
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
    return Scan(loop, so_far.fn, value, out, start.value)


class ScanWriter(FoldWriter):
    """The body of a kernel, as far as its scans go."""

    def plain(self, s: For) -> None:
        scan = scan_of(self.kernel) if self.in_team else None
        if scan is None or scan.loop is not s or self.team.lanes != WARP:
            return super().plain(s)
        extent = self.resolve(s.hi - s.lo)
        chunks = floordiv(extent + (WARP - 1), WARP)
        start = self.value(scan.first)

        def chunk(carry: Carry) -> Carry:
            place = sym("chunk'") * WARP + sym("lane")
            mask = self.holds("lt", place, extent)
            slot = Slot(s.index, self.resolve(s.lo + place), 1)
            with self._slot(slot, mask):
                (total,) = self._chunk(scan, carry[0], start, mask)
            return [total]

        self.loop("chunk'", const(0), chunks, [start], chunk)

    def _chunk(self, scan: Scan, before: Value, start: Value, mask: Value) -> Carry:
        """Stores 32 elements; gives what is carried on from the last."""
        code, dtype = self.code, scan.value.dtype.compute
        lane = self.symbols["lane"]
        found = start
        for _ in self.elements():
            value = mask.select(self.value(scan.value), start)
            step = 1
            while step < WARP:
                other = moved(code, value, "up", step, 0)
                joined = scalars.apply(code, scan.fn, [other, value], dtype)
                value = lane.compare("ge", step).select(joined, value)
                step *= 2
            found = scalars.apply(code, scan.fn, [before, value], dtype)
            memory = self.memory[scan.out.buffer]
            at = self.address(memory, self.place(memory, scan.out.indices))
            self.write(memory, at, [found])
        return [moved(code, found, "idx", WARP - 1, WARP - 1)]


def moved(code: Code, value: Value, way: str, step: int, clamp: int) -> Value:
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
    code.line(f"shfl.sync.{way}.b32 {result.text}, {held.text}, {step}, {clamp}, 0xffffffff;")
    return result
