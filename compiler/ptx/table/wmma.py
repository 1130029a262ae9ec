"""The older interface to the tensor cores (PTX ISA, "Warp Level Matrix Instructions": wmma)."""

from __future__ import annotations

from .record import Form

_SECTION = "Warp Level Matrix Instructions: wmma"
_CONVERGE = frozenset({"converge"})
_COMMON = {"L": "row col", "M": "row col", "Q": "global shared shared::cta"}
_SHAPES = "m16n16k16 m8n32k16 m32n8k16"


def _wmma(modifiers: str, operands: str, summary: str, shapes: str = _SHAPES,
          version: tuple[int, int] = (6, 0), target: int = 70, **choices: str) -> Form:  # fmt: skip
    return Form("wmma", modifiers, operands, f"wmma.{modifiers.split()[0]}", _SECTION,
                _COMMON | {"P": shapes} | choices, version, target, effects=_CONVERGE,
                summary=summary)  # fmt: skip


def _load(operand: str, type_: str, count: int, shapes: str = _SHAPES, target: int = 70) -> Form:
    register = type_ if type_ in ("f32", "s32", "f64") else "b32"
    modifiers = f"load {operand} sync aligned L P ?Q {type_}"
    return _wmma(modifiers, f">d:{register}*{count} [p] s:u32?",
                 "a matrix from rows or columns, s apart", shapes, target=target)  # fmt: skip


_SQUARE, _SHORT, _TALL = "m16n16k16", "m8n32k16", "m32n8k16"

FORMS = (
    *(_load(o, "f16", 8) for o in "ab"),
    _load("c", "f16", 4),
    _load("c", "f32", 8),
    _load("c", "s32", 8, target=72),
    *(_load(o, "bf16", n, shape, 80)
      for o, shape, n in (("a", _SQUARE, 4), ("b", _SQUARE, 4), ("a", _SHORT, 2), ("b", _SHORT, 8),
                          ("a", _TALL, 8), ("b", _TALL, 2))),
    *(_load(o, t, n, shape, 72)
      for t in ("s8", "u8")
      for o, shape, n in (("a", _SQUARE, 2), ("b", _SQUARE, 2), ("a", _SHORT, 1), ("b", _SHORT, 4),
                          ("a", _TALL, 4), ("b", _TALL, 1))),
    *(_load(o, "tf32", 4, "m16n16k8", 80) for o in "ab"),
    _load("c", "f32", 8, "m16n16k8", 80),
    *(_load(o, "f64", n, "m8n8k4", 80) for o, n in (("a", 1), ("b", 1), ("c", 2))),
    _wmma("store d sync aligned L P ?Q f16", "[p] d:b32*4 s:u32?", "a matrix to rows or columns"),
    _wmma("store d sync aligned L P ?Q T", "[p] d:T*8 s:u32?", "a matrix to rows or columns",
          _SHAPES + " m16n16k8", T="f32 s32"),
    _wmma("store d sync aligned L P ?Q f64", "[p] d:f64*2 s:u32?", "a matrix to rows or columns",
          "m8n8k4", target=80),
    *(_wmma(f"mma sync aligned L M P {d} {c}",
            f">d:{_r}*{_n} a:b32*8 b:b32*8 c:{_s}*{_m}", "a * b + c, in f16 or f32")
      for d, _r, _n in (("f16", "b32", 4), ("f32", "f32", 8))
      for c, _s, _m in (("f16", "b32", 4), ("f32", "f32", 8))),
    *(_wmma("mma sync aligned L M P f32 bf16 bf16 f32", f">d:f32*8 a:b32*{a} b:b32*{b} c:f32*8",
            "a * b + c", shape, (7, 0), 80)
      for shape, a, b in ((_SQUARE, 4, 4), (_SHORT, 2, 8), (_TALL, 8, 2))),
    *(_wmma("mma sync aligned L M P s32 A A s32 ?satfinite",
            f">d:s32*8 a:b32*{a} b:b32*{b} c:s32*8", "a * b + c", shape, (6, 3), 72, A="s8 u8")
      for shape, a, b in ((_SQUARE, 2, 2), (_SHORT, 1, 4), (_TALL, 4, 1))),
    _wmma("mma sync aligned L M P f32 tf32 tf32 f32", ">d:f32*8 a:b32*4 b:b32*4 c:f32*8",
          "a * b + c", "m16n16k8", (7, 0), 80),
    _wmma("mma sync aligned L M P f64 f64 f64 f64", ">d:f64*2 a:f64*1 b:f64*1 c:f64*2",
          "a * b + c", "m8n8k4", (7, 0), 80),
)  # fmt: skip
