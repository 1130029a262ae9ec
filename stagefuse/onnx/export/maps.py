"""The scalar functions as ONNX ops; one entry each in `WRITERS`.

Where ONNX leaves a case open that the language defines (division by zero, conversions out of
range, shifts by too much), the case is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import BOOL, DTYPES, F16, F32, I32, I64, U8, DType

from .model import Model, Tensor, Unsupported, carrier
from .sizes import broadcast

Writer: TypeAlias = Callable[["Maps", Sequence[Tensor]], Tensor]

WIDE_ONLY = {
    "Neg": ("u8", "u16", "u32", "u64"), "Max": ("i16", "u16"), "Min": ("i16", "u16"),
    "Where": ("i16", "u16", "u64", "bool"), "Less": ("bool",), "LessOrEqual": ("bool",),
    "Greater": ("bool",), "GreaterOrEqual": ("bool",), "Sign": ("f16",),
}  # fmt: skip
"""Ops, with the dtypes that the standard or its main engine lacks: computed in a wider one, or in
i64, where the result has the same bits."""


class Maps:
    """Writes pointwise functions of stored tensors."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def apply(self, fn: str, operands: Sequence[Tensor], result: DType) -> Tensor:
        """One scalar function; `result` is the dtype of the graph's node."""
        if fn == "cast":
            return self.convert(operands[0], carrier(result))
        if fn not in WRITERS:
            raise Unsupported(f"`{fn}` has no ONNX form here")
        return WRITERS[fn](self, operands)

    # Building blocks

    def op(
        self, op: str, *operands: Tensor, dtype: DType | None = None, **attributes: Any
    ) -> Tensor:
        """A node whose operands broadcast; of the last operand's dtype unless it is given."""
        own = operands[-1].dtype
        if own.name in WIDE_ONLY.get(op, ()):
            wider = U8 if own.is_bool else F32 if own.is_float else I64 if own.bits > 16 else I32
            choice = op == "Where"
            wide = [*operands[:choice], *(self.model.cast(x, wider) for x in operands[choice:])]
            found = self.op(op, *wide, dtype=dtype, **attributes)
            return found if dtype else self.model.cast(found, own)
        shape: tuple[Expr, ...] = broadcast(*(x.shape for x in operands))
        return self.model.node(op, operands, dtype or own, shape, **attributes)

    def like(self, x: Tensor, value: float | int) -> Tensor:
        return self.model.constant(np.array(value), x.dtype)

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.op("Where", condition, a, b)

    def compare(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        return self.op(op, a, b, dtype=BOOL)

    def in_f32(self, write: Writer, operands: Sequence[Tensor]) -> Tensor:
        """Formulas of several roundings are too coarse in f16."""
        if operands[0].dtype != F16:
            return write(self, operands)
        return self.model.cast(write(self, [self.model.cast(x, F32) for x in operands]), F16)

    # Conversions

    def convert(self, x: Tensor, to: DType) -> Tensor:
        """`cast` between dtypes that the model computes with."""
        if x.dtype == to:
            return x
        if to.is_bool:
            return self.op("Not", self.compare("Equal", x, self.like(x, 0)))
        if x.dtype.is_float and to.is_int:
            return self._to_integer(x, to)
        return self.model.cast(x, to)

    def _to_integer(self, x: Tensor, to: DType) -> Tensor:
        """Saturating, NaN to 0; ONNX leaves both open."""
        info = np.iinfo(to.numpy)
        if x.dtype == F16:
            x = self.model.cast(x, F32)
        x = self.where(self.model.node("IsNaN", [x], BOOL, x.shape), self.like(x, 0), x)
        top = float(np.nextafter(x.dtype.numpy.type(info.max), x.dtype.numpy.type(0)))
        if int(x.dtype.numpy.type(info.max)) == info.max:
            return self.model.cast(self._clipped(x, info.min, info.max), to)
        inside = self.model.cast(self._clipped(x, info.min, top), to)
        above = self.compare("GreaterOrEqual", x, self.like(x, float(info.max) + 1))
        return self.where(above, self.model.constant(np.array(info.max), to), inside)

    def _clipped(self, x: Tensor, low: float, high: float) -> Tensor:
        return self.op("Min", self.op("Max", x, self.like(x, low)), self.like(x, high))

    # Division

    def _known_nonzero(self, b: Tensor) -> bool:
        return b.known is not None and not np.isin(b.known, (0, -1)).any()

    def modulo(self, a: Tensor, b: Tensor) -> Tensor:
        """Python's remainder; of integers by zero 0."""
        if a.dtype.is_float:
            return self._float_modulo(a, b)
        if self._known_nonzero(b):
            return self.op("Mod", a, b)
        odd = self._is_zero_or_minus_one(b)
        safe = self.where(odd, self.like(b, 1), b)
        return self.op("Mod", a, safe)  # by -1 it is 0, as by 1

    def _is_zero_or_minus_one(self, b: Tensor) -> Tensor:
        zero = self.compare("Equal", b, self.like(b, 0))
        if b.dtype.kind == "uint":
            return zero
        return self.op("Or", zero, self.compare("Equal", b, self.like(b, -1)))

    def _float_rest(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The remainder with the sign of a, and whether b has to be added."""
        rest, zero = self.op("Mod", a, b, fmod=1), self.like(a, 0)
        signs = self.op("Xor", self.compare("Less", rest, zero), self.compare("Less", b, zero))
        nonzero = self.op("Not", self.compare("Equal", rest, zero))
        return rest, self.op("And", signs, nonzero)

    def _float_modulo(self, a: Tensor, b: Tensor) -> Tensor:
        rest, lacks = self._float_rest(a, b)
        return self.where(lacks, self.op("Add", rest, b), rest)

    def floor_divide(self, a: Tensor, b: Tensor) -> Tensor:
        """Rounded down; of integers by zero 0. What `%` leaves is taken away first."""
        if a.dtype.is_float:
            zero = self.compare("Equal", b, self.like(b, 0))
            rest, lacks = self._float_rest(a, b)
            exact = self.op("Div", self.op("Sub", a, rest), b)
            exact = self.op("Round", self.op("Sub", exact, self.convert(lacks, a.dtype)))
            return self.where(zero, self.op("Div", a, b), exact)
        if a.dtype.kind == "uint":
            zero = self.compare("Equal", b, self.like(b, 0))
            found = self.op("Div", a, self.where(zero, self.like(b, 1), b))
            return self.where(zero, self.like(a, 0), found)
        if self._known_nonzero(b):
            return self._floored(a, b)
        zero, minus = (self.compare("Equal", b, self.like(b, n)) for n in (0, -1))
        safe = self.where(self._is_zero_or_minus_one(b), self.like(b, 1), b)
        found = self.where(zero, self.like(a, 0), self._floored(a, safe))
        return self.where(minus, self.op("Sub", self.like(a, 0), a), found)

    def _floored(self, a: Tensor, b: Tensor) -> Tensor:
        """Div rounds towards zero: one less where the signs differ and something is left."""
        zero = self.like(a, 0)
        left = self.op("Not", self.compare("Equal", self.op("Mod", a, b), zero))
        signs = self.op("Xor", self.compare("Less", a, zero), self.compare("Less", b, zero))
        lacks = self.convert(self.op("And", left, signs), a.dtype)
        return self.op("Sub", self.op("Div", a, b), lacks)

    def power(self, a: Tensor, b: Tensor) -> Tensor:
        """Of floats Pow; of integers by squaring, wrapping, bit by bit of the exponent."""
        if a.dtype.is_float:
            return self.op("Pow", a, b)
        bits = a.dtype.bits - (a.dtype.kind == "int")
        if b.known is not None:
            bits = int(np.max(b.known, initial=1)).bit_length()
        one, zero, two = (self.like(a, v) for v in (1, 0, 2))
        negative = self.compare("Less", b, zero)
        left, found, square = self.op("Max", b, zero), one, a
        for _ in range(bits):
            odd = self.compare("Equal", self.op("Mod", left, two), one)
            found = self.where(odd, self.op("Mul", found, square), found)
            square, left = self.op("Mul", square, square), self.op("Div", left, two)
        if a.dtype.kind == "uint":
            return found
        is_one = self.compare("Equal", a, one)
        is_minus = self.compare("Equal", a, self.like(a, -1))
        even = self.compare("Equal", self.op("Mod", b, two), zero)
        sign = self.where(even, one, a)
        inverse = self.where(is_one, one, self.where(is_minus, sign, zero))
        return self.where(negative, inverse, found)

    # Bits

    def bits(self, op: str, *operands: Tensor) -> Tensor:
        if operands[0].dtype.is_bool:
            return self.op({"BitwiseAnd": "And", "BitwiseOr": "Or", "BitwiseXor": "Xor",
                            "BitwiseNot": "Not"}[op], *operands)  # fmt: skip
        self.model.need(18, f"`{op}`")
        return self.op(op, *operands)

    def shift(self, a: Tensor, count: Tensor, left: bool) -> Tensor:
        """Of as many bits as the dtype has, none are left; the sign is kept to the right."""
        width, zero = a.dtype.bits, self.like(a, 0)
        inside = self.op("And", self.compare("GreaterOrEqual", count, zero),
                         self.compare("Less", count, self.like(count, width)))  # fmt: skip
        by = self.where(inside, count, zero)
        unsigned = DTYPES[f"u{width}"]
        flipped, sign = a, zero
        if not left and a.dtype.kind == "int":
            self.model.need(18, "`>>` of signed integers")
            sign = self.where(self.compare("Less", a, zero), self.like(a, -1), zero)
            flipped = self.op("BitwiseXor", a, sign)
        pair = (self.model.cast(flipped, unsigned), self.model.cast(by, unsigned))
        moved = self.op("BitShift", *pair, direction="LEFT" if left else "RIGHT")
        moved = self.where(inside, self.model.cast(moved, a.dtype), zero)
        return moved if sign is zero else self.op("BitwiseXor", moved, sign)

    # Extremes

    def extreme(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype.is_bool:
            return self.op("Or" if op == "Max" else "And", a, b)
        zero = next((x for x in (a, b) if x.known is not None and x.known.shape == ()
                     and x.known == 0), None)  # fmt: skip
        if op == "Max" and zero is not None and a.dtype.is_float:
            other = b if zero is a else a
            return self.op("Relu", other)
        return self.op(op, a, b)


def _log1p(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    """log(u) * x / (u - 1) for u = 1 + x. Source: Kahan, in Higham (2002), section 1.14.1."""
    (x,) = operands
    one = m.like(x, 1)
    u = m.op("Add", x, one)
    log, gap = m.op("Log", u), m.op("Sub", u, one)
    near = m.op("Mul", log, m.op("Div", x, gap))
    found = m.where(m.compare("Equal", gap, m.like(x, 0)), x, near)
    return m.where(m.compare("Equal", u, m.like(x, math.inf)), u, found)


def _expm1(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    """(u - 1) * x / log(u) for u = exp(x). Source: Kahan, in Higham (2002), section 1.14.1."""
    (x,) = operands
    one = m.like(x, 1)
    u = m.op("Exp", x)
    gap = m.op("Sub", u, one)
    near = m.op("Mul", gap, m.op("Div", x, m.op("Log", u)))
    near = m.where(m.compare("Equal", gap, m.like(x, 0)), x, near)
    near = m.where(m.compare("Less", m.op("Abs", x), one), near, gap)
    return near


def _trunc(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    (x,) = operands
    return m.where(m.compare("Less", x, m.like(x, 0)), m.op("Ceil", x), m.op("Floor", x))


def _rsqrt(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    return m.op("Reciprocal", m.op("Sqrt", operands[0]))


def _log2(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    return m.op("Div", m.op("Log", operands[0]), m.like(operands[0], math.log(2)))


def _gelu(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    (x,) = operands
    if m.model.opset >= 20:
        return m.op("Gelu", x)
    scaled = m.op("Erf", m.op("Mul", x, m.like(x, math.sqrt(0.5))))
    half = m.op("Mul", x, m.like(x, 0.5))
    return m.op("Mul", half, m.op("Add", scaled, m.like(x, 1)))


def _plain(op: str) -> Writer:
    return lambda m, operands: m.op(op, *operands)


def _relation(op: str) -> Writer:
    return lambda m, operands: m.compare(op, *operands)


def _not_equal(m: Maps, operands: Sequence[Tensor]) -> Tensor:
    return m.op("Not", m.compare("Equal", *operands))


def _test(op: str) -> Writer:
    def write(m: Maps, operands: Sequence[Tensor]) -> Tensor:
        (x,) = operands
        if x.dtype == F16 and m.model.opset < 20:
            x = m.model.cast(x, F32)
        return m.model.node(op, [x], BOOL, x.shape)

    return write


def _wide(write: Writer) -> Writer:
    return lambda m, operands: m.in_f32(write, operands)


def _bits(op: str) -> Writer:
    return lambda m, operands: m.bits(op, *operands)


WRITERS: dict[str, Writer] = {
    **{fn: _plain(op) for fn, op in {
        "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "abs": "Abs", "sign": "Sign",
        "floor": "Floor", "ceil": "Ceil", "round": "Round", "exp": "Exp", "log": "Log",
        "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "sigmoid": "Sigmoid",
        "erf": "Erf", "and": "And", "or": "Or", "not": "Not", "select": "Where", "tan": "Tan",
        "neg": "Neg",
    }.items()},
    **{fn: _relation(op) for fn, op in {
        "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
    }.items()},
    **{fn: _wide(write) for fn, write in {
        "log1p": _log1p, "expm1": _expm1, "rsqrt": _rsqrt, "log2": _log2,
        "mod": lambda m, x: m.modulo(*x), "floordiv": lambda m, x: m.floor_divide(*x),
    }.items()},
    **{fn: _bits(op) for fn, op in {
        "bitand": "BitwiseAnd", "bitor": "BitwiseOr", "bitxor": "BitwiseXor",
        "invert": "BitwiseNot",
    }.items()},
    "ne": _not_equal, "trunc": _trunc, "gelu": _gelu, "isnan": _test("IsNaN"),
    "isinf": _test("IsInf"), "pow": lambda m, x: m.power(*x),
    "maximum": lambda m, x: m.extreme("Max", *x), "minimum": lambda m, x: m.extreme("Min", *x),
    "shl": lambda m, x: m.shift(x[0], x[1], left=True),
    "shr": lambda m, x: m.shift(x[0], x[1], left=False),
}  # fmt: skip
