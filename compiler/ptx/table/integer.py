"""Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions" and "Extended-Precision")."""

from __future__ import annotations

from .record import Form

_ALL = {"T": "u16 u32 u64 s16 s32 s64"}
_SECTION = "Integer Arithmetic Instructions"
_CARRY = "Extended-Precision Integer Arithmetic Instructions"


def _form(
    opcode: str, modifiers: str, operands: str, summary: str, meaning: str = "", **rest: str
) -> Form:
    return Form(opcode, modifiers, operands, meaning or f"int.{opcode}", _SECTION, rest,
                summary=summary)  # fmt: skip


def _two(opcode: str, summary: str, **choices: str) -> Form:
    return _form(opcode, "T", ">d:T a:T b:T", summary, **(choices or _ALL))


FORMS = (
    _two("add", "a + b, modulo 2^n"),
    _form("add", "sat s32", ">d:s32 a:s32 b:s32", "a + b, clamped to the range of s32"),
    _two("sub", "a - b, modulo 2^n"),
    _form("sub", "sat s32", ">d:s32 a:s32 b:s32", "a - b, clamped to the range of s32"),
    Form("add", "T", ">d:T a:T b:T", "int.add", _SECTION, {"T": "u16x2 s16x2"}, (8, 0), 90,
         summary="a + b of each half, modulo 2^16"),
    _form("mul", "half T", ">d:T a:T b:T", "the low or high half of a * b", **_ALL),
    _form("mul", "wide T", ">d:wide(T) a:T b:T", "a * b, all of it", T="u16 u32 s16 s32"),
    _form("mad", "half T", ">d:T a:T b:T c:T", "the low or high half of a * b, plus c", **_ALL),
    _form("mad", "hi sat s32", ">d:s32 a:s32 b:s32 c:s32",
          "the high half of a * b, plus c, clamped", meaning="int.mad"),
    _form("mad", "wide T", ">d:wide(T) a:T b:T c:wide(T)", "a * b + c, in twice the bits",
          T="u16 u32 s16 s32"),
    _form("mul24", "half T", ">d:T a:T b:T", "32 bits of the 48 of a 24-bit product",
          T="u32 s32"),
    _form("mad24", "half T", ">d:T a:T b:T c:T", "mul24 plus c", T="u32 s32"),
    _form("mad24", "half sat T", ">d:T a:T b:T c:T", "mul24 plus c, clamped", half="hi", T="s32"),
    _form("sad", "T", ">d:T a:T b:T c:T", "c + |a - b|", **_ALL),
    _two("div", "a / b, towards zero; by zero all ones"),
    _two("rem", "the remainder of div; by zero a"),
    _form("abs", "T", ">d:T a:T", "|a|", T="s16 s32 s64"),
    _form("neg", "T", ">d:T a:T", "-a", T="s16 s32 s64"),
    _two("min", "the smaller of a and b"),
    _two("max", "the larger of a and b"),
    *(
        Form(op, "?relu T", ">d:T a:T b:T", f"int.{op}", _SECTION, {"T": "s16x2 s32"}, (8, 0), 90,
             summary=f"the {word} of a and b, with relu at least 0")
        for op, word in (("min", "smaller"), ("max", "larger"))
    ),
    *(
        Form(op, "u16x2", ">d:u16x2 a:u16x2 b:u16x2", f"int.{op}", _SECTION, {}, (8, 0), 90,
             summary=f"the {word} of a and b, of each half")
        for op, word in (("min", "smaller"), ("max", "larger"))
    ),
    _form("popc", "T", ">d:u32 a:T", "the number of bits that are 1", T="b32 b64"),
    _form("clz", "T", ">d:u32 a:T", "the number of leading zeros", T="b32 b64"),
    _form("bfind", "?shiftamt T", ">d:u32 a:T",
          "the highest bit that differs from the sign, or 2^32 - 1", T="u32 u64 s32 s64"),
    Form("fns", "b32", ">d:b32 a:b32 b:b32 c:s32", "int.fns", _SECTION, {}, (6, 0), 30,
         summary="where the c-th bit that is 1 lies, from bit b on; 2^32 - 1 for none"),
    _form("brev", "T", ">d:T a:T", "the bits in reverse order", T="b32 b64"),
    _form("bfe", "T", ">d:T a:T b:u32 c:u32", "c bits of a from bit b on", T="u32 u64 s32 s64"),
    _form("bfi", "T", ">d:T a:T b:T c:u32 e:u32", "b with e bits at c replaced by those of a",
          T="b32 b64"),
    _form("szext", "mode T", ">d:T a:T b:u32", "a of b bits, extended", mode="clamp wrap",
          T="u32 s32"),
    _form("bmsk", "mode b32", ">d:b32 a:b32 b:b32", "b ones from bit a on", mode="clamp wrap"),
    _form("dp4a", "A B", ">d:B a:b32 b:b32 c:B", "c plus the sum of products of four bytes",
          A="u32 s32", B="u32 s32"),
    _form("dp2a", "half A B", ">d:B a:b32 b:b32 c:B",
          "c plus the sum of products of two halves with two bytes", A="u32 s32", B="u32 s32"),
    *(
        Form(op, mods, ">d:T a:T b:T", f"carry.{op}", _CARRY, {"T": "u32 s32 u64 s64"},
             (4, 3), summary=text)
        for op, mods, text in (
            ("add", "cc T", "a + b; the carry is kept"),
            ("addc", "?cc T", "a + b + carry"),
            ("sub", "cc T", "a - b; the borrow is kept"),
            ("subc", "?cc T", "a - b - borrow"),
        )
    ),
    *(
        Form(op, mods, ">d:T a:T b:T c:T", f"carry.{op}", _CARRY, {"T": "u32 s32 u64 s64"},
             (4, 3), 20, summary=text)
        for op, mods, text in (
            ("mad", "half cc T", "a half of a * b, plus c; the carry is kept"),
            ("madc", "half ?cc T", "a half of a * b, plus c, plus carry"),
        )
    ),
)  # fmt: skip
