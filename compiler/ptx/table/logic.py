"""Bits, comparisons, selections, moves (PTX ISA, "Logic and Shift", "Comparison", "mov")."""

from __future__ import annotations

from .record import Form

_LOGIC = "Logic and Shift Instructions"
_COMPARE = "Comparison and Selection Instructions"
_MOVE = "Data Movement and Conversion Instructions"
_BITS = "b16 b32 b64"
_NUMBERS = "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64"
_CMP_HALF = "eq ne lt le gt ge equ neu ltu leu gtu geu num nan"

_RESULTS = (("u32 s32 f32", 0, (1, 0)), ("f16", 53, (4, 2)), ("bf16", 90, (7, 8)))
"""Types of `set`'s results, and since when there are such."""


def _logic(opcode: str, modifiers: str, operands: str, summary: str, target: int = 0,
           version: tuple[int, int] = (1, 0), **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, f"bits.{opcode}", _LOGIC, choices, version, target,
                summary=summary)  # fmt: skip


def _compare(opcode: str, modifiers: str, operands: str, summary: str, target: int = 0,
             version: tuple[int, int] = (1, 0), **choices: str) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, f"compare.{opcode}", _COMPARE, choices, version,
                target, summary=summary)  # fmt: skip


def _set(result: str, modifiers: str, operands: str, words: str, target: int = 0,
         version: tuple[int, int] = (1, 0), **choices: str) -> tuple[Form, ...]:  # fmt: skip
    """A comparison whose result is a number, alone and combined with a predicate."""
    head, rest = modifiers.split(" ", 1) if modifiers.startswith("?ftz") else ("", modifiers)
    text = "all ones or 1.0 where a and b compare so, else 0"
    return (
        _compare("set", f"C {modifiers}", f">d:{result} {operands}", text, target, version,
                 C=words, **choices),
        _compare("set", f"C bool {head} {rest}", f">d:{result} {operands} !c:pred",
                 f"{text}; after a logical operation with c", target, version, C=words, **choices),
    )  # fmt: skip


def _setp(types: str, words: str, target: int = 0, version: tuple[int, int] = (1, 0),
          ftz: str = "", result: str = ">d:pred|p") -> tuple[Form, ...]:  # fmt: skip
    return (
        _compare("setp", f"C {ftz}T", f"{result} a:T b:T", "whether a and b compare so; p: not so",
                 target, version, C=words, T=types),
        _compare("setp", f"C bool {ftz}T", f"{result} a:T b:T !c:pred",
                 "the comparison, then a logical operation with c", target, version,
                 C=words, T=types),
    )  # fmt: skip


FORMS = (
    *(
        _logic(op, "T", ">d:T a:T b:T", f"a {op} b, bit by bit", T=f"pred {_BITS}")
        for op in ("and", "or", "xor")
    ),
    _logic("not", "T", ">d:T a:T", "each bit inverted", T=f"pred {_BITS}"),
    _logic("cnot", "T", ">d:T a:T", "1 where a is 0, else 0", T=_BITS),
    _logic("lop3", "b32", ">d:b32 a:b32 b:b32 c:b32 #table:u32",
           "any function of three bits, by its table", 50, (4, 3)),
    _logic("lop3", "bool b32", ">d:b32|p a:b32 b:b32 c:b32 #table:u32 !q:pred",
           "lop3, and whether it is not 0, combined with q", 70, (8, 2), bool="and or"),
    _logic("shl", "T", ">d:T a:T b:u32", "a shifted left, by no more than its bits", T=_BITS),
    _logic("shr", "T", ">d:T a:T b:u32", "a shifted right, by no more than its bits",
           T=f"{_BITS} u16 u32 u64 s16 s32 s64"),
    _logic("shf", "side mode b32", ">d:b32 a:b32 b:b32 c:u32",
           "32 bits of the 64 of b and a, shifted", 32, (3, 1), side="l r", mode="wrap clamp"),
    *_setp("b16 b32 b64", "eq ne"),
    *_setp("u16 u32 u64", "eq ne lt le gt ge lo ls hi hs"),
    *_setp("s16 s32 s64", "eq ne lt le gt ge"),
    *_setp("f32", _CMP_HALF, ftz="?ftz "),
    *_setp("f64", _CMP_HALF),
    *_setp("f16", _CMP_HALF, 53, (4, 2), "?ftz ", ">d:pred"),
    *_setp("bf16", _CMP_HALF, 90, (7, 8), result=">d:pred"),
    *(
        _compare("setp", modifiers, f">d:pred|p a:{kind} b:{kind}{operand}",
                 "whether the low and the high halves compare so", target, version, C=_CMP_HALF)
        for kind, ftz, target, version in (("f16x2", "?ftz ", 53, (4, 2)), ("bf16x2", "", 90,
                                           (7, 8)))
        for modifiers, operand in ((f"C {ftz}{kind}", ""), (f"C bool {ftz}{kind}", " !c:pred"))
    ),
    *(
        form
        for comparisons, types in (
            ("eq ne", "b16 b32 b64"),
            ("eq ne lt le gt ge lo ls hi hs", "u16 u32 u64"),
            ("eq ne lt le gt ge", "s16 s32 s64"),
            (_CMP_HALF, "f64"),
        )
        for results, target, version in _RESULTS
        for form in _set("D", "D T", "a:T b:T", comparisons, target, version, D=results, T=types)
    ),
    *(
        form
        for results, target, version in _RESULTS
        for ftz in ("" if results == "bf16" else "?ftz ",)
        for form in _set("D", f"{ftz}D f32", "a:f32 b:f32", _CMP_HALF, target, version, D=results)
    ),
    *(
        form
        for kind, ftz, target, version in (("f16", "?ftz ", 53, (4, 2)), ("bf16", "", 90, (7, 8)))
        for each, others in ((kind, "u16 s16 u32 s32"), (f"{kind}x2", "u32 s32"))
        for form in _set("D", f"{ftz}D {each}", f"a:{each} b:{each}", _CMP_HALF, target, version,
                         D=f"{each} {others}")
    ),
    _compare("selp", "T", ">d:T a:T b:T p:pred", "a where p, else b", T=_NUMBERS),
    _compare("slct", "T s32", ">d:T a:T b:T c:s32", "a where c >= 0, else b", T=_NUMBERS),
    _compare("slct", "?ftz T f32", ">d:T a:T b:T c:f32", "a where c >= 0, else b", T=_NUMBERS),
    Form("mov", "T", ">d:T a:T", "move.mov", _MOVE,
         {"T": "pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64"},
         summary="a, or the address of a variable or function"),
    Form("mov", "b128", ">d:b128 a:b128", "move.mov", _MOVE, {}, (8, 3), 70, summary="a"),
    *(
        Form("mov", "vec T", ">d:T*vec~ a:T*vec", "move.vector", _MOVE, {"vec": vec, "T": types},
             summary="the elements of a, such as those of `%tid`")
        for vec, types in (("v2 v4", "b16 b32 u16 u32 s16 s32 f32"), ("v2", "b64 u64 s64 f64"))
    ),
    Form("mov", "T", ">d:T a:any*N", "move.pack", _MOVE, {"T": "b16 b32 b64"},
         summary="elements joined, the first one lowest"),
    Form("mov", "T", ">d:any*N a:T", "move.unpack", _MOVE, {"T": "b16 b32 b64"},
         summary="a taken apart, the lowest bits first"),
    Form("mov", "b128", ">d:b128 a:b64*2", "move.pack", _MOVE, {}, (8, 3), 70,
         summary="elements joined, the first one lowest"),
    Form("mov", "b128", ">d:b64*2 a:b128", "move.unpack", _MOVE, {}, (8, 3), 70,
         summary="a taken apart, the lowest bits first"),
    Form("prmt", "b32 ?mode", ">d:b32 a:b32 b:b32 c:b32", "bits.prmt", _MOVE,
         {"mode": "f4e b4e rc8 ecl ecr rc16"}, (2, 0),
         summary="four of the eight bytes of b and a, by the digits of c"),
)  # fmt: skip
