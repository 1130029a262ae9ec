"""Products of matrices whose fragments have no stated layout (PTX ISA, "wmma")."""

from __future__ import annotations

from .record import Form

_SECTION = "Warp Level Matrix Instructions: wmma"
_CONVERGE = frozenset({"converge"})
_SHAPES = ("m16n16k16", "m8n32k16", "m32n8k16")
_SPACE = "global shared shared::cta"

_REGISTERS = {
    "f16": {"m16n16k16": (8, 8), "m8n32k16": (8, 8), "m32n8k16": (8, 8)},
    "bf16": {"m16n16k16": (4, 4), "m8n32k16": (2, 8), "m32n8k16": (8, 2)},
    "u8": {"m16n16k16": (2, 2), "m8n32k16": (1, 4), "m32n8k16": (4, 1)},
    "s8": {"m16n16k16": (2, 2), "m8n32k16": (1, 4), "m32n8k16": (4, 1)},
    "tf32": {"m16n16k8": (4, 4)},
    "f64": {"m8n8k4": (1, 1)},
}
"""Registers of a lane for A and for B, by type and shape."""

_SMALL = {"u4": "m8n8k32", "s4": "m8n8k32", "b1": "m8n8k128"}
"""Shapes of elements smaller than a byte: a lane holds 32 bits of A, of B, and two sums."""

_SINCE = {"f16": (70, (6, 1)), "bf16": (80, (7, 0)), "tf32": (80, (7, 0)), "u8": (72, (6, 3)),
          "s8": (72, (6, 3)), "f64": (80, (7, 0)), "u4": (75, (6, 3)), "s4": (75, (6, 3)),
          "b1": (75, (6, 3)), "and": (80, (7, 1)), "xor": (75, (7, 1))}  # fmt: skip
_RESULTS = {"f16": ("b32", 4), "f32": ("f32", 8), "s32": ("s32", 8), "f64": ("f64", 2)}


def _form(modifiers: str, operands: str, meaning: str, summary: str, of: str,
          effects: frozenset[str] = frozenset(), **choices: str) -> Form:  # fmt: skip
    target, version = _SINCE[of]
    return Form("wmma", modifiers, operands, f"wmma.{meaning}", _SECTION, choices, version, target,
                effects=_CONVERGE | effects, summary=summary)  # fmt: skip


def _loads(kind: str) -> tuple[Form, ...]:
    return tuple(
        _form(f"load {which} sync aligned layout {shape} ?space {kind}",
              f">d:{'f64' if kind == 'f64' else 'b32'}*{counts[at]} [p] stride:u32?", "load",
              f"the fragment of {which.upper()} from memory", kind, frozenset({"reads"}),
              layout="row col", space=_SPACE)
        for shape, counts in _REGISTERS[kind].items()
        for at, which in enumerate("ab")
    )  # fmt: skip


def _small() -> tuple[Form, ...]:
    """Loads and products of elements smaller than a byte: rows of A with columns of B."""
    product, of_bits = "a * b + c", "the number of ones of a and b joined bit by bit, plus c"
    operands = ">d:s32*2 a:b32*1 b:b32*1 c:s32*2"
    return (
        *(
            _form(f"load {which} sync aligned {layout} {shape} ?space {kind}",
                  ">d:b32*1 [p] stride:u32?", "load_small",
                  f"the fragment of {which.upper()} from memory", kind, frozenset({"reads"}),
                  space=_SPACE)
            for kind, shape in _SMALL.items()
            for which, layout in (("a", "row"), ("b", "col"))
        ),
        *_results("s32", "m8n8k32 m8n8k128", "u4", 2),
        *(
            _form(f"mma sync aligned row col {_SMALL[kind]} ?satfinite D A A D", operands, "mma",
                  product, kind, D="s32", A=kind)
            for kind in ("u4", "s4")
        ),
        *(
            _form(f"mma joined popc sync aligned row col {_SMALL['b1']} D A A D", operands, "mma",
                  of_bits, joined, D="s32", A="b1", joined=joined)
            for joined in ("xor", "and")
        ),
    )  # fmt: skip


def _results(kind: str, shapes: str, of: str, small: int = 0) -> tuple[Form, ...]:
    register, count = _RESULTS[kind]
    count = small or count
    return (
        _form(f"load c sync aligned layout S ?space {kind}",
              f">d:{register}*{count} [p] stride:u32?", "load", "the fragment of C from memory", of,
              frozenset({"reads"}), layout="row col", space=_SPACE, S=shapes),
        _form(f"store d sync aligned layout S ?space {kind}",
              f"[p] c:{register}*{count} stride:u32?", "store", "the fragment of D to memory", of,
              frozenset({"writes"}), layout="row col", space=_SPACE, S=shapes),
    )  # fmt: skip


def _products() -> tuple[Form, ...]:
    forms = []
    for shape in _SHAPES:
        for d in ("f16", "f32"):
            for c in ("f16", "f32"):
                (rd, nd), (rc, nc) = _RESULTS[d], _RESULTS[c]
                forms.append(
                    _form(f"mma sync aligned LA LB {shape} D C",
                          f">d:{rd}*{nd} a:b32*8 b:b32*8 c:{rc}*{nc}", "mma", "a * b + c", "f16",
                          LA="row col", LB="row col", D=d, C=c)
                )  # fmt: skip
    for kind, result in (("bf16", "f32"), ("tf32", "f32"), ("u8", "s32"), ("s8", "s32")):
        for shape, (na, nb) in _REGISTERS[kind].items():
            register, count = _RESULTS[result]
            sat = "?satfinite " if result == "s32" else ""
            forms.append(
                _form(f"mma sync aligned LA LB {shape} {sat}D A A D",
                      f">d:{register}*{count} a:b32*{na} b:b32*{nb} c:{register}*{count}", "mma",
                      "a * b + c", kind, LA="row col", LB="row col", D=result, A=kind)
            )  # fmt: skip
    return tuple(forms)


FORMS = (
    *(form for kind in _REGISTERS for form in _loads(kind)),
    *_results("f16", " ".join(_SHAPES), "f16"),
    *_results("f32", " ".join(_SHAPES), "f16"),
    *_results("f32", "m16n16k8", "tf32"),
    *_results("s32", " ".join(_SHAPES), "s8"),
    *_results("f64", "m8n8k4", "f64"),
    _form(
        "mma sync aligned LA LB m8n8k4 ?rnd D A A D",
        ">d:f64*2 a:f64*1 b:f64*1 c:f64*2",
        "mma",
        "a * b + c",
        "f64",
        LA="row col",
        LB="row col",
        D="f64",
        A="f64",
    ),
    *_products(),
    *_small(),
)
