"""Conversions (PTX ISA, "Data Movement and Conversion Instructions: cvt")."""

from __future__ import annotations

from .record import Form

_SECTION = "Data Movement and Conversion Instructions: cvt"
_INT = "u8 u16 u32 u64 s8 s16 s32 s64"
_WIDE = "u16 u32 u64 s16 s32 s64"


def _cvt(modifiers: str, operands: str, summary: str, target: int = 0,
         version: tuple[int, int] = (1, 0), meaning: str = "convert.cvt",
         **choices: str) -> Form:  # fmt: skip
    return Form("cvt", modifiers, operands, meaning, _SECTION, choices, version, target,
                summary=summary)  # fmt: skip


def _beyond(name: str) -> str:
    """The integer types some of whose values do not fit into this one."""

    def fits(a: str) -> bool:
        bits, to = int(a[1:]), int(name[1:])
        return a[0] == name[0] and bits <= to or a[0] == "u" and name[0] == "s" and bits < to

    return " ".join(a for a in _INT.split() if not fits(a))


_ONE, _PACK = ">d:D~ a:A~", ">d:D a:f32 b:f32"

FORMS = (
    _cvt("D A", _ONE, "integer to integer, cut or extended", D=_INT, A=_INT),
    *(
        _cvt(f"sat {to} A", f">d:{to}~ a:A~", "integer to integer, clamped", A=_beyond(to))
        for to in _INT.split()
    ),
    _cvt("irnd ?sat D A", _ONE, "float to integer, clamped to its range; NaN is 0",
         D=_INT, A="f16 f64"),
    _cvt("irnd ?ftz ?sat D f32", _ONE.replace("A", "f32"),
         "float to integer, clamped to its range; NaN is 0", D=_INT),
    _cvt("irnd D A", _ONE, "float to integer, clamped to its range; NaN is 0", 90, (7, 8),
         D=_WIDE, A="bf16"),
    _cvt("rnd ?sat D A", _ONE, "integer to float", D="f16 f64", A=_INT),
    _cvt("rnd ?ftz ?sat f32 A", ">d:f32 a:A~", "integer to float", A=_INT),
    _cvt("rnd D A", _ONE, "integer to float", 90, (7, 8), D="bf16", A=_WIDE),
    _cvt("irnd ?sat D D", _ONE.replace("A", "D"), "the nearest integral float", D="f16 f64"),
    _cvt("irnd ?ftz ?sat f32 f32", ">d:f32 a:f32", "the nearest integral float"),
    _cvt("rnd ?ftz ?sat D f32", ">d:D~ a:f32", "float to a narrower float", D="f16"),
    _cvt("rnd ?sat D f64", ">d:D~ a:f64", "float to a narrower float", D="f16"),
    _cvt("rnd ?ftz ?sat f32 f64", ">d:f32 a:f64", "float to a narrower float"),
    _cvt("?sat D D", _ONE.replace("A", "D"), "the same float", D="f16 f64"),
    _cvt("?ftz ?sat f32 f32", ">d:f32 a:f32", "the same float"),
    _cvt("?ftz ?sat f32 f16", ">d:f32 a:f16~", "float to a wider float"),
    _cvt("?sat f64 f16", ">d:f64 a:f16~", "float to a wider float"),
    _cvt("?ftz ?sat f64 f32", ">d:f64 a:f32", "float to a wider float"),
    _cvt("R ?relu D f32", ">d:D~ a:f32", "f32 to a 16-bit float", 80, (7, 0), R="rn rz",
         D="f16 bf16"),
    _cvt("R bf16 f32", ">d:bf16~ a:f32", "f32 to bf16", 80, (7, 0), R="rm rp"),
    _cvt("R ?relu ?satfinite D f32", ">d:D~ a:f32", "f32 to a 16-bit float, clamped", 80, (8, 1),
         R="rn rz", D="f16 bf16"),
    _cvt("f32 bf16", ">d:f32 a:bf16", "bf16 to f32", 80, (7, 1)),
    _cvt("ftz f32 bf16", ">d:f32 a:bf16", "bf16 to f32", 90, (7, 8)),
    _cvt("rnd f32 bf16", ">d:f32 a:bf16", "bf16 to f32", 80, (7, 1)),
    _cvt("rnd ftz f32 bf16", ">d:f32 a:bf16", "bf16 to f32", 90, (7, 8)),
    _cvt("rnd f64 bf16", ">d:f64 a:bf16", "bf16 to f64", 90, (7, 8)),
    _cvt("?rnd f16 bf16", ">d:f16~ a:bf16", "bf16 to f16", 90, (7, 8)),
    _cvt("?rnd bf16 f16", ">d:bf16~ a:f16~", "f16 to bf16", 90, (7, 8)),
    _cvt("rnd bf16 f64", ">d:bf16~ a:f64~", "f64 to bf16", 90, (7, 8)),
    _cvt("irnd bf16 bf16", ">d:bf16~ a:bf16~", "the nearest integral float", 90, (7, 8)),
    _cvt("bf16 bf16", ">d:bf16~ a:bf16~", "the same float", 90, (7, 8)),
    _cvt("f64 bf16", ">d:f64 a:bf16", "bf16 to f64", 90, (7, 8)),
    _cvt("R ?relu D f32", _PACK, "a to the high half, b to the low half", 80, (7, 0), R="rn rz",
         D="f16x2 bf16x2"),
    _cvt("R ?relu ?satfinite D f32", _PACK, "a to the high half, b to the low half, clamped", 80,
         (8, 1), R="rn rz", D="f16x2 bf16x2"),
    _cvt("rna tf32 f32", ">d:b32 a:f32", "f32 to tf32, ties away from zero", 80, (7, 0)),
    _cvt("rna satfinite tf32 f32", ">d:b32 a:f32", "f32 to tf32, ties away from zero, clamped", 80,
         (8, 1)),
    _cvt("R ?relu tf32 f32", ">d:b32 a:f32", "f32 to tf32", 90, (7, 8), R="rn rz"),
    _cvt("rn satfinite ?relu D f32", _PACK, "a to the high byte, b to the low byte", 89, (8, 1),
         D="e4m3x2 e5m2x2"),
    _cvt("rn satfinite ?relu D f16x2", ">d:D a:f16x2", "two f16 to two 8-bit floats", 89, (8, 1),
         D="e4m3x2 e5m2x2"),
    _cvt("rn ?relu f16x2 A", ">d:f16x2 a:A", "two 8-bit floats to two f16", 89, (8, 1),
         A="e4m3x2 e5m2x2"),
    _cvt("pack sat D s32", ">d:b32 a:s32 b:s32", "a high, b low, each clamped", 72, (6, 5),
         "convert.pack", D="u16 s16"),
    _cvt("pack sat D s32 b32", ">d:b32 a:s32 b:s32 c:b32",
         "a and b clamped to bytes, below the lower half of c", 72, (6, 5), "convert.pack",
         D="u8 s8"),
    _cvt("pack sat D s32 b32", ">d:b32 a:s32 b:s32 c:b32",
         "a and b clamped to a few bits, below the rest of c", 75, (6, 5), "convert.pack",
         D="u4 s4 u2 s2"),
)  # fmt: skip
