"""The scalar functions: what each computes, on which dtypes, how exactly and at what cost.

`meaning` is over NumPy arrays: floats of any dtype are float64, integers are of their own NumPy
dtype and wrap, bools are bool. `apply` adds the rounding to a dtype. Backends print these
functions; nothing else in the compiler knows what one of them computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from stagefuse.dsl.dtypes import DType, in_class
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.numpy_later import later, np

Array: TypeAlias = "np.ndarray[Any, Any]"

EXACT = 0.0
"""Tolerance of a function whose result is a value, not a rounding."""
ROUNDED = 0.5
"""Tolerance of a correctly rounded function, in units in the last place."""


@frozen
class ScalarFn:
    """One pointwise function.

    `accepts` lists the classes of dtype its operands may have: number, float, int, bool or any.
    `result` is "same" (the last operand's dtype), "bool" or "given" (cast). `identity` e has
    f(x, e) = x. `associative` is in exact arithmetic. `flops` is a cost per element for
    schedules; `ulp` the largest error of an implementation in units in the last place, of the
    result or, if `by_argument`, of the argument.
    """

    name: str
    arity: int
    accepts: tuple[str, ...]
    meaning: Callable[..., Array]
    doc: str
    result: str = "same"
    commutative: bool = False
    associative: bool = False
    idempotent: bool = False
    identity: float | int | bool | None = None
    flops: int = 1
    ulp: float = EXACT
    by_argument: bool = False

    def takes(self, dtype: DType) -> bool:
        """Whether operands may have this dtype."""
        return any(_belongs(dtype, name) for name in self.accepts)


def _belongs(dtype: DType, name: str) -> bool:
    return dtype.is_bool if name == "bool" else in_class(dtype, name)


def wide(array: Array) -> Array:
    """The array as `meaning` takes it: floats of any kind as float64, the rest as it is."""
    if array.dtype.kind in "biu":
        return array
    return array.astype(np.float64)


def apply(name: str, args: Sequence[Array], dtype: DType, rounded: bool = True) -> Array:
    """The function of wide arrays, rounded to `dtype` unless told otherwise; wide again.

    `cast` always rounds. A double rounding of `+ - * / sqrt` from float64 to f32 and smaller is
    the single one (Figueroa, "When is double rounding innocuous?", 1995).
    """
    with np.errstate(all="ignore"):
        if name == "cast":
            return convert(args[0], dtype)
        found = np.asarray(FUNCTIONS[name].meaning(*args))
    return round_to(found, dtype) if rounded else found


def round_to(array: Array, dtype: DType) -> Array:
    """Float64 values rounded to a float dtype, still float64; other arrays as they are."""
    if not dtype.is_float or dtype.name == "f64":
        return array
    return narrow(array, dtype).astype(np.float64)


def narrow(array: Array, dtype: DType) -> Array:
    """Float64 values as `dtype.numpy`, rounded once to nearest even; f8 saturates, NaN stays.

    Infinities stay where the dtype has them; what overflows f32, in which small floats are
    computed, is one.
    """
    with np.errstate(all="ignore"):
        if dtype.bits == 8:
            computed = np.asarray(array).astype(np.float32)
            stays = np.isnan(array) if dtype.name == "f8e4m3" else ~np.isfinite(computed)
            array = np.where(stays, array, _saturated(array, dtype))
        if dtype.is_small_float and dtype.name != "f16":
            array = _to_odd(np.asarray(array, np.float64))
        return np.asarray(array).astype(dtype.numpy)


def _saturated(array: Array, dtype: DType) -> Array:
    """Float64 values within the finite ones of a dtype; NaN stays."""
    return np.clip(array, -dtype.largest, dtype.largest)


def _to_odd(array: Array) -> Array:
    """Float64 rounded to f32 so that one more rounding to fewer than 23 bits is the only one.

    An inexact value gets an odd last bit, which is never a tie (Boldo and Melquiond, 2008).
    """
    near = np.atleast_1d(array.astype(np.float32))
    inexact = np.isfinite(near) & (near.astype(np.float64) != array)
    bits = near.view(np.int32)
    away = inexact & (np.abs(near.astype(np.float64)) > np.abs(array))
    bits = np.where(inexact, (bits - away) | 1, bits)
    return bits.astype(np.int32).view(np.float32).reshape(array.shape)


def convert(array: Array, dtype: DType) -> Array:
    """A wide array as a wide array of another dtype: what `cast` computes."""
    with np.errstate(all="ignore"):
        if dtype.is_bool:
            return np.asarray(array != 0)
        if dtype.is_float:
            array = array.astype(np.float64)
            return round_to(_saturated(array, dtype) if dtype.bits == 8 else array, dtype)
        if array.dtype.kind != "f":
            return array.astype(dtype.numpy)
        info = np.iinfo(dtype.numpy)
        whole = np.trunc(np.where(np.isnan(array), 0.0, array))
        low, high = whole <= info.min, whole >= info.max
        inside = np.where(low | high, 0.0, whole).astype(dtype.numpy)
        ends = np.where(low, info.min, info.max).astype(dtype.numpy)
        return np.where(low | high, ends, inside).astype(dtype.numpy)


def lowest(dtype: DType) -> float | int | bool:
    """The least value of a dtype: the maximum of nothing."""
    if dtype.is_bool:
        return False
    if dtype.is_int:
        return int(np.iinfo(dtype.numpy).min)
    return -dtype.largest if dtype.name == "f8e4m3" else -math.inf


def highest(dtype: DType) -> float | int | bool:
    """The greatest value of a dtype: the minimum of nothing."""
    if dtype.is_bool:
        return True
    if dtype.is_int:
        return int(np.iinfo(dtype.numpy).max)
    return -lowest(dtype)


def identity(kind: str, dtype: DType) -> float | int | bool:
    """What a reduction of nothing gives: the identity of its function."""
    if kind in ("max", "argmax"):
        return lowest(dtype)
    if kind in ("min", "argmin"):
        return highest(dtype)
    if kind in ("any", "all"):
        return kind == "all"
    start = 1 if kind == "prod" else 0
    return float(start) if dtype.is_float else start


def _is_float(array: Array) -> bool:
    return np.asarray(array).dtype.kind == "f"


def _floordiv(a: Array, b: Array) -> Array:
    if _is_float(a):
        return np.asarray(np.floor_divide(a, b))
    safe = np.where(b == 0, np.ones_like(b), b)
    return np.where(b == 0, np.zeros_like(a), np.floor_divide(a, safe))


def _mod(a: Array, b: Array) -> Array:
    if _is_float(a):
        return np.asarray(np.mod(a, b))
    safe = np.where(b == 0, np.ones_like(b), b)
    return np.where(b == 0, np.zeros_like(a), np.mod(a, safe))


def _pow(a: Array, b: Array) -> Array:
    """Integers by squaring, wrapping; a negative power of 1 and -1 is exact, of others 0."""
    a, b = np.broadcast_arrays(a, b)
    if _is_float(a):  # of one number for all powers, 0.5, NumPy makes a square root
        return np.asarray(np.power(a.reshape(-1), b.flatten())).reshape(a.shape)
    result, square, left = np.ones_like(a), a.copy(), np.maximum(b, 0)
    while left.any():
        result = np.where(left & 1, result * square, result).astype(a.dtype)
        square, left = (square * square).astype(a.dtype), left >> 1
    one = np.ones_like(a)
    inverse = np.where(a == 1, one, np.where((a == -one) & (b & 1 == 0), one, 0 * one))
    inverse = np.where((a == -one) & (b & 1 == 1) & (b < 0), a, inverse)
    return np.where(b < 0, inverse, result).astype(a.dtype)


def _shift(a: Array, count: Array, left: bool) -> Array:
    bits = np.asarray(a).dtype.itemsize * 8
    inside = (count >= 0) & (count < bits)
    by = np.where(inside, count, 0).astype(np.asarray(a).dtype)
    if left:
        return np.where(inside, np.left_shift(a, by), np.zeros_like(a))
    out = np.where(a < 0, np.full_like(a, -1), np.zeros_like(a)) if a.dtype.kind == "i" else 0 * a
    return np.where(inside, np.right_shift(a, by), out).astype(np.asarray(a).dtype)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _erf(x: Array) -> Array:
    flat = np.asarray(x, np.float64)
    values = [math.erf(v) for v in flat.ravel().tolist()]
    return np.array(values, np.float64).reshape(flat.shape)


def _gelu(x: Array) -> Array:
    return x * (0.5 * (1 + _erf(x * math.sqrt(0.5))))


def _sign(x: Array) -> Array:
    if np.asarray(x).dtype.kind == "u":
        return np.asarray(x != 0, np.asarray(x).dtype)
    return np.asarray(np.sign(x), np.asarray(x).dtype)


def _maximum(a: Array, b: Array) -> Array:
    """NumPy's, but 0 is greater than -0, as in IEEE 754-2019, section 9.6."""
    found = np.asarray(np.maximum(a, b))
    return np.where(a == b, np.where(np.signbit(a), b, a), found) if _is_float(found) else found


def _minimum(a: Array, b: Array) -> Array:
    found = np.asarray(np.minimum(a, b))
    return np.where(a == b, np.where(np.signbit(a), a, b), found) if _is_float(found) else found


NUMBER, FLOAT, INT, BOOLS, ANY = ("number",), ("float",), ("int",), ("bool",), ("any",)
BITS = ("int", "bool")

_TABLE = (
    ScalarFn("add", 2, NUMBER, later.add, "a + b; integers wrap",
             commutative=True, associative=True, identity=0, ulp=ROUNDED),
    ScalarFn("sub", 2, NUMBER, later.subtract, "a - b; integers wrap", identity=0, ulp=ROUNDED),
    ScalarFn("mul", 2, NUMBER, later.multiply, "a * b; integers wrap",
             commutative=True, associative=True, identity=1, ulp=ROUNDED),
    ScalarFn("div", 2, FLOAT, later.divide, "a / b", identity=1, flops=4, ulp=ROUNDED),
    ScalarFn("reciprocal", 1, FLOAT, lambda x: 1 / x, "1 / x, where x is from 2^-60 to 2^60",
             flops=4, ulp=ROUNDED),
    ScalarFn("ratio", 2, FLOAT, later.divide,
             "a / b, where b is from 2^-100 to 2^125, infinite or NaN", identity=1, flops=2, ulp=1),
    ScalarFn("floordiv", 2, NUMBER, _floordiv,
             "the floor of a / b; on integers 0 where b is 0", flops=6, ulp=1),
    ScalarFn("mod", 2, NUMBER, _mod,
             "a - b * (a // b), with the sign of b; on integers 0 where b is 0",
             flops=8, ulp=1),
    ScalarFn("pow", 2, NUMBER, _pow,
             "a to the power b; a negative integer power is 0 unless a is 1 or -1",
             identity=1, flops=30, ulp=4),
    ScalarFn("neg", 1, NUMBER, later.negative, "-x; integers wrap"),
    ScalarFn("abs", 1, NUMBER, later.abs, "|x|; the lowest integer stays", idempotent=True),
    ScalarFn("sign", 1, NUMBER, _sign, "-1, 0 or 1; NaN stays", idempotent=True),
    ScalarFn("floor", 1, FLOAT, later.floor, "the greatest whole number <= x", idempotent=True),
    ScalarFn("ceil", 1, FLOAT, later.ceil, "the least whole number >= x", idempotent=True),
    ScalarFn("round", 1, FLOAT, later.rint, "the nearest whole number, ties to even",
             idempotent=True),
    ScalarFn("trunc", 1, FLOAT, later.trunc, "x without its fraction", idempotent=True),
    ScalarFn("exp", 1, FLOAT, later.exp, "e to the power x", flops=12, ulp=2),
    ScalarFn("log", 1, FLOAT, later.log, "the natural logarithm", flops=14, ulp=2),
    ScalarFn("log2", 1, FLOAT, later.log2, "the logarithm to base 2", flops=14, ulp=2),
    ScalarFn("log1p", 1, FLOAT, later.log1p, "log(1 + x), accurate near 0", flops=16, ulp=3),
    ScalarFn("expm1", 1, FLOAT, later.expm1, "exp(x) - 1, accurate near 0", flops=16, ulp=3),
    ScalarFn("sqrt", 1, FLOAT, later.sqrt, "the square root; NaN below 0", flops=4, ulp=ROUNDED),
    ScalarFn("rsqrt", 1, FLOAT, lambda x: 1 / np.sqrt(x), "1 / sqrt(x)", flops=8, ulp=2),
    ScalarFn("sin", 1, FLOAT, later.sin, "the sine of radians", flops=16, ulp=3),
    ScalarFn("cos", 1, FLOAT, later.cos, "the cosine of radians", flops=16, ulp=3),
    ScalarFn("tan", 1, FLOAT, later.tan, "the tangent of radians", flops=20, ulp=4),
    ScalarFn("tanh", 1, FLOAT, later.tanh, "the hyperbolic tangent", flops=18, ulp=3),
    ScalarFn("sigmoid", 1, FLOAT, _sigmoid, "1 / (1 + exp(-x))", flops=16, ulp=4),
    ScalarFn("erf", 1, FLOAT, _erf, "2 / sqrt(pi) times the integral of exp(-t * t) from 0 to x",
             flops=20, ulp=4),
    ScalarFn("gelu", 1, FLOAT, _gelu, "x times the normal distribution function of x",
             flops=16, ulp=2, by_argument=True),
    ScalarFn("isnan", 1, FLOAT, later.isnan, "whether x is NaN", result="bool"),
    ScalarFn("isinf", 1, FLOAT, later.isinf, "whether x is infinite", result="bool"),
    ScalarFn("eq", 2, ANY, later.equal, "a == b; NaN equals nothing", result="bool",
             commutative=True),
    ScalarFn("ne", 2, ANY, later.not_equal, "a != b", result="bool", commutative=True),
    ScalarFn("lt", 2, ANY, later.less, "a < b", result="bool"),
    ScalarFn("le", 2, ANY, later.less_equal, "a <= b", result="bool"),
    ScalarFn("gt", 2, ANY, later.greater, "a > b", result="bool"),
    ScalarFn("ge", 2, ANY, later.greater_equal, "a >= b", result="bool"),
    ScalarFn("and", 2, BOOLS, later.logical_and, "whether both are true", result="bool",
             commutative=True, associative=True, idempotent=True, identity=True),
    ScalarFn("or", 2, BOOLS, later.logical_or, "whether one is true", result="bool",
             commutative=True, associative=True, idempotent=True, identity=False),
    ScalarFn("not", 1, BOOLS, later.logical_not, "whether it is false", result="bool"),
    ScalarFn("bitand", 2, BITS, later.bitwise_and, "the bits set in both",
             commutative=True, associative=True, idempotent=True, identity=-1),
    ScalarFn("bitor", 2, BITS, later.bitwise_or, "the bits set in either",
             commutative=True, associative=True, idempotent=True, identity=0),
    ScalarFn("bitxor", 2, BITS, later.bitwise_xor, "the bits that differ",
             commutative=True, associative=True, identity=0),
    ScalarFn("invert", 1, BITS, later.invert, "the bits not set"),
    ScalarFn("shl", 2, INT, lambda a, n: _shift(a, n, True),
             "a shifted left; 0 for a count below 0 or not below the width", identity=0),
    ScalarFn("shr", 2, INT, lambda a, n: _shift(a, n, False),
             "a shifted right, keeping the sign; only sign bits for a count out of range",
             identity=0),
    ScalarFn("maximum", 2, ANY, _maximum, "the greater of two, 0 over -0; NaN if one is NaN",
             commutative=True, associative=True, idempotent=True),
    ScalarFn("minimum", 2, ANY, _minimum, "the less of two, -0 before 0; NaN if one is NaN",
             commutative=True, associative=True, idempotent=True),
    ScalarFn("select", 3, ANY, later.where, "a where the condition (bool) holds, else b"),
    ScalarFn("cast", 1, ANY, lambda x: x,
             "x in another dtype: to f8 and from float to integer saturating (NaN gives integer"
             " 0), to a narrower integer wrapping, to bool x != 0", result="given", ulp=ROUNDED),
)  # fmt: skip

FUNCTIONS: dict[str, ScalarFn] = {fn.name: fn for fn in _TABLE}
