"""Sorting scratch by a digit of eight bits: a block counts how often each occurs, then moves.

A warp has a stretch of the elements, 32 at a time. Lanes with the same digit find each other by
votes on its bits, and the first of them adds their number to the warp's count of it; what that was,
and how many of them lie before a lane, is the rank of the lane's element. Counts of all warps are
then added up, by digits and by warps within a digit, to where each warp's elements of a digit
begin. All is done in the order of the elements, so that the sort is stable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.matmul.few_rows import FewRowsWriter
from stagefuse.compiler.gpu.memory import Memory
from stagefuse.compiler.gpu.teams import WARP, lanes_for
from stagefuse.compiler.kernel_ir import SortDigit
from stagefuse.compiler.sort_order import DIGITS, number_of
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DType

from .scan import moved

ACCESS = {1: "u8", 2: "u16", 4: "b32", 8: "b64"}
"""How elements are loaded and stored as bits, by their bytes."""


def room_for(most: int) -> int:
    """Of how many elements scratch has room for all that lanes hold, up to so many."""
    lanes = lanes_for(most)
    return -(-most // lanes) * lanes


class Held(NamedTuple):
    """An element that a lane has taken out of memory: its place and bits, and its digit below how
    many of its warp's come before it."""

    place: Value
    bits: Value
    rank: Value


class DigitWriter(FewRowsWriter):
    """The body of a kernel, as far as its sorts by digits go."""

    warp: Value
    """The number of a lane's warp in its block."""
    held_by_all: int = 0
    """Elements that lanes of a sort have room for."""
    counts: Expr | None = None
    """Where the counts of the warps lie in shared memory, and behind them eight sums of digits."""

    def sort_digit(self, s: SortDigit) -> None:
        lanes, most = self.team.lanes, self.facts.bounds(self.resolve(s.count))[1]
        assert most is not None and lanes >= DIGITS, "a digit's elements lie in registers"
        each = max(-(-most // lanes), 1)
        if self.counts is None:
            self.counts = self.reserve((lanes // WARP * DIGITS + 8) * 4)
        start = self.shared_address(self.counts)
        own = start + self.warp * (DIGITS * 4)
        self._no_counts(start)
        self.barrier()
        first = self.warp * (WARP * each) + self._own_lane()
        self.held_by_all = lanes * each
        held = [self._digit_held(s, first + n * WARP, own) for n in range(each)]
        self.barrier()
        self._begins(s, start)
        self.barrier()
        places = [self._put_digit(s, element, own) for element in held]
        if s.order:
            order = self.memory[s.order]
            moves = [  # late: registers are few
                self._bits_of(order, x.place, x.place.compare("lt", self.index(s.count, "i32")))
                for x in held
            ]
            self.barrier()
            for place, move in zip(places, moves, strict=True):
                self._put(order, place, move)
        self.barrier()

    def _own_lane(self) -> Value:
        return self.symbols["lane"] & (WARP - 1)

    def _no_counts(self, start: Value) -> None:
        """No element is counted yet."""
        zero, at = self.code.const(0, "i32"), start + self.symbols["lane"] * 16
        for n in range(DIGITS // WARP // 4):
            self.code.write("st.shared.v4.b32", f"[{at.text}+{n * self.team.lanes * 16}]",
                            f"{{{', '.join([zero.text] * 4)}}}")  # fmt: skip

    def _digit_held(self, s: SortDigit, index: Value, counts: Value) -> Held:
        """The element at an index, counted. What lies behind the last one has the last digit, and
        comes after all that do."""
        code, keys = self.code, self.memory[s.keys]
        valid = index.compare("lt", self.index(s.count, "i32"))
        bits = self._bits_of(keys, index, valid)
        digit = digit_of(bits, keys.dtype, self.index(s.shift, "i32"), s.descending)
        digit = valid.select(digit, code.const(DIGITS - 1, "i32"))
        found = self._same_digit(digit)
        rank, same, earlier = (code.fresh("i32") for _ in range(3))
        code.write("popc.b32", rank, found & (code.const(1, "i32").shl(self._own_lane()) - 1))
        code.write("popc.b32", same, found)
        at = f"[{(counts + digit * 4).text}]"
        code.write("ld.shared.b32", earlier, at)
        code.line("bar.warp.sync 0xffffffff;")
        code.write("st.shared.b32", at, earlier + same, guard=rank.compare("eq", 0))
        code.line("bar.warp.sync 0xffffffff;")
        return Held(index, bits, (earlier + rank).shl(8) | digit)

    def _same_digit(self, digit: Value) -> Value:
        """Which lanes have a lane's digit: for each of its bits those that have it, or have not.

        `match` finds one digit after the other, of which there are up to 32.
        """
        code = self.code
        left = []
        for bit in range((DIGITS - 1).bit_length()):
            has = (digit & (1 << bit)).compare("ne", 0)
            left.append(self._ballot(has) ^ has.select(code.const(0, "i32"), -1))
        while len(left) > 2:
            all_three = code.fresh("i32")
            code.write("lop3.b32", all_three, *left[:3], "0x80")
            left = [*left[3:], all_three]
        return left[0] & left[1]

    def _ballot(self, here: Value) -> Value:
        lanes = self.code.fresh("i32")
        self.code.write("vote.sync.ballot.b32", lanes, here, "0xffffffff")
        return lanes

    def _bits_of(self, memory: Memory, index: Value, valid: Value) -> Value:
        code, size = self.code, memory.dtype.itemsize
        kind = "i64" if size == 8 else "i32"
        found = code.variable(kind, code.const(0, kind))
        code.write(f"ld.shared.{ACCESS[size]}", found, self._digit_at(memory, index), guard=valid)
        return found

    def _digit_at(self, memory: Memory, index: Value) -> str:
        assert memory.start is not None and memory.space == "shared"
        return f"[{(memory.start + index * memory.dtype.itemsize).text}]"

    def _begins(self, s: SortDigit, start: Value) -> None:
        """Counts become the places where each warp's elements of each digit begin; a lane has a
        digit, as long as there are any."""
        code, digit, warps = self.code, self.symbols["lane"], self.team.lanes // WARP
        places = [f"[{(start + digit * 4).text}+{n * DIGITS * 4}]" for n in range(warps)]
        sums, begin = start + warps * DIGITS * 4, code.fresh("i32")
        with self._of_digits():
            total = code.const(0, "i32")
            for place in places:
                total = total + self._count_at(place)
            up_to_here = total
            for step in (1, 2, 4, 8, 16):
                other = moved(code, up_to_here, "up", step, 0)
                within = self._own_lane().compare("ge", step)
                up_to_here = within.select(up_to_here + other, up_to_here)
            last = self._own_lane().compare("eq", WARP - 1)
            code.write("st.shared.b32", f"[{(sums + self.warp * 4).text}]", up_to_here, guard=last)
            code.set(begin, up_to_here - total)
        self.barrier()
        with self._of_digits():
            first = begin
            for n in range(DIGITS // WARP - 1):
                of_warp = self._count_at(f"[{sums.text}+{n * 4}]")
                first = first + self.warp.compare("gt", n).select(of_warp, code.const(0, "i32"))
            if s.before:
                memory = self.memory[s.before]
                code.write("st.shared.b32", self._digit_at(memory, digit), first)
                end = self._digit_at(memory, code.const(DIGITS, "i32"))
                code.write("st.shared.b32", end, self.index(s.count, "i32"),
                           guard=digit.compare("eq", 0))  # fmt: skip
            for place in places:  # read again: kept, they would take too many registers
                count = self._count_at(place)
                code.write("st.shared.b32", place, first)
                first = first + count

    @contextmanager
    def _of_digits(self) -> Iterator[None]:
        """Inside are the warps whose lanes have a digit each."""
        if self.team.lanes == DIGITS:
            yield
            return
        code, others = self.code, self.code.label("others")
        code.branch_if(self.symbols["lane"].compare("lt", DIGITS), others, holds=False)
        with code.branch_scope():
            yield
        code.start(others)

    def _count_at(self, place: str) -> Value:
        count = self.code.fresh("i32")
        self.code.write("ld.shared.b32", count, place)
        return count

    def _put_digit(self, s: SortDigit, held: Held, counts: Value) -> Value:
        """Stores an element at its place, which it gives."""
        code = self.code
        begin = code.fresh("i32")
        digit = held.rank & (DIGITS - 1)
        code.write("ld.shared.b32", begin, f"[{(counts + digit * 4).text}]")
        index = begin + held.rank.lshr(8)
        for name, value in ((s.keys, held.bits), (s.digits, digit)):
            if name:
                self._put(self.memory[name], index, value)
        return index

    def _put(self, memory: Memory, index: Value, value: Value) -> None:
        """Stores bits in scratch: all that lanes hold, or as far as there is room."""
        (extent,) = memory.shape
        inside = index.compare("lt", self.index(extent, "i32"))
        if self.facts.is_nonneg(self.resolve(extent) - self.held_by_all):
            inside = self.code.const(1, "i1")
        op = f"st.shared.{ACCESS[memory.dtype.itemsize]}"
        self.code.write(op, self._digit_at(memory, index), value, guard=inside)


def digit_of(bits: Value, dtype: DType, shift: Value, descending: bool) -> Value:
    """Eight bits of the number that a key has in the order of its dtype, from a shift on."""
    number = number_of(bits.code, bits, dtype, descending)
    return number.lshr(shift.to("sext", number.type)).to("trunc", "i32") & (DIGITS - 1)
