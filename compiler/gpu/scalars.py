"""The scalar functions of `compiler.scalar`, and conversions between dtypes, as PTX.

The formulas are those of the CPU (`compiler.cpu.scalars`, `compiler.cpu.vector_math`), run over
the writer of `.ir`, except where PTX has an instruction or LLVM a library function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from stagefuse.compiler.cpu import scalars as shared
from stagefuse.compiler.cpu import vector_math
from stagefuse.compiler.operators import BITS, POWERS, power_by_products, unsigned_power
from stagefuse.dsl.dtypes import DTYPES, DType

from . import exponent, quotients
from .ir import ROUND, Code, Value

REGISTER = shared.REGISTER
Rule = Callable[[Code, Sequence[Value], DType], Value]

ACCESS = {
    d.name: f"f{d.bits}" if d.is_float and d.bits >= 32
    else "u8" if d.bits == 8 and not d.is_int
    else f"b{d.bits}" if d.is_float or d.bits >= 32
    else f"s{d.bits}"  # narrow integers of either sign are held sign-extended
    for d in DTYPES.values()
}  # fmt: skip
"""The type of a load or store."""
RAW = {
    d.name: "half" if d.is_float and d.bits == 16
    else "i32" if d.bits == 8 and not d.is_int
    else REGISTER[d.name]
    for d in DTYPES.values()
}  # fmt: skip
"""The register type that is loaded and stored."""
E4M3_IN_F32 = 0x87F00000 - (1 << 32)
E4M3_NAN = 480.0
"""What the bits that stand for NaN in f8e4m3 would be, as others are."""
ROUNDED = {"round": "rint", "floor": "floor", "ceil": "ceil", "trunc": "trunc"}
MANTISSA = {"f16": 11, "bf16": 8}
"""The bits of integers that floats hold exactly."""


def from_memory(code: Code, raw: Value, dtype: DType) -> Value:
    """A stored element as a register value."""
    if dtype.is_bool:
        return raw.compare("ne", 0)
    if dtype.name == "bf16" and raw.type == "i32":  # in the upper half already
        return raw.as_float("float")
    if dtype.name in ("f16", "bf16"):
        if dtype.name == "f16":
            found = raw.to("fpext", "float")
        else:
            found = code.pure("cvt.u32.u16", "i32", raw).shl(16).as_float("float")
        code.stored[found.text] = (dtype.name, raw)
        return found
    if dtype.is_small_float:
        if dtype.name == "f8e4m3":
            found = _from_e4m3(code, raw)
        else:
            narrow = code.narrowed(Value(code, raw.text, "i8", raw.depth))
            found = cast(Value, shared.from_memory(cast(Any, code), cast(Any, narrow), dtype))
        code.fields.eighths.add(found.text)
        return found
    return raw


def _from_e4m3(code: Code, raw: Value) -> Value:
    """An f8e4m3 as f32, exactly: its bits where f32 has those, whose exponents are less by 120."""
    bits = code.fields.top_byte(Value(code, raw.text, "i32", raw.depth)).ashr(4) & E4M3_IN_F32
    found = bits.as_float("float") * 2.0**120
    nan = code.intrinsic("fabs", found).compare("eq", E4M3_NAN)
    return nan.select(code.const(math.nan, "float"), found)


def to_memory(code: Code, value: Value, dtype: DType) -> Value:
    """A register value as a stored element, rounded to nearest even."""
    if dtype.is_bool:
        return value.to("zext", "i32")
    if dtype.name in ("f16", "bf16"):
        kind, raw = code.stored.get(value.text, ("", value))
        if kind == dtype.name:
            return raw
        return code.pure(f"cvt.rn.{dtype.name}.f32", "half", value)
    if dtype.is_small_float:
        stored = shared.to_memory(cast(Any, code), cast(Any, value), dtype)
        return cast(Value, stored).to("sext", "i32")
    return value


def round_to(code: Code, value: Value, dtype: DType) -> Value:
    """A float converted to a storage dtype, still in its compute dtype."""
    if not dtype.is_small_float or code.fields.has_bits(value, MANTISSA.get(dtype.name, 0)):
        return value
    if dtype.name == "bf16" and code.stored.get(value.text, ("",))[0] != "bf16":
        # two are rounded into a word at full rate, one of them by a unit that does few in a clock;
        # ptxas drops whichever of these nothing uses
        word = code.pure("cvt.rn.bf16x2.f32", "i32", value, code.const(0.0, "float"))
        found = word.as_float("float")
        code.stored[found.text] = ("bf16", to_memory(code, value, dtype))
        return found
    value = cast(Value, shared.saturated(cast(Any, code), cast(Any, value), dtype))
    return from_memory(code, to_memory(code, value, dtype), dtype)


def convert(code: Code, value: Value, source: DType, target: DType) -> Value:
    """`cast`: to float rounding, to integer saturating from float and wrapping from integer."""
    if source.compute == target.compute and not target.is_small_float:
        return value
    kind = REGISTER[target.name]
    unsigned = source.kind == "uint" or source.is_bool
    if target.is_bool:
        return value.compare("ne", 0)
    if target.is_float:
        if source.is_float:
            word = "fpext" if BITS[kind] > BITS[value.type] else "fptrunc"
        else:
            word = "uitofp" if unsigned else "sitofp"
        return round_to(code, value.to(word, kind), target)
    if source.is_float:
        return code.converted(value, "fptoui" if target.kind == "uint" else "fptosi", kind)
    if BITS[kind] < BITS[value.type]:
        return value.to("trunc", kind)
    return value.to("zext" if unsigned else "sext", kind)


def apply(code: Code, fn: str, args: Sequence[Value], dtype: DType) -> Value:
    """A scalar function of operands of `dtype` (of the last operand, where they differ)."""
    if fn == "pow":
        return _pow(code, args, dtype)
    if fn in _OWN_F32 and args[0].type == "float":
        return _formula(code, _OWN_F32[fn], args)
    if fn == "div" and args[0].text == code.const(1.0, "float").text:
        return _formula(code, quotients.reciprocal, args[1:])
    if fn in vector_math.FUNCTIONS:
        return _formula(code, vector_math.FUNCTIONS[fn][0], args)
    rule = cast(Rule, shared.RULES[fn])
    if fn in ("floordiv", "mod") and dtype.is_float:
        return _formula(code, rule, args, dtype)
    found = rule(code, args, dtype)
    if fn in ROUNDED and found.type == "float":  # ptxas drops it where nothing is converted
        form = f"cvt.{ROUND[ROUNDED[fn]]}.s32.f32"
        code.wholes[found.text] = code.pure(form, "i32", args[0])
    return found


def _formula(
    code: Code, function: Callable[..., Any], args: Sequence[Value], dtype: DType | None = None
) -> Value:
    """A formula whose every operation must round on its own."""
    before, code.contract = code.contract, False
    try:
        found = function(code, *args) if dtype is None else function(code, args, dtype)
    finally:
        code.contract = before
    return cast(Value, found)


_OWN_F32: dict[str, Callable[..., Any]] = {
    "reciprocal": quotients.usual_reciprocal,
    "rsqrt": quotients.rsqrt,
    "sigmoid": quotients.sigmoid,
    "ratio": quotients.ratio,
}
SHORT = {"exp": exponent.short_exp, "sigmoid": quotients.short_sigmoid}
"""Of f32 that stand for 16 bits or fewer."""


def _pow(code: Code, args: Sequence[Value], dtype: DType) -> Value:
    x, y = args
    if dtype.is_float:
        for exponent in POWERS:
            if y.text == code.const(exponent, y.type).text:
                return power_by_products(x, exponent)
        if x.text == code.const(2.0, x.type).text:
            return _formula(code, vector_math.exp2, [y])
        return _formula(code, vector_math.FUNCTIONS["pow"][0], args)
    if dtype.kind == "uint" and dtype.bits == 64:
        return unsigned_power(x, y, lambda a, b: integer_power(code, a, b))
    word = "zext" if dtype.kind == "uint" else "sext"
    return integer_power(code, x.to(word, "i64"), y.to(word, "i64")).to("trunc", x.type)


def integer_power(code: Code, base: Value, power: Value) -> Value:
    """By squaring, wrapping; a negative power of 1 and -1 is exact, of others 0."""
    negative = power.compare("lt", 0)
    odd = (power & 1).compare("ne", 0)
    one, zero = code.const(1, "i64"), code.const(0, "i64")
    sign = odd.select(code.const(-1, "i64"), one)
    inverse = base.compare("eq", 1).select(one, base.compare("eq", -1).select(sign, zero))
    head, done = code.label("power"), code.label("powered")
    result, square = code.variable("i64", one), code.variable("i64", base)
    left = code.variable("i64", negative.select(zero, power))
    again = code.fresh("i1")
    code.start(head)
    code.write("setp.eq.s64", again, left, zero)
    code.branch_if(again, done)
    bit, product = code.fresh("i64"), code.fresh("i64")
    code.write("and.b64", bit, left, one)
    code.write("setp.ne.s64", again, bit, zero)
    code.write("mul.lo.s64", product, result, square)
    code.set(result, product, again)
    code.write("mul.lo.s64", square, square, square)
    code.write("shr.u64", left, left, code.const(1, "i32"))
    code.branch(head)
    code.start(done)
    return negative.select(inverse, result)


def extreme(code: Code, a: Value, b: Value, dtype: DType, kind: str) -> Value:
    """The greater or lesser; NaN if one is NaN."""
    return cast(Value, shared.extreme(cast(Any, code), cast(Any, a), cast(Any, b), dtype, kind))
