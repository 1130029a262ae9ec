"""Arithmetic on the two halves or four bytes of a word (PTX ISA, "Video Instructions")."""

from __future__ import annotations

from .record import Form

_SECTION = "Video Instructions"
_WORDS = {"D": "u32 s32", "A": "u32 s32", "B": "u32 s32"}
_OPERATIONS = (
    ("vadd", "a + b"),
    ("vsub", "a - b"),
    ("vavrg", "the mean of a and b, rounded away from zero"),
    ("vabsdiff", "|a - b|"),
    ("vmin", "the smaller of a and b"),
    ("vmax", "the larger of a and b"),
)

FORMS = tuple(
    Form(f"{opcode}{parts}", modifiers, ">d:D a:A b:B c:D", "video.simd", _SECTION, _WORDS, (3, 0),
         30, summary=f"{text}, of each of {parts} parts{more}")
    for opcode, text in _OPERATIONS
    for parts in (2, 4)
    for modifiers, more in (("D A B ?sat", "; sat: clamped"), ("D A B add", ", summed up with c"))
)  # fmt: skip
