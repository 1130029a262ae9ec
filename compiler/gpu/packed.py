"""Adjacent elements of 8 or 16 bits in words of 32: there are no vectors of more than four."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.dtypes import DType

from . import scalars
from .ir import Code, Value

MOST = 4
"""Elements that one access has as they are."""


def is_packed(dtype: DType, count: int) -> bool:
    """Whether an access of so many adjacent elements is one of words."""
    pairs = scalars.RAW[dtype.name] == "half" and count > 1
    return pairs or (dtype.itemsize < 4 and count > MOST)


def unpacked(code: Code, words: Sequence[Value], dtype: DType) -> tuple[Value, ...]:
    """The elements in words, the low bits first, as a load of each alone would give them.

    Those of bf16 stay in the upper half of a word, which is their f32.
    """
    raw = scalars.RAW[dtype.name]
    if dtype.name == "bf16":
        return tuple(w for low in words for w in (low.shl(16), low & ~0xFFFF))
    if raw == "half":
        halves = tuple(code.fresh(raw) for _ in range(2 * len(words)))
        for n, word in enumerate(words):
            code.write("mov.b32", f"{{{halves[2 * n].text}, {halves[2 * n + 1].text}}}", word)
        return halves
    bits = dtype.bits
    places = [(word, n) for word in words for n in range(0, 32, bits)]
    if scalars.ACCESS[dtype.name][0] == "s":
        found = [word.shl(32 - bits - n).ashr(32 - bits) for word, n in places]
        code.fields.note_signed(found, places, bits)
    else:
        found = [code.fields.part(word, n, (1 << bits) - 1) for word, n in places]
    return tuple(Value(code, v.text, raw, v.depth) for v in found)


def packed(code: Code, raw: Sequence[Value], dtype: DType) -> list[Value]:
    """Elements as stores of each alone would write them, in words."""
    if raw[0].type == "half":
        words = [code.fresh("i32") for _ in raw[::2]]
        for n, word in enumerate(words):
            code.write("mov.b32", word, f"{{{raw[2 * n].text}, {raw[2 * n + 1].text}}}")
        return words
    each = 32 // dtype.bits
    if are_clamped(code, raw, dtype):
        wide = [code.clamped[v.text] for v in raw]
        return [_clamped(code, wide[n : n + each]) for n in range(0, len(wide), each)]
    found = []
    for first in range(0, len(raw), each):
        word = code.const(0, "i32")
        for n, value in enumerate(raw[first : first + each]):
            part = Value(code, value.text, "i32", value.depth) & ((1 << dtype.bits) - 1)
            word = word | part.shl(n * dtype.bits)
        found.append(word)
    return found


def are_clamped(code: Code, raw: Sequence[Value], dtype: DType) -> bool:
    """Whether elements are whole words of integers that are clamped to i8."""
    return dtype.name == "i8" and len(raw) % 4 == 0 and all(v.text in code.clamped for v in raw)


def _clamped(code: Code, values: Sequence[Value]) -> Value:
    """A word of four integers clamped to i8, the first in the lowest byte (PTX ISA 9.7.9.22,
    "cvt.pack": two of them below the lower half of a word)."""
    a, b, c, d = values
    form = "cvt.pack.sat.s8.s32.b32"
    upper = code.pure(form, "i32", d, c, code.const(0, "i32"))
    return code.pure(form, "i32", b, a, upper)


def suffix(count: int) -> str:
    """What an instruction that moves so many registers is called by."""
    return "" if count == 1 else f".v{count}"


def listed(values: Sequence[Value]) -> str:
    """Registers as such an instruction has them."""
    texts = ", ".join(v.text for v in values)
    return texts if len(values) == 1 else f"{{{texts}}}"
