"""Arithmetic on words, and on the two halves or four bytes of one, with a second operation after
it (PTX ISA, "Video Instructions"). Operands with selected parts, such as `a.b0`, are not here."""

from __future__ import annotations

from .record import Form

_SECTION = "Video Instructions"
_WORDS = {
    "D": "u32 s32", "A": "u32 s32", "B": "u32 s32", "op2": "add min max",
    "V": "eq ne lt le gt ge", "mode": "clamp wrap", "scale": "shr7 shr15",
}  # fmt: skip
_SCALAR = (
    ("vadd", "a + b"),
    ("vsub", "a - b"),
    ("vabsdiff", "|a - b|"),
    ("vmin", "the smaller of a and b"),
    ("vmax", "the larger of a and b"),
)
_OPERATIONS = (*_SCALAR, ("vavrg", "the mean of a and b, rounded away from zero"))


def _form(opcode: str, modifiers: str, operands: str, meaning: str, summary: str) -> Form:
    version, target = ((3, 0), 30) if opcode[-1] in "24" else ((2, 0), 20)
    return Form(opcode, modifiers, operands, f"video.{meaning}", _SECTION, _WORDS, version, target,
                summary=summary)  # fmt: skip


_SHIFTS = (("vshl", "a << b"), ("vshr", "a >> b"))
_THEN = "; then its sum with c, or the smaller or larger of both"
FORMS = (
    *(
        _form(f"{opcode}{parts}", modifiers, ">d:D a:A b:B c:D", "simd",
              f"{text}, of each of {parts} parts{more}")
        for opcode, text in _OPERATIONS
        for parts in (2, 4)
        for modifiers, more in (
            ("D A B ?sat", "; sat: clamped"), ("D A B add", ", summed up with c")
        )
    ),
    *(
        _form(f"vset{parts}", f"A B V{add}", ">d:u32 a:A b:B c:u32", "simd",
              f"whether a and b compare so, of each of {parts} parts{more}")
        for parts in (2, 4)
        for add, more in (("", ""), (" add", ", counted and added to c"))
    ),
    *(
        _form(opcode, f"D A B ?sat{then}", f">d:D a:A b:B{c}", "scalar", f"{text}{more}")
        for opcode, text in _SCALAR
        for then, c, more in (("", "", "; sat: clamped"), (" op2", " c:D", _THEN))
    ),
    *(
        _form(opcode, f"D A u32 ?sat mode{then}", f">d:D a:A b:u32{c}", "scalar", f"{text}{more}")
        for opcode, text in _SHIFTS
        for then, c, more in (("", "", ""), (" op2", " c:D", _THEN))
    ),
    *(
        _form("vset", f"A B V{then}", f">d:u32 a:A b:B{c}", "scalar",
              f"whether a and b compare so{more}")
        for then, c, more in (("", "", ""), (" op2", " c:u32", _THEN))
    ),
    _form("vmad", "D A B ?sat ?scale", ">d:D a:A b:B c:D", "mad",
          "a * b + c, shifted right by scale; sat: clamped"),
    _form("vmad", "D A B po ?sat ?scale", ">d:D a:A b:B c:D", "mad", "a * b + c + 1"),
)  # fmt: skip
