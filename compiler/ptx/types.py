"""PTX's types as one table (PTX ISA, "Types"), and which of them fit together."""

from __future__ import annotations

from stagefuse.dsl.frozen import frozen


@frozen
class PtxType:
    """A type: `kind` is `bits`, `unsigned`, `signed`, `float`, `packed` or `pred`."""

    name: str
    kind: str
    bits: int
    prefix: str = ""
    """What names of its registers begin with, where registers can have it."""

    @property
    def size_bytes(self) -> int:
        return max(self.bits // 8, 1)

    def __str__(self) -> str:
        return self.name


def _types() -> dict[str, PtxType]:
    rows = [PtxType("pred", "pred", 1, "%p")]
    for bits, prefix in ((8, ""), (16, "%rs"), (32, "%r"), (64, "%rd"), (128, "%rq")):
        rows.append(PtxType(f"b{bits}", "bits", bits, prefix))
        if bits < 128:
            rows.append(PtxType(f"u{bits}", "unsigned", bits, prefix))
            rows.append(PtxType(f"s{bits}", "signed", bits, prefix))
    rows += [
        PtxType("f16", "float", 16, "%h"),
        PtxType("bf16", "float", 16, "%h"),
        PtxType("f32", "float", 32, "%f"),
        PtxType("f64", "float", 64, "%fd"),
        PtxType("tf32", "float", 32, "%r"),
        PtxType("e4m3", "float", 8),
        PtxType("e5m2", "float", 8),
        PtxType("f16x2", "packed", 32, "%r"),
        PtxType("bf16x2", "packed", 32, "%r"),
        PtxType("u16x2", "packed", 32, "%r"),
        PtxType("s16x2", "packed", 32, "%r"),
        PtxType("e4m3x2", "packed", 16, "%rs"),
        PtxType("e5m2x2", "packed", 16, "%rs"),
        PtxType("u4", "unsigned", 4),
        PtxType("s4", "signed", 4),
        PtxType("u2", "unsigned", 2),
        PtxType("s2", "signed", 2),
        PtxType("b1", "bits", 1),
    ]
    return {row.name: row for row in rows}


TYPES = _types()

STORED = ("pred", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "b128")
"""Types of registers, besides f32 and f64 and the small floats, which registers hold as bits."""

_REGISTER = {"f16": "b16", "bf16": "b16", "tf32": "b32", "e4m3x2": "b16", "e5m2x2": "b16"}


def register_type(name: str) -> str:
    """The type that a register for values of type `name` is declared with."""
    kind = TYPES[name]
    if name == "pred":
        return name
    if name in _REGISTER:
        return _REGISTER[name]
    return f"b{kind.bits}" if kind.kind == "packed" or kind.bits < 16 else name


def agrees(register: str, instruction: str) -> bool:
    """Whether a register of one type may stand where an instruction says another.

    PTX ISA, "Operand Type Checking": sizes are equal, and a type of bits agrees with every
    type of its size; signed and unsigned integers agree.
    """
    have, want = TYPES[register], TYPES[instruction]
    if "pred" in (have.name, want.name):
        return have is want
    if have.bits != want.bits:
        return False
    kinds = {have.kind, want.kind}
    if "float" not in kinds or len(kinds) == 1 and have.name == want.name:
        return True
    return bool(kinds & {"bits", "packed"}) or want.name == "tf32"
