"""Folds: loops around one accumulator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from stagefuse.compiler.kernel_ir import (
    Const,
    Fold,
    For,
    Op,
    Statement,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.operators import BITS
from stagefuse.compiler.scalar import identity
from stagefuse.dsl.dtypes import I64, DType

from . import scalars
from .bodies import at_most, folds_what_it_stores, is_adjacent, is_unrolled, values_of
from .ir import Code, Value
from .loops import SHORT_LOOP
from .streams import StreamWriter

PLACES = 256
"""Elements of a part of a row, whose extreme is compared with those of the parts before."""
Ends = tuple[Value, Value]
Step = Callable[[Value, Value], Value]


class FoldWriter(StreamWriter):
    """The function of a kernel, as far as its reductions go."""

    def first_of(self, body: Sequence[Statement]) -> int:
        """A loop and a fold of what it stores are one."""
        match body:
            case [For() as loop, Fold() as fold, *_] if self._joins(loop, fold):
                self._for_and_fold(loop, fold)
                return 2
        return super().first_of(body)

    def _joins(self, loop: For, fold: Fold) -> bool:
        stores = [x for x in loop.body if isinstance(x, Store)]
        return folds_what_it_stores(loop, fold) and not self._may_stream(loop, stores)

    def _for_and_fold(self, loop: For, fold: Fold) -> None:
        """A loop whose elements are accumulated as they are stored."""
        ((name, _),) = fold.loops

        def body(i: Value, totals: list[Value]) -> list[Value]:
            self.scopes[-1].indices |= {loop.index: i, name: i}
            self.statements(loop.body)
            return [self._step(fold, totals[0])]

        start = self.code.const(identity(fold.kind, fold.dtype), scalars.REGISTER[fold.dtype.name])
        ahead, short = [*values_of(loop.body), fold.value], at_most(loop.hi, SHORT_LOOP)
        masked = is_adjacent(values_of(loop.body), loop.index) and is_adjacent([fold.value], name)
        (total,) = self._loop(
            self.index(loop.lo), self.index(loop.hi), [start], body, ahead, {loop.index, name},
            True, True, short, masked, (start, self._join(fold, fold.kind, fold.dtype)),
        )  # fmt: skip
        self.scopes[-1].locals[fold.name] = total

    def _fold(self, s: Fold) -> None:
        if s.kind in ("argmax", "argmin"):
            result = self._fold_position(s)
        elif is_unrolled(s):
            result = self._fold_unrolled(s)
        else:
            result = self._fold_nest(s, s.kind, s.dtype, lambda total, at: self._step(s, total))
        if s.name in self.lost_nans:  # any number will do in place of what a NaN has made
            # LLVM would move a `freeze` into the loop, and with it all care for NaN
            kept = f'call {result.type} asm "", "=x,0"({result.type} {result.text})'
            result = self.code.emit(kept, result.type)
        self.scopes[-1].locals[s.name] = result

    def _step(self, s: Fold, total: Value) -> Value:
        loses = s.name in self.lost_nans
        return combine(self.code, s.kind, total, self._folded(s.value, s.kind), s.dtype, loses)

    def _join(self, s: Fold, kind: str, dtype: DType) -> Step:
        """How the results of two parts of a fold become that of both."""
        loses = s.name in self.lost_nans
        return lambda one, other: combine(self.code, kind, one, other, dtype, loses)

    def _folded(self, value: KernelValue, kind: str) -> Value:
        """The element of a fold.

        LLVM makes max(m, c ? x : -inf) a choice between max(m, x) and m, and no vectors of that: so
        it shall not know that -inf is the identity of a maximum.
        """
        if not (isinstance(value, Op) and value.fn == "select" and kind in ("max", "min")):
            return self.value(value)
        bit, *choices = value.args
        none = Const(identity(kind, value.dtype), value.dtype)
        if not value.dtype.is_float or none not in choices:
            return self.value(value)
        yes, no = (
            self.code.intrinsic("arithmetic.fence", found) if choice == none else found
            for choice, found in ((c, self.value(c)) for c in choices)
        )
        return self.value(bit).select(yes, no)

    def _fold_unrolled(self, s: Fold) -> Value:
        """A fold over a few positions, written out."""
        code = self.code
        total = code.const(identity(s.kind, s.dtype), scalars.REGISTER[s.dtype.name])
        extents = [range(extent.as_int() or 0) for _, extent in s.loops]
        for place in itertools.product(*extents):
            with self._inner_scope():
                for (name, _), position in zip(s.loops, place, strict=True):
                    self.scopes[-1].indices[name] = code.const(position, "i64")
                total = self._step(s, total)
        return total

    def _fold_nest(
        self, s: Fold, kind: str, dtype: DType, step: Step, part: Ends | None = None
    ) -> Value:
        """The loops of a fold around one accumulator; `step` also gets the flat position. Of a
        fold of one loop a `part` is where it begins and ends."""
        code = self.code
        zero = code.const(0, "i64")
        start = code.const(identity(kind, dtype), scalars.REGISTER[dtype.name])
        joined = (start, self._join(s, kind, dtype))

        def nest(number: int, total: Value, position: Value) -> Value:
            name, extent = s.loops[number]
            last = number == len(s.loops) - 1
            size = self.index(extent)

            def body(i: Value, totals: list[Value]) -> list[Value]:
                self.scopes[-1].indices[name] = i
                at = position * size + i if number else i
                return [step(totals[0], at) if last else nest(number + 1, totals[0], at)]

            bound, ahead = {n for n, _ in s.loops[number:]}, [s.value]
            short, masked = at_most(extent, SHORT_LOOP), last and is_adjacent(ahead, name)

            def fold(lo: Value, hi: Value, begin: Value) -> Value:
                return self._loop(
                    lo, hi, [begin], body, ahead, bound, False, last, short and last, masked, joined
                )[0]

            if part:
                return fold(*part, total)
            return self._fold_row(s, size, total, fold) if last else fold(zero, size, total)

        return nest(0, start, zero) if s.loops else step(start, zero)

    def _fold_row(
        self, s: Fold, size: Value, total: Value, fold: Callable[[Value, Value, Value], Value]
    ) -> Value:
        """The innermost loop of a fold: `fold(lo, hi, total)` is a part of it."""
        return fold(self.code.const(0, "i64"), size, total)

    def _fold_position(self, s: Fold) -> Value:
        """argmax and argmin: the extreme, then its place, among a part of a row if that is long."""
        code, dtype = self.code, s.value.dtype.compute
        kind = s.kind.removeprefix("arg")
        largest = partial(self._fold_nest, s, kind, dtype, partial(self._extreme, s, kind))
        if len(s.loops) > 1 or not s.loops or at_most(s.loops[0][1], 2 * PLACES):
            extreme, part = largest(), None
        else:
            extreme, part = self._fold_parts(s, kind, largest)

        def step(total: Value, at: Value) -> Value:
            value = self.value(s.value)
            found = value.compare("eq", extreme)
            if value.is_float:
                found = found | value.is_nan()
            return code.intrinsic("smin", total, found.select(at, (1 << 63) - 1))

        place = self._fold_nest(s, "min", I64, step, part)
        return place.compare("eq", (1 << 63) - 1).select(code.const(0, "i64"), place)

    def _extreme(self, s: Fold, kind: str, total: Value, _: Value) -> Value:
        return combine(self.code, kind, total, self._folded(s.value, kind), s.value.dtype.compute)

    def _fold_parts(
        self, s: Fold, kind: str, largest: Callable[[Ends], Value]
    ) -> tuple[Value, Ends]:
        """The extreme of a row, and the first part of it, `PLACES` elements or what is left, that
        has it or a NaN."""
        code, ((name, extent),), dtype = self.code, s.loops, s.value.dtype.compute
        zero, size = code.const(0, "i64"), self.index(extent)
        count = code.unsigned_division(size, code.const(PLACES, "i64"))

        def body(lo: Value, hi: Value, found: list[Value]) -> list[Value]:
            total, at = found
            here = combine(code, kind, total, largest((lo, hi)), dtype)
            ahead = here.compare("ne", total)
            if here.is_float:  # behind a NaN nothing is
                ahead = ahead & (total.is_nan() ^ 1)
            return [here, ahead.select(lo, at)]

        def whole(i: Value, found: list[Value]) -> list[Value]:
            return body(i * PLACES, i * PLACES + PLACES, found)

        start = [code.const(identity(kind, dtype), scalars.REGISTER[dtype.name]), zero]
        found = self._loop(zero, count, start, whole, [], {name}, False, False)
        extreme, lo = body(count * PLACES, size, found)
        return extreme, (lo, code.intrinsic("smin", lo + PLACES, size))


def combine(
    code: Code, kind: str, total: Value, value: Value, dtype: DType, loses_nans: bool = False
) -> Value:
    """One step of a fold; sums and products may be reassociated. `loses_nans`: an extreme of
    which one is NaN may be anything."""
    if kind in ("sum", "prod"):
        if not dtype.is_float:
            return total + value if kind == "sum" else total * value
        word = "fadd" if kind == "sum" else "fmul"
        # with `nsz` too LLVM would make (a + b) * c of a * c + b * c, which overflows elsewhere
        return code.emit(
            f"{word} reassoc contract {total.type} {total.text}, {value.text}", total.type
        )
    if kind == "any":
        return total | value
    if kind == "all":
        return total & value
    if dtype.is_float:  # of zeros either may be found: to tell them apart would take twice as long
        word = f"llvm.{kind}imum.f{BITS[total.type]}"
        flags = "nnan nsz" if loses_nans else "nsz"
        operands = f"{total.type} {total.text}, {value.type} {value.text}"
        return code.emit(f"call {flags} {total.type} @{word}({operands})", total.type)
    return scalars.extreme(code, total, value, dtype, kind)
