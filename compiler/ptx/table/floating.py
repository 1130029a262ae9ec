"""Floating-point arithmetic (PTX ISA, "Floating-Point Instructions", "Half Precision")."""

from __future__ import annotations

from .record import Form

_SECTION = "Floating-Point Instructions"
_HALF = "Half Precision Floating-Point Instructions"
_TWO, _THREE = ">d:T a:T b:T", ">d:T a:T b:T c:T"


def _form(
    opcode: str, modifiers: str, operands: str, summary: str, target: int = 0,
    version: tuple[int, int] = (1, 0), section: str = _SECTION, **choices: str,
) -> Form:  # fmt: skip
    return Form(opcode, modifiers, operands, f"float.{opcode}", section, choices, version, target,
                summary=summary)  # fmt: skip


def _f32_f64(opcode: str, operands: str, summary: str, required: bool = False) -> tuple[Form, ...]:
    rnd = "rnd" if required else "?rnd"
    return (
        _form(opcode, f"{rnd} ?ftz ?sat T", operands, summary, T="f32"),
        _form(opcode, f"{rnd} T", operands, summary, T="f64"),
    )


def _half(opcode: str, modifiers: str, operands: str, summary: str, f16: int, bf16: int,
          ftz: str = "?ftz ") -> tuple[Form, ...]:  # fmt: skip
    """A form of f16 and one of bf16, which has no ftz, each single and of two halves."""
    bare = modifiers.replace("?ftz ", "").replace("?sat ", "")
    since = {53: (4, 2), 80: (7, 0), 86: (7, 2), 90: (7, 8)}
    return (
        _form(opcode, modifiers, operands, summary, f16, since[f16], _HALF, T="f16 f16x2"),
        _form(opcode, bare, operands, summary, bf16, since[bf16], _HALF, T="bf16 bf16x2"),
    )  # fmt: skip


FORMS = (
    *_f32_f64("add", _TWO, "a + b"),
    *_f32_f64("sub", _TWO, "a - b"),
    *_f32_f64("mul", _TWO, "a * b"),
    *_f32_f64("fma", _THREE, "a * b + c, rounded once", required=True),
    *_f32_f64("mad", _THREE, "a * b + c, rounded once", required=True),
    _form("div", "rnd ?ftz f32", ">d:f32 a:f32 b:f32", "a / b"),
    _form("div", "mode ?ftz f32", ">d:f32 a:f32 b:f32", "a / b, within 2 ulp", mode="approx full"),
    _form("div", "rnd f64", ">d:f64 a:f64 b:f64", "a / b"),
    *(
        form
        for op, text in (("rcp", "1 / a"), ("sqrt", "the square root of a"))
        for form in (
            _form(op, "rnd ?ftz f32", ">d:f32 a:f32", text),
            _form(op, "approx ?ftz f32", ">d:f32 a:f32", f"{text}, within 1 ulp or so"),
            _form(op, "rnd f64", ">d:f64 a:f64", text),
        )
    ),
    _form("rcp", "approx ftz f64", ">d:f64 a:f64", "1 / a, in the upper 32 bits"),
    _form("rsqrt", "approx ?ftz f32", ">d:f32 a:f32", "1 / the square root of a, within 2 ulp"),
    _form("rsqrt", "approx ?ftz f64", ">d:f64 a:f64", "1 / the square root of a, coarsely"),
    *(
        _form(op, "approx ?ftz f32", ">d:f32 a:f32", text)
        for op, text in (
            ("sin", "the sine of a"),
            ("cos", "the cosine of a"),
            ("lg2", "the logarithm of a to the base 2"),
            ("ex2", "2 to the power of a"),
        )
    ),
    _form("tanh", "approx f32", ">d:f32 a:f32", "the hyperbolic tangent of a", 75, (7, 0)),
    _form("tanh", "approx T", ">d:T a:T", "the hyperbolic tangent of a", 75, (7, 0), _HALF,
          T="f16 f16x2"),
    _form("tanh", "approx T", ">d:T a:T", "the hyperbolic tangent of a", 90, (7, 8), _HALF,
          T="bf16 bf16x2"),
    _form("ex2", "approx T", ">d:T a:T", "2 to the power of a", 75, (7, 0), _HALF,
          T="f16 f16x2"),
    _form("ex2", "approx ftz T", ">d:T a:T", "2 to the power of a", 90, (7, 8), _HALF,
          T="bf16 bf16x2"),
    *(
        form
        for op, text in (("abs", "|a|"), ("neg", "-a"))
        for form in (
            _form(op, "?ftz f32", ">d:f32 a:f32", text),
            _form(op, "f64", ">d:f64 a:f64", text),
            *_half(op, "?ftz T", ">d:T a:T", text, 53, 80),
        )
    ),
    *(
        form
        for op, word in (("min", "smaller"), ("max", "larger"))
        for form in (
            _form(op, "?ftz f32", ">d:f32 a:f32 b:f32",
                  f"the {word} of a and b; a number rather than NaN"),
            _form(op, "?ftz NaN f32", ">d:f32 a:f32 b:f32", f"the {word} of a and b, or NaN", 80,
                  (7, 0)),
            _form(op, "?ftz ?NaN xorsign abs f32", ">d:f32 a:f32 b:f32",
                  f"the {word} of |a| and |b|, with the sign of a * b", 86, (7, 2)),
            _form(op, "f64", ">d:f64 a:f64 b:f64",
                  f"the {word} of a and b; a number rather than NaN"),
            *_half(op, "?ftz ?NaN T", _TWO, f"the {word} of a and b", 80, 80),
            *_half(op, "?ftz ?NaN xorsign abs T", _TWO,
                   f"the {word} of |a| and |b|, with the sign of a * b", 86, 86),
        )
    ),
    *(
        form
        for op, text in (("add", "a + b"), ("sub", "a - b"), ("mul", "a * b"))
        for form in _half(op, "?rn ?ftz ?sat T", _TWO, text, 53, 90)
    ),
    *_half("fma", "rn ?ftz ?sat T", _THREE, "a * b + c, rounded once", 53, 80),
    _form("fma", "rn ?ftz relu T", _THREE, "a * b + c, rounded once, at least 0", 80, (7, 0),
          _HALF, T="f16 f16x2"),
    _form("fma", "rn relu T", _THREE, "a * b + c, rounded once, at least 0", 80, (7, 0),
          _HALF, T="bf16 bf16x2"),
    *(
        _form("fma", f"rn oob {relu}T", _THREE, "a * b + c, 0 where a or b is out of bounds", 90,
              (8, 1), _HALF, T="f16 f16x2 bf16 bf16x2")
        for relu in ("", "relu ")
    ),
    _form("testp", "test T", ">p:pred a:T", "whether a is of that class",
          test="finite infinite number notanumber normal subnormal", T="f32 f64"),
    _form("copysign", "T", ">d:T a:T b:T", "b with the sign of a", T="f32 f64"),
)  # fmt: skip
