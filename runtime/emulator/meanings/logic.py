"""Bits, comparisons, selections and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.compiler.ptx.table import Match
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator import floats as fl
from stagefuse.runtime.emulator.operands import elements, getter, putter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.values import DTYPES

from . import effect, pure

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Function = Callable[..., Any]


@pure("bits.and", "bits.or", "bits.xor", "bits.not")
def bitwise(match: Match) -> Function:
    return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "not": np.invert}[match.form.opcode]  # fmt: skip


@pure("bits.cnot")
def cnot(match: Match) -> Function:
    return lambda a: (a == 0).astype(DTYPES[match.get("T")])


def _lookup(a: Any, b: Any, c: Any, table: int) -> Any:
    """PTX ISA, "lop3": bit i of the table is the result for a, b, c as the bits of i."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if table >> i & 1:
            parts = [x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (parts[0] & parts[1] & parts[2])
    return result


_COMMON = {
    0x80: lambda a, b, c: a & b & c, 0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c, 0xC0: lambda a, b, c: a & b, 0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b, 0xF8: lambda a, b, c: a | (b & c),
    0xEA: lambda a, b, c: (a & b) | c, 0xE2: lambda a, b, c: (a & b) | (c & ~b),
    0xCA: lambda a, b, c: (a & b) | (~a & c), 0x78: lambda a, b, c: a ^ (b & c),
    0x6A: lambda a, b, c: (a & b) ^ c,
}  # fmt: skip
"""Tables that compilers emit all the time."""


@pure("bits.lop3")
def lop3(match: Match) -> Function:
    def run(a: Any, b: Any, c: Any, table: Any) -> Any:
        known = _COMMON.get(int(table))
        return known(a, b, c) if known else _lookup(a, b, c, int(table))

    if "bool" not in match:
        return run
    op: Function = np.logical_or if match.get("bool") == "or" else np.logical_and

    def with_predicate(a: Any, b: Any, c: Any, table: Any, q: Any) -> Any:
        result = run(a, b, c, table)
        return result, op(result != 0, q)

    return with_predicate


def _shift(match: Match, left: bool) -> Function:
    """Amounts beyond the width give 0, or the sign."""
    kind = TYPES[match.get("T")]
    dtype = DTYPES[kind.name]
    op: Function = np.left_shift if left else np.right_shift
    bits = kind.bits

    def run(a: Any, b: Any) -> Any:
        if not getattr(b, "ndim", 0):
            amount = int(b)
            if amount < bits:
                return op(a, dtype.type(amount))
            if kind.kind == "signed" and not left:
                return op(a, dtype.type(bits - 1))
            return np.zeros_like(a)
        if kind.kind == "signed" and not left:
            return op(a, np.minimum(b, bits - 1).astype(dtype))
        shifted = op(a, np.minimum(b, bits - 1).astype(dtype))
        return np.where(b >= bits, dtype.type(0), shifted)

    return run


@pure("bits.shl")
def shl(match: Match) -> Function:
    return _shift(match, True)


@pure("bits.shr")
def shr(match: Match) -> Function:
    return _shift(match, False)


@pure("bits.shf")
def shf(match: Match) -> Function:
    """The funnel shift: `l` gives the upper word of b:a shifted left, `r` the lower one right."""

    def run(a: Any, b: Any, c: Any) -> Any:
        n = np.asarray(c).astype(np.uint64)
        n = n & np.uint64(31) if match.get("mode") == "wrap" else np.minimum(n, np.uint64(32))
        wide = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        if match.get("side") == "l":
            return ((wide << n) >> np.uint64(32)).astype(np.uint32)
        return (wide >> n).astype(np.uint32)

    return run


@pure("bits.prmt")
def prmt(match: Match) -> Function:
    """PTX ISA, "prmt": each digit of c picks a byte; its top bit spreads the byte's sign."""
    mode = match.get("mode")

    def run(a: Any, b: Any, c: Any) -> Any:
        a, b, c = np.broadcast_arrays(*map(np.atleast_1d, (a, b, c)))
        pool = np.concatenate(
            [np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4) for x in (a, b)], axis=1
        )
        picks = np.stack([_pick(mode, c, i) for i in range(4)], axis=1)
        found = np.take_along_axis(pool, (picks & 7).astype(np.intp), axis=1)
        spread = (found.view(np.int8) >> 7).view(np.uint8)
        found = np.where(picks & 8, spread, found)
        return np.ascontiguousarray(found).view(np.uint32).reshape(-1)

    return run


def _pick(mode: str, c: Any, i: int) -> Any:
    s = c & 3
    table: dict[str, Function] = {
        "": lambda: (c >> np.uint32(4 * i)) & 15,
        "f4e": lambda: s + i,
        "b4e": lambda: (s - i) & 7,
        "rc8": lambda: s,
        "ecl": lambda: np.maximum(s, i),
        "ecr": lambda: np.minimum(s, i),
        "rc16": lambda: (s & 1) * 2 + (i & 1),
    }
    return table[mode]()


# comparisons

_SIGNED: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def comparison(word: str, kind: str) -> Function:
    """A comparison of values of a type; of floats, NaN is unordered."""
    if TYPES[kind].kind in ("float", "packed"):
        if word == "num":
            return lambda a, b: ~(np.isnan(a) | np.isnan(b))
        if word == "nan":
            return lambda a, b: np.isnan(a) | np.isnan(b)
        if word.endswith("u"):
            base = _SIGNED[word[:-1]]
            return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)
        if word == "ne":  # ordered, where NumPy's is not
            return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _SIGNED[word]


def _floats_of(kind: str, x: Any, ftz: bool) -> Any:
    if kind.startswith("bf16"):
        return fl.from_bf16(np.ascontiguousarray(np.atleast_1d(x)).view(fl.U16))
    if kind == "f16x2":
        x = np.ascontiguousarray(np.atleast_1d(x)).view(fl.F16)
    return fl.flush(x) if ftz else x


_BOOL: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@pure("compare.setp")
def setp(match: Match) -> Function:
    kind = match.get("T") or next(k for k in ("f16x2", "bf16x2") if k in match)
    test, ftz = comparison(match.get("C"), kind), "ftz" in match
    is_float = TYPES[kind].kind in ("float", "packed")
    join = _BOOL.get(match.get("bool"))
    paired = match.form.specs[0].paired

    def compare(a: Any, b: Any) -> Any:
        if is_float:
            a, b = _floats_of(kind, a, ftz), _floats_of(kind, b, ftz)
        return test(a, b)

    if kind.endswith("x2"):

        def both(a: Any, b: Any, c: Any = None) -> Any:
            result = compare(*np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b)))
            low, high = np.ascontiguousarray(result[0::2]), np.ascontiguousarray(result[1::2])
            return (low, high) if join is None else (join(low, c), join(high, c))

        return both

    def run(a: Any, b: Any, c: Any = None) -> Any:
        result = compare(a, b)
        if join is None:
            return (result, ~result) if paired else result
        return (join(result, c), join(~result, c)) if paired else join(result, c)

    return run


@pure("compare.set")
def set_(match: Match) -> Function:
    to, kind = match.get("D"), match.get("T") or match.form.slots[-1].name
    test, ftz = comparison(match.get("C"), kind), "ftz" in match
    is_float = TYPES[kind].kind in ("float", "packed")
    join, per = _BOOL.get(match.get("bool")), 2 if kind.endswith("x2") else 1
    held_as = np.dtype(np.uint16) if per == 2 else DTYPES[to]
    ones = {"f16": 0x3C00, "bf16": 0x3F80}.get(to.removesuffix("x2"))

    def run(a: Any, b: Any, c: Any = None) -> Any:
        a, b = np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b))
        if is_float:
            a, b = _floats_of(kind, a, ftz), _floats_of(kind, b, ftz)
        held = test(a, b)
        if join is not None:
            held = join(held, np.repeat(np.broadcast_to(c, len(held) // per), per))
        if to == "f32":
            return held.astype(np.float32)
        true = ones if ones is not None else (1 << 8 * held_as.itemsize) - 1
        raw = np.where(held, true, 0).astype(f"u{held_as.itemsize}")
        return raw.view(DTYPES[to])

    return run


@pure("compare.selp")
def selp(match: Match) -> Function:
    return lambda a, b, p: np.where(p, a, b)


@pure("compare.slct")
def slct(match: Match) -> Function:
    ftz = "ftz" in match
    return lambda a, b, c: np.where((fl.flush(c) if ftz else c) >= 0, a, b)


# moves


@pure("move.mov")
def mov(match: Match) -> Function:
    return lambda a: a.copy()


@pure("move.pack")
def pack(match: Match) -> Function:
    """Elements joined, the first one lowest."""
    kind = match.get("T") or "b128"
    dtype = DTYPES[kind]

    def join(parts: list[Any]) -> Any:
        columns = np.stack(np.broadcast_arrays(*map(np.atleast_1d, parts)), axis=1)
        return np.ascontiguousarray(columns).view(dtype).reshape(-1)

    return join


@effect("move.vector")
def vector(site: Site) -> Run:
    """Several values, all read before the first is written."""
    kind = site.word("T")
    gets = [getter(site, x, kind) for x in elements(site.operand("a"))]
    puts = [putter(site, x, kind) for x in elements(site.operand("d"))]

    def run(g: Group) -> None:
        values = [np.array(get(g)) for get in gets]
        for put, value in zip(puts, values, strict=True):
            put(g, value)

    return run


@effect("move.unpack")
def unpack(site: Site) -> Run:
    """A value taken apart, the lowest bits first."""
    kind = site.word("T") or "b128"
    parts = elements(site.operand("d"))
    part = f"b{TYPES[kind].bits // len(parts)}"
    get = getter(site, site.operand("a"), kind)
    puts = [putter(site, x, part) for x in parts]
    dtype = DTYPES[part]

    def run(g: Group) -> None:
        values = np.broadcast_to(get(g), (g.n,))
        columns = np.ascontiguousarray(values).view(dtype).reshape(g.n, len(puts))
        for i, put in enumerate(puts):
            put(g, columns[:, i].copy())

    return run
