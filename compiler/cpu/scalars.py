"""The scalar functions of `compiler.scalar`, and conversions between dtypes, as LLVM IR.

Registers hold bools as i1, integers at their width, floats as f32 or f64; 16- and 8-bit floats
exist only in memory and are converted on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from stagefuse.compiler.operators import BITS, POWERS, power_by_products, unsigned_power
from stagefuse.dsl.dtypes import DTYPES, DType

from . import vector_math
from .ir import Code, Value
from .vector_math import MANTISSA

Rule: TypeAlias = Callable[[Code, Sequence[Value], DType], Value]

REGISTER = {
    d.name: "i1" if d.is_bool else f"i{d.bits}" if d.is_int
    else "double" if d.bits == 64 else "float"
    for d in DTYPES.values()
}  # fmt: skip
MEMORY = {
    d.name: "half" if d.name == "f16" else f"i{d.bits}" if d.is_bool or d.is_small_float
    else REGISTER[d.name]
    for d in DTYPES.values()
}  # fmt: skip


def from_memory(code: Code, raw: Value, dtype: DType) -> Value:
    """A stored element as a register value."""
    if dtype.is_bool:
        return raw.compare("ne", 0)
    if dtype.name == "f16":
        return raw.to("fpext", "float")
    if dtype.name == "bf16":
        return raw.to("zext", "i32").shl(16).as_float("float")
    if dtype.name == "f8e5m2":
        return raw.to("zext", "i16").shl(8).to("bitcast", "half").to("fpext", "float")
    if dtype.name == "f8e4m3":
        bits = raw.to("zext", "i32")
        size = (bits & 0x7F).shl(20).as_float("float") * 2.0**120
        nan = (bits & 0x7F).compare("eq", 0x7F)
        size = nan.select(code.const(float("nan"), "float"), size)
        return (size.bits() | (bits & 0x80).shl(24)).as_float("float")
    return raw


def to_memory(code: Code, value: Value, dtype: DType) -> Value:
    """A register value as a stored element, rounded to nearest even."""
    if dtype.is_bool:
        return value.to("zext", "i8")
    if dtype.name == "f16":
        return value.to("fptrunc", "half")
    if dtype.name == "bf16":
        bits = value.bits()
        rounded = (bits + ((bits.lshr(16) & 1) + 0x7FFF)).lshr(16)
        return value.is_nan().select(bits.lshr(16) | 0x40, rounded).to("trunc", "i16")
    if dtype.name == "f8e4m3":
        return _to_f8(code, value, 3, 7, 448.0, 0x7F)
    if dtype.name == "f8e5m2":
        return _to_f8(code, value, 2, 15, 57344.0, 0x7E, 0x7C)
    return value


def saturated(code: Code, value: Value, target: DType) -> Value:
    """A float about to be converted: to f8, an infinity becomes the largest finite value.

    Storing keeps the infinities of f8e5m2; only a conversion saturates.
    """
    if target.name != "f8e5m2":
        return value
    largest = code.const(target.largest, value.type)
    low = value.compare("lt", -target.largest).select(-largest, value)
    return value.compare("gt", target.largest).select(largest, low)


def _to_f8(
    code: Code,
    value: Value,
    mantissa: int,
    bias: int,
    largest: float,
    nan: int,
    infinity: int | None = None,
) -> Value:
    """Rounds |value|, if finite at most `largest`, to few mantissa bits; below the normal numbers
    by adding a number whose last place is the smallest step."""
    whole = code.intrinsic("fabs", value)
    size = whole.compare("gt", largest).select(code.const(largest, "float"), whole)
    bits, drop = size.bits(), 23 - mantissa
    rounded = bits + ((bits.lshr(drop) & 1) + ((1 << (drop - 1)) - 1))
    normal = rounded.lshr(drop) - ((127 - bias) << mantissa)
    step = 2.0 ** (23 + 1 - bias - mantissa)
    tiny = (size + step).bits() - code.const(step, "float").bits()
    result = size.compare("lt", 2.0 ** (1 - bias)).select(tiny, normal)
    if infinity is not None:
        result = whole.compare("eq", math.inf).select(code.const(infinity, "i32"), result)
    result = value.is_nan().select(code.const(nan, "i32"), result)
    return (result | (value.bits().lshr(24) & 0x80)).to("trunc", "i8")


def convert(code: Code, value: Value, source: DType, target: DType) -> Value:
    """`cast`: to float rounding, to integer saturating from float and wrapping from integer."""
    if source.compute == target.compute and not target.is_small_float:
        return value
    result, kind = value, REGISTER[target.name]
    if target.is_bool:
        return value.compare("ne", 0)
    if source.is_float and target.is_float:
        result = value.to("fpext" if BITS[kind] > BITS[value.type] else "fptrunc", kind)
        return round_to(code, result, target)
    if source.is_float:
        return to_integer(code, value, target)
    unsigned = source.kind == "uint" or source.is_bool
    if target.is_float:
        result = value.to("uitofp" if unsigned else "sitofp", kind)
        return round_to(code, result, target)
    if BITS[kind] < BITS[value.type]:
        return value.to("trunc", kind)
    return value.to("zext" if unsigned else "sext", kind)


def to_integer(code: Code, value: Value, target: DType) -> Value:
    """A float towards 0 to an integer of a dtype, the nearest of those that there are; NaN to 0.

    LLVM makes no vectors of its own conversion that saturates.
    """
    signed, zero = target.kind == "int", code.const(0.0, value.type)
    digits = target.bits - signed
    least, most = -(1 << digits) if signed else 0, (1 << digits) - 1
    exact = MANTISSA[value.type] + 1
    below = most if digits <= exact else (1 << digits) - (1 << (digits - exact))
    limited = value.compare("gt", float(below)).select(code.const(float(below), value.type), value)
    if signed:
        low = code.const(float(least), value.type)
        limited = limited.compare("lt", float(least)).select(low, limited)
        limited = value.is_nan().select(zero, limited)
    else:  # nor is NaN above 0
        limited = limited.compare("gt", 0.0).select(limited, zero)
    word = "fptosi" if signed or target.bits < 32 else "fptoui"
    wide = f"i{max(target.bits, 32)}"
    found = limited.to(word, wide)
    if below < most:
        found = value.compare("gt", float(below)).select(code.const(most, wide), found)
    return found if target.bits >= 32 else found.to("trunc", f"i{target.bits}")


def round_to(code: Code, value: Value, dtype: DType) -> Value:
    """A float converted to a storage dtype, still in its compute dtype."""
    if not dtype.is_small_float:
        return value
    return from_memory(code, to_memory(code, saturated(code, value, dtype), dtype), dtype)


def _select(c: Code, a: Sequence[Value], t: DType) -> Value:
    return a[0].select(a[1], a[2])


def _maximum(c: Code, a: Sequence[Value], t: DType) -> Value:
    return extreme(c, a[0], a[1], t, "max")


def _minimum(c: Code, a: Sequence[Value], t: DType) -> Value:
    return extreme(c, a[0], a[1], t, "min")


def extreme(c: Code, a: Value, b: Value, t: DType, kind: str) -> Value:
    """The greater or lesser; NaN if one is NaN."""
    if t.is_bool:
        return a | b if kind == "max" else a & b
    if t.is_float:
        return c.intrinsic("maximum" if kind == "max" else "minimum", a, b)
    return c.intrinsic(("u" if t.kind == "uint" else "s") + kind, a, b)


def _relation(relation: str) -> Rule:
    def rule(c: Code, a: Sequence[Value], t: DType) -> Value:
        return a[0].compare(relation, a[1], unsigned=t.kind == "uint")

    return rule


def _rounding(name: str) -> Rule:
    return lambda c, a, t: c.intrinsic(name, a[0])


def _sign(c: Code, a: Sequence[Value], t: DType) -> Value:
    x = a[0]
    kind = x.type
    one = c.const(1, kind)
    if t.kind == "uint":
        return x.compare("ne", 0).select(one, 0)
    negative = x.compare("lt", 0).select(c.const(-1, kind), 0)
    result = x.compare("gt", 0).select(one, negative)
    return x.is_nan().select(x, result) if t.is_float else result


def _abs(c: Code, a: Sequence[Value], t: DType) -> Value:
    if t.is_float:
        return c.intrinsic("fabs", a[0])
    if t.kind == "uint":
        return a[0]
    return a[0].compare("lt", 0).select(-a[0], a[0])


def integer_division(
    c: Code, a: Value, b: Value, unsigned: bool, by_floats: bool = False
) -> tuple[Value, Value]:
    """Floor quotient and remainder; both 0 where b is 0. `by_floats`: as floats are divided."""
    zero = b.compare("eq", 0)
    if unsigned:
        safe = zero.select(c.const(1, b.type), b)
        q = of_floats(a, safe, "ui") if by_floats else c.unsigned_division(a, safe)
        return zero.select(c.const(0, a.type), q), zero.select(c.const(0, a.type), a - q * safe)
    minus = b.compare("eq", -1)
    safe = (zero | minus).select(c.const(1, b.type), b)
    q = of_floats(a, safe, "si") if by_floats else a / safe
    r = a - q * safe
    low = r.compare("ne", 0) & (r ^ safe).compare("lt", 0)
    q = low.select(q - 1, q)
    r = low.select(r + safe, r)
    return zero.select(c.const(0, a.type), minus.select(-a, q)), r


def of_floats(a: Value, b: Value, sign: str) -> Value:
    """The quotient towards 0 of integers, of which processors divide no vectors; b is not 0, and
    not -1 with the least a.

    Of at most 32 bits, one that is no whole number is at least 1 / |b| from the next one, 1 / |a|
    of its own size; rounding moves it by 2^-53 of that, or 2^-24 where |a| is at most 2^16.
    """
    if BITS[a.type] > 32:
        return _of_long(a, b)
    kind = "double" if BITS[a.type] > 16 else "float"
    quotient = a.to(f"{sign}tofp", kind) / b.to(f"{sign}tofp", kind)
    return quotient.to(f"fpto{sign}", a.type)


def _of_long(a: Value, b: Value) -> Value:
    """The same of signed integers of 64 bits.

    By magnitudes x and y: the quotient of their roundings is within 2^-51 of its size, so that what
    is left of x is at most x 2^-51 + y; the quotient of that, as of numbers of 13 bits or of about
    y, is whole or off by one.
    """
    code, sign = a.code, (a ^ b).ashr(63)
    x, y = (v.compare("lt", 0).select(-v, v) for v in (a, b))
    wide = y.to("uitofp", "double")
    q = (x.to("uitofp", "double") / wide).to("fptoui", "i64")
    rest = x - q * y
    more = (rest.to("sitofp", "double") / wide).to("fptosi", "i64")
    q, rest = q + more, rest - more * y
    one = code.const(1, "i64")
    q = rest.compare("lt", 0).select(q - 1, rest.compare("ge", y, unsigned=True).select(q + one, q))
    return (q ^ sign) - sign


def _divided(c: Code, a: Sequence[Value], t: DType) -> tuple[Value, Value]:
    """LLVM divides by a constant without a division."""
    unsigned = t.kind == "uint"
    by_floats = t.bits <= 32 or (c.converts_long and not unsigned)
    by_floats = by_floats and not a[1].text.lstrip("-").isdigit()
    return integer_division(c, a[0], a[1], unsigned, by_floats)


def float_division(c: Code, a: Value, b: Value) -> tuple[Value, Value]:
    """Floor quotient and remainder as NumPy's, from the exact remainder."""
    rest = c.remainder(a, b)
    wrong = rest.compare("ne", 0.0) & (rest.compare("lt", 0.0) ^ b.compare("lt", 0.0))
    mod = wrong.select(rest + b, rest)
    zero = c.const(0.0, a.type)
    mod = rest.compare("eq", 0.0).select(vector_math.copysign(c, zero, b), mod)
    exact = (a - rest) / b
    exact = wrong.select(exact - 1.0, exact)
    floor = c.intrinsic("floor", exact)
    floor = (exact - floor).compare("gt", 0.5).select(floor + 1.0, floor)
    nothing = vector_math.copysign(c, zero, a / b)
    floor = exact.compare("eq", 0.0).select(nothing, floor)
    return b.compare("eq", 0.0).select(a / b, floor), mod


def times_reciprocal(a: Value, b: Value) -> Value:
    """a / b in f32 as a * (1 / b) in f64, rounded once more.

    The same bits: a quotient of two numbers of 24 bits is no closer to the middle of two others
    than 2^-49, relatively, and the product is within 2^-52. Only among subnormal results are
    there ties, and one may go the other way.
    """
    return (a.to("fpext", "double") * (1.0 / b.to("fpext", "double"))).to("fptrunc", "float")


def _floordiv(c: Code, a: Sequence[Value], t: DType) -> Value:
    if t.is_float:
        return float_division(c, a[0], a[1])[0]
    return _divided(c, a, t)[0]


def _mod(c: Code, a: Sequence[Value], t: DType) -> Value:
    if t.is_float:
        return float_division(c, a[0], a[1])[1]
    return _divided(c, a, t)[1]


def _pow(c: Code, a: Sequence[Value], t: DType) -> Value:
    x, y = a
    if t.is_float:
        for exponent in POWERS:
            if y.text == c.const(exponent, y.type).text:
                return power_by_products(x, exponent)
        if x.text == c.const(2.0, x.type).text:
            return c.call(vector_math.symbol("exp2", y.type), y.type, y)
        return c.call(vector_math.symbol("pow", x.type), x.type, x, y)
    if t.kind == "uint" and t.bits == 64:
        return unsigned_power(x, y, lambda a, b: c.call("sf.pow.i64", "i64", a, b))
    word = "zext" if t.kind == "uint" else "sext"
    wide = c.call("sf.pow.i64", "i64", x.to(word, "i64"), y.to(word, "i64"))
    return wide.to("trunc", x.type)


def _shift(c: Code, a: Sequence[Value], t: DType) -> Value:
    x, count = a
    inside = count.compare("lt", BITS[x.type], unsigned=True)
    by = inside.select(count, 0)
    return inside.select(x.shl(by), c.const(0, x.type))


def _shift_right(c: Code, a: Sequence[Value], t: DType) -> Value:
    x, count = a
    inside = count.compare("lt", BITS[x.type], unsigned=True)
    by = inside.select(count, 0)
    if t.kind == "uint":
        return inside.select(x.lshr(by), c.const(0, x.type))
    return inside.select(x.ashr(by), x.ashr(BITS[x.type] - 1))


def _invert(c: Code, a: Sequence[Value], t: DType) -> Value:
    return a[0] ^ (1 if t.is_bool else -1)


RULES: dict[str, Rule] = {
    "add": lambda c, a, t: a[0] + a[1],
    "sub": lambda c, a, t: a[0] - a[1],
    "mul": lambda c, a, t: a[0] * a[1],
    "div": lambda c, a, t: a[0] / a[1],
    "reciprocal": lambda c, a, t: 1.0 / a[0],
    "ratio": lambda c, a, t: a[0] / a[1],
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _pow,
    "neg": lambda c, a, t: -a[0],
    "abs": _abs,
    "sign": _sign,
    "floor": _rounding("floor"),
    "ceil": _rounding("ceil"),
    "round": _rounding("rint"),
    "trunc": _rounding("trunc"),
    "sqrt": _rounding("sqrt"),
    "isnan": lambda c, a, t: a[0].is_nan(),
    "isinf": lambda c, a, t: c.intrinsic("fabs", a[0]).compare("eq", float("inf")),
    "eq": _relation("eq"),
    "ne": _relation("ne"),
    "lt": _relation("lt"),
    "le": _relation("le"),
    "gt": _relation("gt"),
    "ge": _relation("ge"),
    "and": lambda c, a, t: a[0] & a[1],
    "or": lambda c, a, t: a[0] | a[1],
    "not": lambda c, a, t: a[0] ^ 1,
    "bitand": lambda c, a, t: a[0] & a[1],
    "bitor": lambda c, a, t: a[0] | a[1],
    "bitxor": lambda c, a, t: a[0] ^ a[1],
    "invert": _invert,
    "shl": _shift,
    "shr": _shift_right,
    "maximum": _maximum,
    "minimum": _minimum,
    "select": _select,
}


def apply(code: Code, fn: str, args: Sequence[Value], dtype: DType) -> Value:
    """A scalar function of operands of `dtype` (of the last operand, where they differ)."""
    if fn in vector_math.FUNCTIONS and fn != "pow":
        return code.call(vector_math.symbol(fn, args[0].type), args[0].type, *args)
    return RULES[fn](code, args, dtype)


INTEGER_POW = """
define internal i64 @sf.pow.i64(i64 %base, i64 %power) {
entry:
  %negative = icmp slt i64 %power, 0
  br i1 %negative, label %inverse, label %loop
inverse:
  %odd = and i64 %power, 1
  %isodd = icmp ne i64 %odd, 0
  %one = icmp eq i64 %base, 1
  %minus = icmp eq i64 %base, -1
  %sign = select i1 %isodd, i64 -1, i64 1
  %other = select i1 %minus, i64 %sign, i64 0
  %inverted = select i1 %one, i64 1, i64 %other
  ret i64 %inverted
loop:
  %left = phi i64 [ %power, %entry ], [ %left2, %next ]
  %square = phi i64 [ %base, %entry ], [ %square2, %next ]
  %result = phi i64 [ 1, %entry ], [ %result2, %next ]
  %done = icmp eq i64 %left, 0
  br i1 %done, label %end, label %next
next:
  %bit = and i64 %left, 1
  %set = icmp ne i64 %bit, 0
  %product = mul i64 %result, %square
  %result2 = select i1 %set, i64 %product, i64 %result
  %square2 = mul i64 %square, %square
  %left2 = lshr i64 %left, 1
  br label %loop
end:
  ret i64 %result
}
"""
