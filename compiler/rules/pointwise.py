"""Rules for pointwise functions. All keep every bit, but for those of `pow`, which get nearer.

`x * 0`, `x - x` and `x / x` of floats stay: they may be NaN. So does `x + 0.0`, which turns -0.0
into 0.0, while `x + -0.0` and `x - 0.0` are x. `pow(x, 0.5)` is not `sqrt(x)` at -0.0 and -inf: it
is 0.0 and inf.
"""

from __future__ import annotations

import math

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Map, Ref
from stagefuse.compiler.scalar import FUNCTIONS, highest, lowest
from stagefuse.dsl.dtypes import BOOL, F8E5M2, DType
from stagefuse.dsl.numpy_later import np

from .record import Made, Match, Number, Rule

COMMUTATIVE = tuple(name for name, f in FUNCTIONS.items() if f.commutative)
IDEMPOTENT = tuple(n for n, f in FUNCTIONS.items() if f.idempotent and f.arity == 2)
PROJECTIONS = tuple(n for n, f in FUNCTIONS.items() if f.idempotent and f.arity == 1)
WHOLE = ("floor", "ceil", "round", "trunc")
NEGATED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
SMALLEST_NORMAL = {"f64": 2.0**-1022}
"""Reciprocals are kept normal; small floats are computed in f32, whose smallest is 2**-126."""


def _known(m: Match) -> Made:
    numbers = [m.number(ref) for ref in m.operands]
    if any(n is None for n in numbers):
        return None
    arrays = [
        scalar.wide(np.asarray(n, m.b.type(ref).dtype.numpy))
        for n, ref in zip(numbers, m.operands, strict=True)
    ]
    assert isinstance(m.primitive, Map)
    found = scalar.apply(m.primitive.fn, arrays, m.type.dtype)
    return m.full(found.item())


def _constant_last(m: Match) -> Made:
    a, b = m.operands
    if m.number(a) is None or m.number(b) is not None:
        return None
    assert isinstance(m.primitive, Map)
    return m.map(m.primitive.fn, b, a)


def _is_identity(fn: str, value: Number, dtype: DType) -> bool:
    if fn in ("add", "sub") and dtype.is_float:
        return value == 0 and math.copysign(1, value) == (-1 if fn == "add" else 1)
    if fn == "bitand":
        return value == (True if dtype.is_bool else highest(dtype) if dtype.kind == "uint" else -1)
    if fn == "floordiv":
        return dtype.is_int and value == 1
    if fn in ("maximum", "minimum"):
        least = lowest(dtype) if fn == "maximum" else highest(dtype)
        return repr(value) == repr(least) and not (dtype.is_float and dtype.bits == 8)
    return FUNCTIONS[fn].identity is not None and value == FUNCTIONS[fn].identity


def _identity(m: Match) -> Made:
    assert isinstance(m.primitive, Map)
    value = m.number(m.operands[1])
    if value is None or not _is_identity(m.primitive.fn, value, m.dtype):
        return None
    return m.operands[0]


def _absorbing(m: Match) -> Made:
    assert isinstance(m.primitive, Map)
    value = m.number(m.operands[1])
    absorbs = {"and": False, "or": True, "mul": 0, "bitand": 0, "mod": 1}[m.primitive.fn]
    if value is None or value != absorbs or m.dtype.is_float:
        return None
    return m.full(0 if m.primitive.fn == "mod" else value)


def _same(m: Match) -> Made:
    return m.operands[0] if m.operands[0] == m.operands[1] else None


def _with_itself(m: Match) -> Made:
    assert isinstance(m.primitive, Map)
    if m.operands[0] != m.operands[1] or m.dtype.is_float:
        return None
    return m.full({"eq": 1, "le": 1, "ge": 1}.get(m.primitive.fn, 0))


def _twice(m: Match) -> Made:
    """f(f(x))"""
    assert isinstance(m.primitive, Map)
    under = m.args(m.operands[0], m.primitive.fn)
    return None if under is None else m.operands[0]


def _whole(m: Match) -> Made:
    if m.args(m.operands[0], *WHOLE):
        return m.operands[0]
    under = m.args(m.operands[0], "cast")
    return m.operands[0] if under and not m.b.type(under[0]).dtype.is_float else None


def _inverse(m: Match) -> Made:
    assert isinstance(m.primitive, Map)
    under = m.args(m.operands[0], m.primitive.fn)
    return under[0] if under else None


def _abs(m: Match) -> Made:
    if m.dtype.kind == "uint":
        return m.operands[0]
    under = m.args(m.operands[0], "neg")
    return m.map("abs", under[0]) if under else None


def _add_negated(m: Match) -> Made:
    a, b = m.operands
    if under := m.args(b, "neg"):
        return m.map("sub", a, under[0])
    if under := m.args(a, "neg"):
        return m.map("sub", b, under[0])
    return None


def _subtract_negated(m: Match) -> Made:
    under = m.args(m.operands[1], "neg")
    return m.map("add", m.operands[0], under[0]) if under else None


def _signs(m: Match) -> Made:
    assert isinstance(m.primitive, Map)
    a, b = m.operands
    left, right, value = m.args(a, "neg"), m.args(b, "neg"), m.number(b)
    if left and right and (m.dtype.is_float or m.primitive.fn == "mul"):
        return m.map(m.primitive.fn, left[0], right[0])
    if left and value is not None and m.dtype.is_float:
        return m.map(m.primitive.fn, left[0], m.full(-value))
    return None


def _collected(m: Match) -> Made:
    """(x + 1) + 2"""
    assert isinstance(m.primitive, Map)
    under, last = m.args(m.operands[0], m.primitive.fn), m.number(m.operands[1])
    if not under or last is None or m.dtype.is_float:
        return None
    first = m.number(under[1])
    if first is None:
        return None
    return m.map(m.primitive.fn, under[0], m.map(m.primitive.fn, under[1], m.operands[1]))


def _cast(m: Match) -> Made:
    x = m.operands[0]
    if m.b.type(x).dtype == m.type.dtype:
        return x
    under = m.args(x, "cast")
    if not under:
        return None
    first, middle, last = m.b.type(under[0]).dtype, m.b.type(x).dtype, m.type.dtype
    if not holds(middle, first):
        return None
    # the way back saturates infinities
    if first == last == F8E5M2:
        return None
    # a float saturates where an integer wraps
    if middle.is_float and not first.is_float and last.is_int and not holds(last, first):
        return None
    return m.map("cast", under[0]) if first != last else under[0]


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of one dtype is one of another."""
    if wide == narrow or narrow.is_bool:
        return True
    if wide.is_bool:
        return False
    bits = narrow.bits - (narrow.kind == "int")
    if wide.is_float:
        if narrow.is_float:
            return narrow.digits <= wide.digits and narrow.exponent <= wide.exponent
        return bits <= wide.digits
    if narrow.is_float:
        return False
    signs = wide.kind == "int" or narrow.kind == "uint"
    return signs and bits <= wide.bits - (wide.kind == "int")


def _not(m: Match) -> Made:
    primitive, x = m.below(m.operands[0]), m.operands[0]
    if not isinstance(primitive, Map) or primitive.fn not in NEGATED:
        return None
    a, b = m.under(x)
    # a comparison with NaN is false, and so is its opposite
    if m.b.type(a).dtype.is_float and primitive.fn not in ("eq", "ne"):
        return None
    return m.map(NEGATED[primitive.fn], a, b)


def _select(m: Match) -> Made:
    condition, a, b = m.operands
    value = m.number(condition)
    if value is not None:
        return a if value else b
    if a == b:
        return a
    if under := m.args(condition, "not"):
        return m.map("select", under[0], b, a)
    if m.type.dtype == BOOL and (m.number(a), m.number(b)) == (True, False):
        return condition
    if m.type.dtype == BOOL and (m.number(a), m.number(b)) == (False, True):
        return m.map("not", condition)
    return None


def _pow(m: Match) -> Made:
    x, power = m.operands[0], m.number(m.operands[1])
    if power == 0:
        return m.full(1)
    if power == 2:
        return m.map("mul", x, x)
    if power == 3:
        return m.map("mul", m.map("mul", x, x), x)
    if power not in (0.25, 0.5, 0.75, -0.5, -1) or not m.dtype.is_float:
        return None
    if power != -1:
        x = root = _root(m, x)
    if power in (0.25, 0.75):
        x = m.map("sqrt", x)
    if power == 0.75:
        x = m.map("mul", x, root)
    return x if power > 0 else m.map("div", m.full(1), x)


def _root(m: Match, x: Ref) -> Ref:
    """x ** 0.5 also of -0.0 and of -inf."""
    root = m.map("add", m.map("sqrt", x), m.full(0.0))
    below = m.map("eq", x, m.full(-math.inf), dtype=BOOL)
    return m.map("select", below, m.full(math.inf), root)


def _divide(m: Match) -> Made:
    value = m.number(m.operands[1])
    if not value or not math.isfinite(value) or abs(math.frexp(value)[0]) != 0.5:
        return None
    least = SMALLEST_NORMAL.get(m.dtype.name, 2.0**-126)
    reciprocal = 1 / value if abs(value) > 2.0**-1020 else math.inf
    if not least <= abs(reciprocal) < math.inf:
        return None
    if scalar.convert(np.asarray(reciprocal), m.dtype) != reciprocal:
        return None
    return m.map("mul", m.operands[0], m.full(reciprocal))


def _power_of_two(m: Match, ref: Ref) -> int | None:
    value = m.number(ref)
    if value is None or not m.dtype.is_int or value <= 1 or int(value) & (int(value) - 1):
        return None
    return int(value)


def _floor_divide(m: Match) -> Made:
    value = _power_of_two(m, m.operands[1])
    if value is None:
        return None
    return m.map("shr", m.operands[0], m.full(value.bit_length() - 1))


def _modulo(m: Match) -> Made:
    value = _power_of_two(m, m.operands[1])
    return None if value is None else m.map("bitand", m.operands[0], m.full(value - 1))


RULES = (
    Rule("known", Map, (), _known, "a function of numbers is a number"),
    Rule("constant-last", Map, COMMUTATIVE, _constant_last,
         "f(c, x) = f(x, c): one form, so that equal values are one node"),
    Rule("identity", Map,
         ("add", "sub", "mul", "div", "pow", "floordiv", "and", "or", "bitand", "bitor", "bitxor",
          "shl", "shr", "maximum", "minimum"), _identity, "f(x, e) = x"),
    Rule("absorbing", Map, ("and", "or", "mul", "bitand", "mod"), _absorbing,
         "x * 0 = 0, x % 1 = 0 on integers; x and false = false, x or true = true"),
    Rule("idempotent", Map, IDEMPOTENT, _same, "f(x, x) = x"),
    Rule("with-itself", Map, ("eq", "ne", "lt", "le", "gt", "ge", "sub", "bitxor"), _with_itself,
         "x = x, x - x = 0 without NaN and infinity"),
    Rule("projection", Map, PROJECTIONS, _twice, "f(f(x)) = f(x)"),
    Rule("whole", Map, WHOLE, _whole, "a whole number is rounded already"),
    Rule("inverse", Map, ("neg", "not", "invert"), _inverse, "f(f(x)) = x"),
    Rule("abs-of-negated", Map, ("abs",), _abs, "|-x| = |x|; an unsigned number is its own"),
    Rule("add-negated", Map, ("add",), _add_negated, "x + -y = x - y"),
    Rule("subtract-negated", Map, ("sub",), _subtract_negated, "x - -y = x + y"),
    Rule("signs", Map, ("mul", "div"), _signs, "-x * -y = x * y; -x * c = x * -c"),
    Rule("collected", Map, ("add", "mul", "bitand", "bitor", "bitxor"), _collected,
         "(x + a) + b = x + (a + b) modulo a power of two"),
    Rule("cast", Map, ("cast",), _cast, "a conversion that loses nothing needs no stop between"),
    Rule("not-compared", Map, ("not",), _not,
         "not x == y = x != y; not x < y = x >= y without NaN"),
    Rule("select", Map, ("select",), _select, "one arm, or the condition itself"),
    Rule("power", Map, ("pow",), _pow,
         "x * x and roots round once or twice where pow is within 4 units in the last place, at a"
         " tenth of the cost"),
    Rule("divide", Map, ("div",), _divide,
         "x / 2**k = x * 2**-k, where the factor is exact; a division costs four products"),
    Rule("floor-divide", Map, ("floordiv",), _floor_divide,
         "x // 2**k = x >> k for the floor, at a sixth of the cost"),
    Rule("modulo", Map, ("mod",), _modulo, "x % 2**k = x & 2**k - 1 with the divisor's sign"),
)  # fmt: skip
