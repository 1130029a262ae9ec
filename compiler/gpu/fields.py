"""What is known of integers that are parts of words, such as codes: their bounds, and their bits.

A part of a word is one shift and one mask, in however many operations it was written. Narrowing an
integer whose bounds fit changes nothing. A small one becomes a float without a conversion, of
which a multiprocessor does few: it is put into the low bits of 2^23, which is then subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stagefuse.dsl.frozen import frozen

if TYPE_CHECKING:
    from .ir import Code, Value

ONE = 1 << 23
"""From here to twice this, f32's lowest bit is worth one."""
ONE_BITS = 0x4B000000
CENTRE_BITS = 0x4B400000
"""The bits of 2^23 and of 3 * 2^22."""
EACH_BYTE = 0x01010101


@frozen
class Known:
    """The bounds of an integer in a register. It is a word's bits from `shift` on under `mask`, if
    there is a word; or what another one not below 0 is, and an `offset`."""

    low: int
    high: int
    word: Value | None = None
    shift: int = 0
    mask: int = 0
    base: Value | None = None
    offset: int = 0


class Fields:
    """What is known of the registers of some code, by their text."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.known: dict[str, Known] = {}
        self.signed: dict[str, tuple[Value, int, int]] = {}
        """Registers that are some bits of a word, extended by their sign: where they begin in
        which, and their mask."""

        self.whole: dict[str, int] = {}
        """The greatest magnitude of floats that are integers."""
        self.eighths: set[str] = set()
        """Floats that were stored in 8 bits."""

    def note_signed(
        self, values: Sequence[Value], places: Sequence[tuple[Value, int]], bits: int
    ) -> None:
        """Notes that registers are so many bits of words, extended by their signs."""
        for value, (word, shift) in zip(values, places, strict=True):
            self.signed[value.text] = word, shift, (1 << bits) - 1
            self.known[value.text] = Known(-(1 << bits - 1), (1 << bits - 1) - 1)

    def part(self, word: Value, shift: int, mask: int) -> Value:
        """Some bits of a word."""
        code, found = self.code, word
        if not mask:
            return code.const(0, "i32")
        if shift:
            found = code.pure("shr.u32", "i32", found, code.const(shift, "i32"))
        if mask.bit_length() + shift < 32:
            found = code.pure("and.b32", "i32", found, code.const(mask, "i32"))
        self.known[found.text] = Known(0, mask, word, shift, mask)
        return found

    def unsigned(self, value: Value) -> Value | None:
        """A narrow integer as an unsigned one, if that is known otherwise than by masking it."""
        if value.text in self.signed:
            return self.part(*self.signed[value.text])
        known = self.known.get(value.text)
        return value if known is not None and known.low >= 0 else None

    def fits(self, value: Value, bits: int) -> bool:
        """Whether a value is within so many bits, one of which is its sign."""
        known = self.known.get(value.text)
        return known is not None and -(1 << bits - 1) <= known.low and known.high < 1 << bits - 1

    def integer(self, op: str, a: Value, b: Value) -> Value | None:
        """An operation on a part of a word that is one too."""
        x, y = self.known.get(a.text), b.known
        if x is None or y is None or y < 0 or x.word is None:
            return None
        if op == "and":
            return a if x.mask & y == x.mask else self.part(x.word, x.shift, x.mask & y)
        if op in ("lshr", "ashr"):
            return self.part(x.word, x.shift + y, x.mask >> y)
        return None

    def note(self, op: str, a: Value, b: Value, result: Value) -> None:
        """Notes what follows for the result of an operation that was written."""
        x, y, number = self.known.get(a.text), self.known.get(b.text), b.known
        if x is None or (y is None and number is None):
            return
        if y is not None:
            if op == "or" and min(x.low, y.low) >= 0:
                bits = max(x.high.bit_length(), y.high.bit_length())
                self.known[result.text] = Known(0, (1 << bits) - 1)
            return
        assert number is not None
        if op in ("add", "sub"):
            by = number if op == "add" else -number
            base, offset = (a, 0) if x.base is None else (x.base, x.offset)
            if self.known[base.text].low >= 0:
                self.known[result.text] = Known(
                    x.low + by, x.high + by, base=base, offset=offset + by
                )
        elif op == "shl" and x.low >= 0 and x.high << number < 1 << 31:
            self.known[result.text] = Known(x.low << number, x.high << number)

    def as_float(self, value: Value) -> Value | None:
        """A small integer as an f32, exactly; None if it may not be small."""
        known, code = self.known.get(value.text), self.code
        if known is None or known.high >= ONE // 2 or known.low < -ONE // 2:
            return None
        base, offset = (value, 0) if known.base is None else (known.base, known.offset)
        word, shift, mask = self.signed.get(value.text, (value, 0, 0))
        if mask == 0xFF:  # one that is not below 0, with the sign turned, and less by 128
            turned = code.pure("xor.b32", "i32", word, code.const(EACH_BYTE * 0x80, "i32"))
            bits, away = self._with_byte(turned, shift // 8), float(ONE + 0x80)
        elif self.known[base.text].low >= 0 and self.known[base.text].high < ONE // 2:
            bits = self._with_part(self.known[base.text], base)
            away = float(ONE - offset)
        else:
            bits = code.pure("add.s32", "i32", value, code.const(CENTRE_BITS, "i32"))
            away = 1.5 * ONE
        found = code.pure("sub.rn.f32", "float", bits.as_float("float"), code.const(away, "float"))
        self.whole[found.text] = max(known.high, -known.low)
        return found

    def has_bits(self, value: Value, bits: int) -> bool:
        """Whether a float is an integer that so many bits of a mantissa hold, or was stored in 8
        bits, and is to be in 16."""
        if value.text in self.eighths:
            return bits > 0
        return self.whole.get(value.text, 1 << bits + 1) <= 1 << bits

    def top_byte(self, value: Value) -> Value:
        """A word that has a byte above zeros."""
        known, code = self.known.get(value.text), self.code
        if known is None or known.word is None or known.shift % 8 or known.mask != 0xFF:
            return code.pure("shl.b32", "i32", value, code.const(24, "i32"))
        picked = code.const(0x444 + (known.shift // 8 << 12), "i32")
        return code.pure("prmt.b32", "i32", known.word, code.const(0, "i32"), picked)

    def _with_part(self, known: Known, value: Value) -> Value:
        """The bits of 2^23 and an integer not below 0. Of parts of a word that lie in its bytes all
        four are shifted and masked at once, and each is picked by one instruction."""
        code, word = self.code, known.word
        byte, shift = divmod(known.shift, 8)
        if word is None or shift + known.mask.bit_length() > 8:
            return code.pure("or.b32", "i32", value, code.const(ONE_BITS, "i32"))
        if shift:
            word = code.pure("shr.u32", "i32", word, code.const(shift, "i32"))
        if known.mask != 0xFF:
            word = code.pure("and.b32", "i32", word, code.const(known.mask * EACH_BYTE, "i32"))
        return self._with_byte(word, byte)

    def _with_byte(self, word: Value, byte: int) -> Value:
        """The bits of 2^23 and a byte of a word (PTX ISA 9.7.9.7, "prmt")."""
        code = self.code
        picked = code.const(0x7440 + byte, "i32")
        return code.pure("prmt.b32", "i32", word, code.const(ONE_BITS, "i32"), picked)
