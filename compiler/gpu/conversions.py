"""Conversions between register types, named as LLVM's, and the remainder of floats.

PTX ISA 9.7.9.21, "cvt": conversions to an integer clamp; only those of f32 to 32 bits give 0 for
NaN.
"""

from __future__ import annotations

from stagefuse.compiler.operators import BITS

from .ir import NARROW, TYPE, Code, Value
from .lines import Line


def _bitcast(c: Code, value: Value, kind: str) -> Value:
    if value.type == "i16" and kind == "half":
        return c.pure("cvt.u16.u32", "half", value)
    if value.type == "half" and kind == "i16":
        return c.narrowed(c.pure("cvt.u32.u16", "i16", value))
    bits = BITS[kind]
    return c.pure(f"mov.b{bits}", kind, value)


def _trunc(c: Code, value: Value, kind: str) -> Value:
    if value.type == "i64":
        value = c.pure("cvt.u32.u64", "i32", value)
    return c.narrowed(Value(c, value.text, kind, value.depth)) if kind != "i32" else value


def _sext(c: Code, value: Value, kind: str) -> Value:
    if kind == "i64":
        return c.pure("cvt.s64.s32", "i64", value)
    return Value(c, value.text, kind, value.depth)


def _zext(c: Code, value: Value, kind: str) -> Value:
    if value.type == "i1":
        one, zero = c.const(1, kind), c.const(0, kind)
        return value.select(one, zero)
    value = c.zero_extended(value)
    if kind == "i64":
        return c.pure("cvt.u64.u32", "i64", value)
    return Value(c, value.text, kind, value.depth)


def _float_to_float(c: Code, value: Value, kind: str) -> Value:
    rounding = "rn." if BITS[kind] < BITS[value.type] else ""
    return c.pure(f"cvt.{rounding}{TYPE[kind]}.{TYPE[value.type]}", kind, value)


def _signed_to_float(c: Code, value: Value, kind: str) -> Value:
    small = c.fields.as_float(value) if kind == "float" else None
    if small is not None:
        return small
    bits = 64 if value.type == "i64" else 32
    return c.pure(f"cvt.rn.{TYPE[kind]}.s{bits}", kind, value)


def _unsigned_to_float(c: Code, value: Value, kind: str) -> Value:
    value = _zext(c, value, "i32") if value.type in ("i1", *NARROW) else value
    small = c.fields.as_float(value) if kind == "float" else None
    if small is not None:
        return small
    bits = 64 if value.type == "i64" else 32
    return c.pure(f"cvt.rn.{TYPE[kind]}.u{bits}", kind, value)


def _float_to_integer(c: Code, value: Value, kind: str) -> Value:
    """Saturating; NaN gives 0."""
    wide = "i64" if kind == "i64" else "i32"
    result = c.wholes.get(value.text) if wide == "i32" else None
    result = result or c.pure(f"cvt.rzi.s{BITS[wide]}.{TYPE[value.type]}", wide, value)
    if wide == "i64" or value.type == "double":  # only a conversion of f32 to 32 bits gives 0
        result = value.is_nan().select(c.const(0, wide), result)
    if kind in NARROW:
        top = (1 << (BITS[kind] - 1)) - 1
        found = c.extreme("smin", c.extreme("smax", result, c.const(-top - 1, wide)),
                          c.const(top, wide))  # fmt: skip
        if kind == "i8":
            c.clamped[found.text] = result
        return Value(c, found.text, kind, found.depth)
    return result


def _float_to_unsigned(c: Code, value: Value, kind: str) -> Value:
    """The same, unsigned."""
    wide = "i64" if kind == "i64" else "i32"
    result = c.pure(f"cvt.rzi.u{BITS[wide]}.{TYPE[value.type]}", wide, value)
    if wide == "i64" or value.type == "double":
        result = value.is_nan().select(c.const(0, wide), result)
    if kind not in NARROW:
        return result
    top = c.const((1 << BITS[kind]) - 1, "i32")
    result = c.extreme("umin", result, top)
    return c.narrowed(Value(c, result.text, kind, result.depth))


CONVERT = {
    "bitcast": _bitcast, "trunc": _trunc, "sext": _sext, "zext": _zext,
    "fpext": _float_to_float, "fptrunc": _float_to_float, "sitofp": _signed_to_float,
    "uitofp": _unsigned_to_float, "fptosi": _float_to_integer, "fptoui": _float_to_unsigned,
}  # fmt: skip


def remainder(c: Code, a: Value, b: Value) -> Value:
    """The exact remainder of f64 values with the sign of `a`; NaN where there is none.

    At most 2^21 times the divisor, scaled by a power of two, is subtracted at a time: quotient,
    product and difference are then exact but for a quotient one too large, which is mended.
    """
    x = c.variable("double", c.intrinsic("fabs", a))
    y = c.intrinsic("fabs", b)
    finite = x.compare("lt", float("inf")) & y.compare("gt", 0.0)
    head, done = c.label("remainder"), c.label("reduced")
    c.set(x, c.const(float("nan"), "double"), finite ^ 1)
    smaller, scaled = c.fresh("i1"), c.fresh("double")
    gap, quotient = c.fresh("double"), c.fresh("double")
    c.start(head)
    c.write("setp.ge.f64", smaller, x, y)
    c.branch_if(smaller, done, holds=False)
    c.set(scaled, y)
    c.write("mul.rn.f64", gap, x, c.const(2.0**-21, "double"))
    grow, grown = c.label("grow"), c.label("grown")
    c.start(grow)
    c.write("setp.lt.f64", smaller, scaled, gap)
    c.branch_if(smaller, grown, holds=False)
    c.write("mul.rn.f64", scaled, scaled, c.const(2.0**20, "double"))
    c.branch(grow)
    c.start(grown)
    c.write("div.rn.f64", quotient, x, scaled)
    c.write("cvt.rzi.f64.f64", quotient, quotient)
    c.write("neg.f64", quotient, quotient)
    c.write("fma.rn.f64", x, quotient, scaled, x)
    c.write("setp.lt.f64", smaller, x, c.const(0.0, "double"))
    c.write("add.rn.f64", x, x, scaled, guard=smaller)
    c.branch(head)
    c.start(done)
    return c.intrinsic("copysign", x, a)


def long_division(code: Code, a: Value, b: Value) -> Value:
    """a / b, both unsigned of 64 bits: in 32 where both fit, which takes a quarter as long."""
    key = ("div.u64", "i64", a.text, b.text)
    for known in code.scopes:
        if key in known.known:
            return known.known[key]
    at = code.place((a, b))
    scope = code.scopes[at]
    result = scope.known[key] = code.fresh("i64", at)
    both, (high, x, y) = code.fresh("i64").text, (code.fresh("i32").text for _ in range(3))
    long, (wide, done) = code.fresh("i1").text, (code.label(n) for n in ("wide", "divided"))
    lines = (
        f"\tor.b64 {both}, {a.text}, {b.text};",
        f"\tmov.b64 {{{x}, {high}}}, {both};",
        f"\tsetp.ne.s32 {long}, {high}, 0;",
        f"\t@{long} bra {wide};",
        f"\tcvt.u32.u64 {x}, {a.text};",
        f"\tcvt.u32.u64 {y}, {b.text};",
        f"\tdiv.u32 {x}, {x}, {y};",
        f"\tcvt.u64.u32 {result.text}, {x};",
        f"\tbra {done};",
        f"{wide}:",
        f"\tdiv.u64 {result.text}, {a.text}, {b.text};",
        f"{done}:",
    )
    scope.lines.extend(Line(text, code.loc) for text in lines)
    return result
