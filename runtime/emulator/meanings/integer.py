"""Integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stagefuse.compiler.ptx.table import Match
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator.operands import getter, putter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.values import DTYPES

from . import effect, pure

Function = Callable[..., Any]
_LIMIT32 = np.iinfo(np.int32)


def _halves(match: Match, f: Function) -> Function:
    """A function of 16-bit integers on both halves of u16x2 or s16x2."""
    half = np.dtype(np.int16 if match.get("T", "u16x2")[0] == "s" else np.uint16)

    def both(*operands: Any) -> Any:
        parts = [np.atleast_1d(x).view(half).reshape(-1, 2) for x in operands]
        return np.ascontiguousarray(f(*parts)).view(np.uint32).reshape(-1)

    return both


def _is_packed(match: Match) -> bool:
    return "u16x2" in match.slots.values() or "s16x2" in match.slots.values()


def _clamp32(x: Any) -> Any:
    return np.clip(x, _LIMIT32.min, _LIMIT32.max).astype(np.int32)


@pure("int.add", "int.sub")
def add_sub(match: Match) -> Function:
    op: Function = np.add if match.form.opcode == "add" else np.subtract
    if _is_packed(match):
        return _halves(match, op)
    if "sat" in match:
        return lambda a, b: _clamp32(op(a.astype(np.int64), b.astype(np.int64)))
    return op


def _wide(match: Match) -> np.dtype[Any]:
    kind = TYPES[match.get("T", "s32")]
    return np.dtype(f"{'i' if kind.kind == 'signed' else 'u'}{kind.bits // 4}")


def _high(match: Match) -> Function:
    """The upper half of the product of two integers."""
    kind = TYPES[match.get("T", "s32")]
    dtype = DTYPES[kind.name]
    if kind.bits < 64:
        wide = _wide(match)
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> kind.bits).astype(dtype)
    return _high_signed if kind.kind == "signed" else _high_unsigned


def _high_unsigned(a: Any, b: Any) -> Any:
    u = np.uint64
    mask, half = u(0xFFFFFFFF), u(32)
    al, ah, bl, bh = a & mask, a >> half, b & mask, b >> half
    middle = (al * bl >> half) + (ah * bl & mask) + (al * bh & mask)
    return ah * bh + (ah * bl >> half) + (al * bh >> half) + (middle >> half)


def _high_signed(a: Any, b: Any) -> Any:
    ua, ub = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
    high = np.asarray(_high_unsigned(ua, ub)).view(np.int64)
    return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


@pure("int.mul")
def mul(match: Match) -> Function:
    if "wide" in match.slots:
        wide = _wide(match)
        return lambda a, b: a.astype(wide) * b.astype(wide)
    return _high(match) if match.get("half") == "hi" else np.multiply


@pure("int.mad")
def mad(match: Match) -> Function:
    if "wide" in match.slots:
        wide = _wide(match)
        return lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    if "sat" in match:
        high = _high(match)
        return lambda a, b, c: _clamp32(high(a, b).astype(np.int64) + c)
    if match.get("half") == "hi":
        high = _high(match)
        return lambda a, b, c: high(a, b) + c
    return lambda a, b, c: a * b + c


def _mul24(match: Match) -> Function:
    signed = match.get("T") == "s32"
    wide, dtype = np.dtype(np.int64 if signed else np.uint64), DTYPES[match.get("T")]
    shift = 16 if match.get("half") == "hi" else 0

    def cut(x: Any) -> Any:
        low = x & dtype.type(0xFFFFFF)
        low = (low ^ 0x800000) - 0x800000 if signed else low
        return np.asarray(low).astype(wide)

    return lambda a, b: ((cut(a) * cut(b)) >> shift).astype(dtype)


@pure("int.mul24")
def mul24(match: Match) -> Function:
    return _mul24(match)


@pure("int.mad24")
def mad24(match: Match) -> Function:
    product = _mul24(match)
    if "sat" in match:
        return lambda a, b, c: _clamp32(product(a, b).astype(np.int64) + c)
    return lambda a, b, c: product(a, b) + c


@pure("int.fns")
def fns(match: Match) -> Function:
    """PTX ISA, "fns": the |c|-th 1 from bit b up, or down where c < 0; of c = 0 bit b itself."""

    def run(a: Any, base: Any, c: Any) -> Any:
        a, base, c = np.broadcast_arrays(*map(np.atleast_1d, (a, base, c)))
        position = base.astype(np.int64)
        left = np.where(c == 0, 1, np.abs(c.astype(np.int64)))
        found = np.full(a.shape, 0xFFFFFFFF, np.uint32)
        for i in range(32):
            at = np.where(c < 0, position - i, position + i)
            seen = (at >= 0) & (at < 32) & ((c != 0) | (i == 0))
            held = seen & ((a >> np.clip(at, 0, 31).astype(np.uint32)) & 1 == 1)
            left = left - held
            found = np.where(held & (left == 0), at.astype(np.uint32), found)
        return found

    return run


@pure("int.sad")
def sad(match: Match) -> Function:
    return lambda a, b, c: c + np.where(a > b, a - b, b - a)


@pure("int.div", "int.rem")
def div_rem(match: Match) -> Function:
    """Truncated towards zero. By zero the ISA leaves it open, and the hardware gives all ones."""
    dtype = DTYPES[match.get("T")]
    ones = np.array(-1, f"i{dtype.itemsize}").view(dtype)[()]
    zero, one = dtype.type(0), dtype.type(1)
    signed = dtype.kind == "i"

    def quotient(a: Any, b: Any) -> Any:
        by = np.where(b == zero, one, b)
        q = a // by
        if signed:  # NumPy floors
            q = q + ((a - q * by != zero) & ((a < 0) != (by < 0))).astype(dtype)
        return q, by

    def div(a: Any, b: Any) -> Any:
        return np.where(b == zero, ones, quotient(a, b)[0])

    def rem(a: Any, b: Any) -> Any:
        q, by = quotient(a, b)
        return np.where(b == zero, ones, a - q * by)

    return div if match.form.opcode == "div" else rem


@pure("int.abs", "int.neg")
def abs_neg(match: Match) -> Function:
    return np.abs if match.form.opcode == "abs" else np.negative


@pure("int.min", "int.max")
def min_max(match: Match) -> Function:
    op: Function = np.minimum if match.form.opcode == "min" else np.maximum
    if "relu" in match.slots:
        plain = op
        op = lambda a, b: np.maximum(plain(a, b), np.int16(0))  # noqa: E731
    return _halves(match, op) if _is_packed(match) else op


@pure("int.popc")
def popc(match: Match) -> Function:
    return lambda a: np.bitwise_count(a).astype(np.uint32)


def _top_bit(a: Any) -> Any:
    """The position of the highest bit that is 1, -1 for 0."""
    wide = np.asarray(a).astype(np.uint64)
    found = np.full(wide.shape, -1, np.int64)
    for shift in (32, 16, 8, 4, 2, 1):
        up = wide >> np.uint64(shift) != 0
        found = np.where(up, found + shift, found)
        wide = np.where(up, wide >> np.uint64(shift), wide)
    return np.where(wide != 0, found + 1, found)


@pure("int.clz")
def clz(match: Match) -> Function:
    bits = TYPES[match.get("T")].bits
    return lambda a: (bits - 1 - _top_bit(a)).astype(np.uint32)


@pure("int.bfind")
def bfind(match: Match) -> Function:
    kind = TYPES[match.get("T")]
    unsigned = np.dtype(f"u{kind.bits // 8}")

    def find(a: Any) -> Any:
        x = np.where(a < 0, ~a, a) if kind.kind == "signed" else a
        top = _top_bit(np.asarray(x).view(unsigned))
        if "shiftamt" in match.slots:
            top = np.where(top < 0, top, kind.bits - 1 - top)
        return top.astype(np.uint32)

    return find


@pure("int.brev")
def brev(match: Match) -> Function:
    size = TYPES[match.get("T")].size_bytes
    table = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)

    def reverse(a: Any) -> Any:
        x = np.atleast_1d(a)
        swapped = np.ascontiguousarray(table[x.view(np.uint8).reshape(-1, size)[:, ::-1]])
        return swapped.view(x.dtype).reshape(-1)

    return reverse


def _ones(count: Any) -> Any:
    """So many ones, at the low end of 64 bits."""
    one = np.uint64(1)
    some = (one << (count % 64).astype(np.uint64)) - one
    return np.where(count >= 64, np.uint64(2**64 - 1), some)


@pure("int.bfe")
def bfe(match: Match) -> Function:
    """PTX ISA, "bfe": beyond the word, an unsigned field is 0 and a signed one is its sign."""
    kind = TYPES[match.get("T")]
    dtype = DTYPES[kind.name]
    msb = kind.bits - 1

    def extract(a: Any, b: Any, c: Any) -> Any:
        a = np.atleast_1d(a)
        pos = (np.atleast_1d(b) & 0xFF).astype(np.int64)
        length = (np.atleast_1d(c) & 0xFF).astype(np.int64)
        raw = a.view(f"u{dtype.itemsize}").astype(np.uint64)
        ones = _ones(np.minimum(length, 64))
        field = np.where(pos <= msb, raw >> np.minimum(pos, 63).astype(np.uint64), np.uint64(0))
        field = field & ones
        if kind.kind == "signed":
            at = np.minimum(pos + length - 1, msb)
            sign = (raw >> np.maximum(at, 0).astype(np.uint64)) & np.uint64(1)
            fill = (sign == 1) & (length > 0)
            valid = np.clip(np.minimum(length, msb + 1 - pos), 0, 64)
            low = _ones(valid)
            field = np.where(fill, field | ~low, field)
        return field.astype(f"u{dtype.itemsize}").view(dtype)

    return extract


@pure("int.bfi")
def bfi(match: Match) -> Function:
    dtype = DTYPES[match.get("T")]
    bits = dtype.itemsize * 8

    def insert(a: Any, b: Any, c: Any, e: Any) -> Any:
        pos = (np.atleast_1d(c) & 0xFF).astype(np.int64)
        length = np.minimum((np.atleast_1d(e) & 0xFF).astype(np.int64), bits)
        ones = _ones(length)
        by = np.minimum(pos, 63).astype(np.uint64)
        inside = pos < bits
        mask = np.where(inside, ones << by, np.uint64(0)).astype(dtype)
        moved = np.where(inside, a.astype(np.uint64) << by, np.uint64(0)).astype(dtype)
        return (b & ~mask) | (moved & mask)

    return insert


@pure("int.szext")
def szext(match: Match) -> Function:
    signed = match.get("T") == "s32"

    def extend(a: Any, b: Any) -> Any:
        n = np.atleast_1d(b).astype(np.int64)
        n = n & 31 if match.get("mode") == "wrap" else np.minimum(n, 32)
        x = np.atleast_1d(a).astype(np.int64) & 0xFFFFFFFF
        low = x & ((np.int64(1) << n) - 1)
        if signed:
            top = np.int64(1) << np.maximum(n - 1, 0)
            low = np.where(n > 0, (low ^ top) - top, 0)
        return low.astype(np.uint32).view(DTYPES[match.get("T")])

    return extend


@pure("int.bmsk")
def bmsk(match: Match) -> Function:
    def mask(a: Any, b: Any) -> Any:
        start, count = (np.atleast_1d(x).astype(np.int64) for x in (a, b))
        if match.get("mode") == "wrap":
            start, count = start & 31, count & 31
        else:
            start, count = np.minimum(start, 32), np.minimum(count, 32)
        return (((np.int64(1) << count) - 1) << start).astype(np.uint32)

    return mask


@pure("int.dp4a", "int.dp2a")
def dot(match: Match) -> Function:
    """Products of bytes of b with bytes (dp4a) or halves (dp2a) of a, plus c."""
    wide_a = match.form.opcode == "dp2a"
    a_kind, b_kind = ("i" if match.get(x) == "s32" else "u" for x in "AB")

    def product(a: Any, b: Any, c: Any) -> Any:
        left = np.atleast_1d(a).view(f"{a_kind}{2 if wide_a else 1}")
        right = np.atleast_1d(b).view(f"{b_kind}1").reshape(-1, 4)
        if wide_a:
            right = right[:, 2:] if match.get("half") == "hi" else right[:, :2]
        left = left.reshape(-1, 2 if wide_a else 4)
        total = (left.astype(np.int64) * right.astype(np.int64)).sum(axis=1)
        result = (total + np.asarray(c).astype(np.int64)) & 0xFFFFFFFF
        return result.astype(np.uint32).view(DTYPES[match.get("B")])

    return product


@effect("carry.add", "carry.addc", "carry.sub", "carry.subc", "carry.mad", "carry.madc")
def carry(site: Site) -> Run:
    """Arithmetic with the condition code's carry; a subtraction leaves 1 where it borrows nothing.

    The ISA leaves the mixture of both open. nvcc's division of 128 bits reads with `addc` what
    `subc.cc` left, and is right with this choice.
    """
    opcode = site.match.form.opcode
    takes, gives = opcode.endswith("c"), "cc" in site.match.slots
    kind = site.word("T")
    unsigned = np.dtype(f"u{TYPES[kind].bits // 8}")
    is_mad = opcode.startswith("mad")
    gets = [getter(site, site.operand(n), kind) for n in (("a", "b", "c") if is_mad else "ab")]
    put = putter(site, site.operand("d"), kind)
    product = mul(site.match) if is_mad else None
    subtracts = opcode.startswith("sub")

    def run(g: Any) -> None:
        values = [get(g) for get in gets]
        if product is not None:
            values = [product(values[0], values[1]), values[2]]
        a, b = (np.broadcast_to(np.asarray(v).view(unsigned), (g.n,)) for v in values)
        flags = g.batch.state.setdefault("carry", np.zeros(g.batch.threads, np.bool_))
        bit = g.of(flags).astype(unsigned) if takes else unsigned.type(0)
        if subtracts:
            borrow = unsigned.type(1) - bit if takes else bit
            result = a - b - borrow
            out = (a > b) | ((a == b) & (borrow == 0))
        else:
            result = a + b + bit
            out = (result < a) | ((bit != 0) & (result == a))
        put(g, result.view(DTYPES[kind]))
        if gives:
            flags[g.threads()] = out

    return run
