"""Sorting scratch by a digit of eight bits: a block counts how often each occurs, then moves.

A warp has a stretch of the elements, 32 at a time. Lanes with the same digit find each other by
votes on its bits, and
the first of them adds their number to the warp's count of it; what that was, and how many of them
lie before a lane, is the rank of the lane's element. Counts of all warps are then added up, by
digits and by warps within a digit, to where each warp's elements of a digit begin. All is done in
the order of the elements, so that the sort is stable.
"""

from __future__ import annotations

from typing import NamedTuple

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.matmul.few_rows import FewRowsWriter
from stagefuse.compiler.gpu.memory import Memory
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.compiler.kernel_ir import SortDigit
from stagefuse.compiler.sort_order import DIGITS, number_of
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DType

from .scan import moved

ACCESS = {1: "u8", 2: "u16", 4: "b32", 8: "b64"}
"""How elements are loaded and stored as bits, by their bytes."""


class Held(NamedTuple):
    """An element that a lane has taken out of memory: its place and bits, its digit below how many
    of its warp's come before it, and whether there is one."""

    place: Value
    bits: Value
    rank: Value
    valid: Value


class DigitWriter(FewRowsWriter):
    """The body of a kernel, as far as its sorts by digits go."""

    warp: Value
    """The number of a lane's warp in its block."""
    counts: Expr | None = None
    """Where the counts of the warps lie in shared memory, and behind them eight sums of digits."""

    def sort_digit(self, s: SortDigit) -> None:
        lanes, most = self.team.lanes, self.facts.bounds(self.resolve(s.count))[1]
        assert most is not None and lanes >= DIGITS, "a digit's elements lie in registers"
        each = max(-(-most // lanes), 1)
        if self.counts is None:
            self.counts = self.reserve((lanes // WARP * DIGITS + 8) * 4)
        order, start = self.memory[s.order], self.shared_address(self.counts)
        own = start + self.warp * (DIGITS * 4)
        self._no_counts(start)
        self.barrier()
        first = self.warp * (WARP * each) + self._own_lane()
        held = [self._digit_held(s, first + n * WARP, own) for n in range(each)]
        self.barrier()
        self._begins(s, start)
        self.barrier()
        places = [self._put_digit(s, element, own) for element in held]
        moves = [self._bits_of(order, x.place, x.valid) for x in held]  # late: registers are few
        self.barrier()
        for place, move, element in zip(places, moves, held, strict=True):
            self._put(order, place, move, element.valid)
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
        """The element at an index, counted."""
        code, keys = self.code, self.memory[s.keys]
        valid = index.compare("lt", self.index(s.count, "i32"))
        bits = self._bits_of(keys, index, valid)
        digit = digit_of(bits, keys.dtype, self.index(s.shift, "i32"), s.descending)
        rank, earlier = (code.fresh("i32") for _ in range(2))
        found = self._same_digit(digit, valid)
        below = found & (code.const(1, "i32").shl(self._own_lane()) - 1)
        code.write("popc.b32", rank, below)
        leads = rank.compare("eq", 0) & valid
        code.set(earlier, code.const(0, "i32"))
        same, leader = code.fresh("i32"), code.fresh("i32")
        code.write("popc.b32", same, found)
        at = counts + digit * 4
        code.write("atom.shared.add.u32", earlier, f"[{at.text}]", same, guard=leads)
        code.write("bfind.u32", leader, found & (0 - found))
        rank = moved(code, earlier, "idx", leader, WARP - 1) + rank
        return Held(index, bits, rank.shl(8) | digit, valid)

    def _same_digit(self, digit: Value, valid: Value) -> Value:
        """Which lanes have a lane's digit: for each of its bits those that have it, or have not.

        `match` finds one digit after the other, of which there are up to 32.
        """
        code = self.code
        found = self._ballot(valid)
        for bit in range((DIGITS - 1).bit_length()):
            has = (digit & (1 << bit)).compare("ne", 0)
            found = found & (self._ballot(has) ^ has.select(code.const(0, "i32"), -1))
        return found

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
        has = digit.compare("lt", DIGITS)
        total = code.const(0, "i32")
        places = [f"[{(start + digit * 4).text}+{n * DIGITS * 4}]" for n in range(warps)]
        for place in places:
            total = total + self._count_at(place, has)
        up_to_here = total
        for step in (1, 2, 4, 8, 16):
            other = moved(code, up_to_here, "up", step, 0)
            up_to_here = self._own_lane().compare("ge", step).select(up_to_here + other, up_to_here)
        sums, last = start + warps * DIGITS * 4, self._own_lane().compare("eq", WARP - 1)
        code.write("st.shared.b32", f"[{(sums + self.warp * 4).text}]", up_to_here,
                   guard=last & has)  # fmt: skip
        self.barrier()
        begin = up_to_here - total
        for n in range(DIGITS // WARP - 1):
            of_warp = code.fresh("i32")
            code.write("ld.shared.b32", of_warp, f"[{sums.text}+{n * 4}]")
            begin = begin + self.warp.compare("gt", n).select(of_warp, code.const(0, "i32"))
        if s.before:
            memory = self.memory[s.before]
            code.write("st.shared.b32", self._digit_at(memory, digit), begin, guard=has)
            end = self._digit_at(memory, code.const(DIGITS, "i32"))
            code.write("st.shared.b32", end, self.index(s.count, "i32"),
                       guard=digit.compare("eq", 0))  # fmt: skip
        for place in places:  # read again: kept, they would take too many registers
            count = self._count_at(place, has)
            code.write("st.shared.b32", place, begin, guard=has)
            begin = begin + count

    def _count_at(self, place: str, has: Value) -> Value:
        count = self.code.variable("i32", self.code.const(0, "i32"))
        self.code.write("ld.shared.b32", count, place, guard=has)
        return count

    def _put_digit(self, s: SortDigit, held: Held, counts: Value) -> Value:
        """Stores an element at its place, which it gives."""
        code = self.code
        begin = code.variable("i32", code.const(0, "i32"))
        digit = held.rank & (DIGITS - 1)
        at = counts + digit * 4
        code.write("ld.shared.b32", begin, f"[{at.text}]", guard=held.valid)
        index = begin + held.rank.lshr(8)
        for name, value in ((s.keys, held.bits), (s.digits, digit)):
            if name:
                self._put(self.memory[name], index, value, held.valid)
        return index

    def _put(self, memory: Memory, index: Value, value: Value, valid: Value) -> None:
        op = f"st.shared.{ACCESS[memory.dtype.itemsize]}"
        self.code.write(op, self._digit_at(memory, index), value, guard=valid)


def digit_of(bits: Value, dtype: DType, shift: Value, descending: bool) -> Value:
    """Eight bits of the number that a key has in the order of its dtype, from a shift on."""
    number = number_of(bits.code, bits, dtype, descending)
    return number.lshr(shift.to("sext", number.type)).to("trunc", "i32") & (DIGITS - 1)
