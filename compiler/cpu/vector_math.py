"""Elementary functions as LLVM IR that the loop vectoriser can widen.

Each function of `FUNCTIONS` becomes one always-inline LLVM function per type: straight-line
arithmetic, selects and integer operations on bit patterns, no branches. The f32 forms of exp, exp2,
expm1, log, log2, tanh, erf and sigmoid work in f32; the others compute in f64 and round.
Polynomials are Chebyshev fits of the function named beside them on the reduced range, computed with
300-bit arithmetic and rounded. Range reduction follows Cody and Waite. pow keeps the logarithm in
two doubles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from stagefuse.compiler.operators import BITS, integer_of

from .exact import MAGIC, MAGIC_BITS, Pair, fast_two_sum, two_product, two_sum
from .ir import Code, Value
from .trigonometry import cos, sin, tan

Function: TypeAlias = Callable[..., Value]

LOG2E = 1.4426950408889634
INF = float("inf")
NAN = float("nan")
MANTISSA = {"float": 23, "double": 52}
BIAS = {"float": 127, "double": 1023}
# ln 2 as a part with trailing zeros, so that products with small integers are exact, and the rest.
LN2_HIGH = {"float": 0.693145751953125, "double": 0.6931471803691238}
LN2_LOW = {"float": 1.4286068203094173e-06, "double": 1.9082149292705877e-10}

# (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
EXP_F32 = (
    0.5, 0.16666576266288757, 0.041666556149721146, 0.008363178931176662, 0.0013926184037700295,
)  # fmt: skip
# (exp(r) - 1 - r - r^2 / 2) / r^3 on the same range
EXP_F64 = (
    0.16666666666666666, 0.04166666666666667, 0.008333333333333333, 0.0013888888888883748,
    0.00019841269841266415, 2.4801587325547743e-05, 2.7557319239957097e-06, 2.75572736431103e-07,
    2.5052078002329456e-08, 2.0914686968086876e-09, 1.6084327883952603e-10,
)  # fmt: skip
# (log(1 + f) - f + f^2 / 2) / f^3 on 1 + f in sqrt(1/2) .. sqrt(2)
LOG_F32 = (
    0.3333333432674408, -0.24999989569187164, 0.2000001072883606, -0.1666800081729889,
    0.14286524057388306, -0.12450743466615677, 0.11037783324718475, -0.10646191984415054,
    0.1053086444735527, -0.062015000730752945,
)  # fmt: skip
# (log((1 + s) / (1 - s)) - 2 s) / s^3 in z = s^2 on 0 .. (3 - 2 sqrt(2))^2
LOG_F64 = (
    0.6666666666666666, 0.4000000000000088, 0.28571428570803614, 0.22222222391713917,
    0.18181795640132906, 0.15386239702814658, 0.13268773138656886, 0.13086626147840102,
)  # fmt: skip
# (tanh(a) - a) / a^3 in a^2 on a <= 0.625
TANH_F32 = (
    -0.3333333432674408, 0.13333304226398468, -0.053959257900714874, 0.02176891826093197,
    -0.008343945257365704, 0.002292744815349579,
)  # fmt: skip
# erf(a) / a - 1 in a^2 on a <= 0.875
ERF_F32 = (
    0.12837916612625122, -0.37612634897232056, 0.11283735185861588, -0.026861706748604774,
    0.00520704872906208, -0.0008214570698328316, 8.690368849784136e-05,
)  # fmt: skip
ERF_F64 = (
    0.1283791670955126, -0.3761263890318374, 0.11283791670954353, -0.026866170644942594,
    0.005223977623059443, -0.0008548326845690305, 0.00012055324561705379,
    -1.492538720169797e-05, 1.6456607597388118e-06, -1.6289242608284092e-07,
    1.4122777660357666e-08, -8.666276629203472e-10,
)  # fmt: skip
# log(erfc(a)) on 0.85 .. 4
LOG_ERFC_F32 = (
    0.00031657854560762644, -1.1302415132522583, -0.6317639350891113, -0.11019758135080338,
    0.026533789932727814, -0.004822977818548679, 0.0006186288082972169, -5.0587914302013814e-05,
    2.158171582777868e-06, -2.5520099811160435e-08,
)  # fmt: skip
# exp(a^2) erfc(a) (1 + 2 a) in t = (a - 2) / (a + 2) on a in 0.85 .. 6
ERFCX_F64 = (
    1.2769783815525286, -0.09276382658574607, -0.166030397615288, 0.1640512800334698,
    -0.05422000099216006, -0.008034015085255343, 0.008722653879884988, 0.0012713390848915378,
    -0.0014568140252295028, -0.00045434338722475834, 0.00020636833320398327,
    0.00015107001505139365, -1.5231579708759332e-06, -3.663729408176031e-05,
    -1.3387310730533525e-05, 4.531069003301263e-06, 4.779187268822775e-06,
)  # fmt: skip
# log2 of the normal distribution function of -a, on a <= 14, where it weighs as that function
GELU_F32 = (
    -1.0, -1.1511051654815674, -0.45920851826667786, -0.05249524116516113, 0.007062098942697048,
    -0.00013594022311735898, -0.00018658884800970554, 3.9463215216528624e-05,
    -2.842030426108977e-06,
)  # fmt: skip
# 2^f on |f| <= 1/2
EXP2_F32 = (
    1.0, 0.6931471824645996, 0.24022650718688965, 0.05550359562039375, 0.009618062525987625,
    0.0013390984386205673, 0.00015462868032045662,
)  # fmt: skip
TWO_THIRDS = (0.6666666666666666, 3.700743415417188e-17)


def power_of_two(c: Code, k: Value, kind: str) -> Value:
    """2^k for an integer k in the range of normal numbers."""
    return (k + BIAS[kind]).shl(MANTISSA[kind]).as_float(kind)


def scale(c: Code, p: Value, k: Value) -> Value:
    """p 2^k for p in 1/2 .. 2 and k in -2^15 .. 2^15 or so, rounded once."""
    return c.call(f"sf.scale.{SUFFIX[p.type]}", p.type, p, k)


def scale_text(llvm_type: str, level: str, lanes: int = 1) -> str:
    """The function behind `scale`.

    AVX-512 has an instruction for it. Elsewhere two powers of two are multiplied by, the second
    one 0 where the result is: a subnormal result takes a microcode assist of some hundred cycles.
    """
    code = Code(lanes)
    p, k = code.value("%p", llvm_type), code.value("%k", integer_of(llvm_type))
    if level == "v4":
        short, of = k.to("trunc", "i32"), "" if lanes == 1 else f"v{lanes}"
        result = code.call(f"llvm.ldexp.{of}f{BITS[llvm_type]}.{of}i32", llvm_type, p, short)
    else:
        vanishes = k.compare("lt", -(BIAS[llvm_type] + MANTISSA[llvm_type]))
        half = vanishes.select(code.const(0, k.type), k.ashr(1))
        rest = power_of_two(code, k - half, llvm_type)
        rest = vanishes.select(code.const(0.0, llvm_type), rest)
        result = (p * power_of_two(code, half, llvm_type)) * rest
    name = f"sf.scale.{SUFFIX[llvm_type]}"
    return function_text(name, [p, k], code, result)


def function_text(
    name: str, args: Sequence[Value], code: Code, result: Value, linkage: str = "internal "
) -> str:
    """The LLVM text of a function without effects."""
    listed = ", ".join(a.listed_text for a in args)
    head = f"define {linkage}{result.listed} @{name}({listed}) alwaysinline {{"
    return "\n".join([head, "entry:", *code.lines, f"  ret {result.listed_text}", "}"])


def clamp(c: Code, x: Value, low: float, high: float) -> Value:
    """x within limits; NaN stays."""
    above = x.compare("gt", high).select(c.const(high, x.type), x)
    return above.compare("lt", low).select(c.const(low, x.type), above)


def nearest(c: Code, x: Value, scale: float) -> Pair:
    """x * scale rounded to an integer, as float and as integer."""
    shifted = c.fma(x, scale, MAGIC[x.type])
    return shifted - MAGIC[x.type], shifted.bits() - MAGIC_BITS[x.type]


def int_to_float(c: Code, k: Value, kind: str) -> Value:
    """A small integer of the float's width, without a conversion instruction."""
    return (k + MAGIC_BITS[kind]).as_float(kind) - MAGIC[kind]


def copysign(c: Code, magnitude: Value, sign: Value) -> Value:
    """A magnitude, which is not negative, with a sign; in f32 by its bits.

    LLVM takes a sign from before the rounding that made it, from an f64, and the sign of what
    becomes an f16 from there by a conversion that no processor has.
    """
    if magnitude.type == "double":
        return c.intrinsic("copysign", magnitude, sign)
    return (magnitude.bits() ^ (sign.bits() & 0x80000000)).as_float(magnitude.type)


def reduce_ln2(c: Code, x: Value) -> tuple[Value, Value, Value]:
    """(r, k) with x = k ln 2 + r, and k as an integer."""
    k, bits = nearest(c, x, LOG2E)
    r = c.fma(-k, LN2_HIGH[x.type], x)
    return c.fma(-k, LN2_LOW[x.type], r), k, bits


def exp_near_zero(c: Code, r: Value) -> Value:
    """e^r for f32, |r| <= ln(2) / 2."""
    return c.fma(c.fma(c.polynomial(r, EXP_F32), r, 1.0), r, 1.0)


def exp(c: Code, x: Value, low: Value | None = None) -> Value:
    """e^x; of x + low if a low part is given."""
    own = c.own_exp(x) if low is None else None
    return exp_of_any(c, x, low) if own is None else own


def exp_of_any(c: Code, x: Value, low: Value | None = None) -> Value:
    """The same, with nothing that not all targets have."""
    # far below where the result vanishes, since a result that almost does takes an assist
    limits = (-1000.0, 89.0) if x.type == "float" else (-2000.0, 710.0)
    r, _, k = reduce_ln2(c, clamp(c, x, *limits))
    if low is not None:
        r = r + low
    if x.type == "float":
        p = exp_near_zero(c, r)
    else:
        tail = c.fma(c.polynomial(r, EXP_F64), r * (r * r), (r * r) * 0.5)
        p = (r + tail) + 1.0
    return scale(c, p, k)


def exp2(c: Code, x: Value) -> Value:
    """2^x: what is left of x less an integer is exact."""
    limits = (-1000.0, 129.0) if x.type == "float" else (-2000.0, 1025.0)
    limited = clamp(c, x, *limits)
    k, bits = nearest(c, limited, 1.0)
    f = limited - k
    if x.type == "float":
        return scale(c, c.polynomial(f, EXP2_F32), bits)
    r = f * 0.6931471805599453
    tail = c.fma(c.polynomial(r, EXP_F64), r * (r * r), (r * r) * 0.5)
    return scale(c, (r + tail) + 1.0, bits)


def expm1(c: Code, x: Value) -> Value:
    if x.type == "float":
        return expm1_of_f32(c, x)
    r, _, k = reduce_ln2(c, clamp(c, x, -60.0, 710.0))
    p = r + c.fma(c.polynomial(r, EXP_F64), r * (r * r), (r * r) * 0.5)
    half = power_of_two(c, k - 1, x.type)  # half of 2^k, which may overflow
    result = c.fma(p, half, half - 0.5) * 2.0
    return absolute(c, x).compare("lt", 1e-17).select(x, result)


def expm1_of_f32(c: Code, x: Value) -> Value:
    """2^k r + (2^k - 1) and 2^k of what else makes up e^r - 1, where r = x - k times the high part
    of ln 2 is exact: 1 unit for two roundings, and little for the rest."""
    limited = clamp(c, x, -60.0, 89.0)
    k, bits = nearest(c, limited, LOG2E)
    high, low = c.fma(-k, LN2_HIGH["float"], limited), k * -LN2_LOW["float"]
    r = high + low
    tail = c.fma(c.polynomial(r, EXP_F32) * r, r, low)
    half = power_of_two(c, bits - 1, "float")  # half of 2^k, which may overflow
    result = c.fma(tail, half, c.fma(high, half, half - 0.5)) * 2.0
    return absolute(c, x).compare("lt", 2.0**-25).select(x, result)


def absolute(c: Code, x: Value) -> Value:
    return c.intrinsic("fabs", x)


def split_exponent(c: Code, x: Value) -> tuple[Value, Value]:
    """(m, k) with x = m 2^k and m in sqrt(1/2) .. sqrt(2), for positive finite x."""
    kind, mantissa = x.type, MANTISSA[x.type]
    smallest = 2.0 ** (2 - (1 << (30 - mantissa if kind == "float" else 62 - mantissa)))
    root = 0x3F3504F3 if kind == "float" else 0x3FE6A09E667F3BCD
    tiny = x.compare("lt", smallest)
    scaled = tiny.select(x * 2.0 ** (mantissa + 2), x)
    bits = scaled.bits() - root
    k = bits.ashr(mantissa) - tiny.select(c.const(mantissa + 2, bits.type), c.const(0, bits.type))
    m = ((bits & ((1 << mantissa) - 1)) + root).as_float(kind)
    return m, int_to_float(c, k, kind)


def log_limits(c: Code, x: Value, result: Value) -> Value:
    """The logarithm's result with its special cases put in."""
    special = x.compare("eq", INF).select(x, c.const(NAN, x.type))
    special = x.compare("eq", 0.0).select(c.const(-INF, x.type), special)
    return (x.compare("gt", 0.0) & x.compare("lt", INF)).select(result, special)


def log_near_one(c: Code, f: Value, carry: Value | None = None, k: Value | None = None) -> Value:
    """log(1 + f) + k ln 2 + carry for f64, with one rounding of note."""
    s = f / (f + 2.0)
    z = s * s
    half = f * f * 0.5
    low = s * c.fma(c.polynomial(z, LOG_F64), z, half)
    if k is None:
        return f - (half - low)
    extra = k * LN2_LOW["double"]
    if carry is not None:
        extra = extra + carry
    return c.fma(k, LN2_HIGH["double"], -((half - (low + extra)) - f))


def log(c: Code, x: Value) -> Value:
    m, k = split_exponent(c, x)
    f = m - 1.0
    if x.type == "double":
        return log_limits(c, x, log_near_one(c, f, None, k))
    return log_limits(c, x, log_of_f32(c, f, k, LOG_F32))


def log_of_f32(c: Code, f: Value, k: Value, coefficients: Sequence[float]) -> Value:
    """log(1 + f) + k ln 2."""
    square = f * f
    tail = c.fma(c.polynomial(f, coefficients), square * f, k * LN2_LOW["float"])
    return c.fma(k, LN2_HIGH["float"], f + c.fma(square, -0.5, tail))


def log2_of_f32(c: Code, f: Value, k: Value, coefficients: Sequence[float]) -> Value:
    """log2(1 + f) + k."""
    square, e = f * f, LOG2E - 1.0
    tail = c.fma(c.polynomial(f, coefficients), square * f, square * -0.5)
    return k + (f + c.fma(tail, LOG2E, f * e))


def log2(c: Code, x: Value) -> Value:
    m, k = split_exponent(c, x)
    if x.type == "float":
        return log_limits(c, x, log2_of_f32(c, m - 1.0, k, LOG_F32))
    part = log_near_one(c, m - 1.0)
    low = c.fma(part, 2.0355273740931033e-17, c.fma(part, LOG2E, -(part * LOG2E)))
    return log_limits(c, x, (k + part * LOG2E) + low)


def log1p(c: Code, x: Value) -> Value:
    if x.type == "float":
        return log1p_of_f32(c, x)
    u = x + 1.0
    lost = u.compare("ge", 2.0).select((x - u) + 1.0, x - (u - 1.0)) / u
    m, k = split_exponent(c, u)
    result = log_limits(c, u, log_near_one(c, m - 1.0, lost, k))
    return absolute(c, x).compare("lt", 1e-17).select(x, result)


def log1p_of_f32(c: Code, x: Value) -> Value:
    """log(u) of u = 1 + x, of which what rounding lost is added to the mantissa; where u needs no
    power of two, their sum is x, exactly."""
    u, lost = one_and(x)
    m, k = split_exponent(c, u)
    down = k.compare("gt", 100.0).select(c.const(100.0, x.type), k)  # beyond, nothing is lost
    bits = (down + MAGIC[x.type]).bits() - MAGIC_BITS[x.type]
    lost = lost * power_of_two(c, -bits, x.type)
    result = log_of_f32(c, (m - 1.0) + lost, k, LOG_F32)
    return signed_as(log_limits(c, u, result), x)


def one_and(x: Value) -> Pair:
    """1 + x, and what its rounding lost."""
    u = x + 1.0
    part = u - 1.0
    return u, (x - part) + (1.0 - (u - part))


def signed_as(result: Value, x: Value) -> Value:
    """A function's result that has the sign of x, where it may have lost that of a zero."""
    return (result.bits() | (x.bits() & 0x80000000)).as_float(x.type)


def tanh(c: Code, x: Value) -> Value:
    a = absolute(c, x)
    if x.type == "double":
        t = expm1(c, clamp(c, a, 0.0, 22.0) * 2.0)
        return copysign(c, t / (t + 2.0), x)
    e = exp(c, clamp(c, a, 0.0, 10.0) * 2.0)
    large = 1.0 - c.quotient(2.0, e + 1.0)
    return copysign(c, a.compare("lt", 0.625).select(tanh_near_zero(c, a), large), x)


def tanh_near_zero(c: Code, a: Value) -> Value:
    """tanh a for f32, |a| <= 0.625."""
    z = a * a
    return c.fma(a * z, c.polynomial(z, TANH_F32), a)


def sigmoid(c: Code, x: Value) -> Value:
    e = exp(c, -absolute(c, x))
    d = e + 1.0
    q = x.compare("ge", 0.0).select(c.const(1.0, x.type), e) / d
    return c.fma(-q, e - (d - 1.0), q)  # makes up for most of what rounding d lost


def erf(c: Code, x: Value) -> Value:
    a = absolute(c, x)
    z = a * a
    if x.type == "float":
        small = c.fma(c.polynomial(z, ERF_F32), a, a)
        large = 1.0 - exp(c, c.polynomial(clamp(c, a, 0.0, 4.0), LOG_ERFC_F32))
    else:
        small = c.fma(c.polynomial(z, ERF_F64), a, a)
        b = clamp(c, a, 0.0, 6.0)
        scaled = c.polynomial((b - 2.0) / (b + 2.0), ERFCX_F64) / (b * 2.0 + 1.0)
        large = 1.0 - exp(c, -(b * b)) * scaled
    return copysign(c, a.compare("lt", 0.875).select(small, large), x)


def gelu(c: Code, x: Value) -> Value:
    """x Phi(x), with Phi(-a) = 2^p(a) for f32: right to two units of the argument."""
    if x.type == "double":
        return x * ((erf(c, x * 0.7071067811865476) + 1.0) * 0.5)
    a = clamp(c, absolute(c, x), 0.0, 14.0)
    power = clamp(c, c.polynomial(a, GELU_F32), -127.0, 0.0)  # 2^-127 counts as 0
    k, bits = nearest(c, power, 1.0)
    tail = c.polynomial(power - k, EXP2_F32) * power_of_two(c, bits, "float")
    return x * x.compare("ge", 0.0).select(1.0 - tail, tail)


def rsqrt(c: Code, x: Value) -> Value:
    return 1.0 / c.intrinsic("sqrt", x)


def log_pair(c: Code, x: Value) -> Pair:
    """log x in two doubles, for positive finite x."""
    m, k = split_exponent(c, x)
    f = m - 1.0
    d, d_low = two_sum(m, c.const(1.0, "double"))
    s = f / d
    s_low = (c.fma(-s, d, f) - s * d_low) / d
    z, z_low = two_product(c, s, s)
    z_low = c.fma(s * 2.0, s_low, z_low)
    p, p_low = two_product(c, z, c.const(TWO_THIRDS[0], "double"))
    p_low = p_low + c.fma(z, TWO_THIRDS[1], z_low * TWO_THIRDS[0])
    p_low = c.fma(z * z, c.polynomial(z, LOG_F64[1:]), p_low)
    q, q_low = two_product(c, s, p)
    q_low = q_low + c.fma(s, p_low, s_low * p)
    near, lost = fast_two_sum(s * 2.0, q)
    near_low = lost + (q_low + s_low * 2.0)
    high, lost = two_sum(k * LN2_HIGH["double"], near)
    return fast_two_sum(high, lost + c.fma(k, LN2_LOW["double"], near_low))


def pow(c: Code, x: Value, y: Value) -> Value:
    if x.type == "float":
        return pow_of_f32(c, x, y)
    a = absolute(c, x)
    high, low = log_pair(c, a)
    product, rest = two_product(c, high, y)
    rest = c.fma(low, y, rest)
    limited = clamp(c, product, -800.0, 800.0)
    magnitude = exp(c, limited, product.compare("eq", limited).select(rest, 0.0))
    return pow_limits(c, x, y, magnitude)


def pow_of_f32(c: Code, x: Value, y: Value) -> Value:
    a, b = absolute(c, x).to("fpext", "double"), y.to("fpext", "double")
    magnitude = exp(c, log(c, a) * b)
    return pow_limits(c, x, y, magnitude.to("fptrunc", "float"))


def pow_limits(c: Code, x: Value, y: Value, magnitude: Value) -> Value:
    """pow from |x|^|y| of finite arguments: zeros, infinities, signs, NaN."""
    a, one = absolute(c, x), c.const(1.0, x.type)
    zero, inf = c.const(0.0, x.type), c.const(INF, x.type)
    up = y.compare("gt", 0.0)
    to_zero = up.select(zero, inf)
    magnitude = a.compare("eq", 0.0).select(to_zero, magnitude)
    magnitude = a.compare("eq", INF).select(up.select(inf, zero), magnitude)
    endless = absolute(c, y).compare("eq", INF)
    grows = (a.compare("gt", 1.0) ^ y.compare("lt", 0.0)).select(inf, zero)
    magnitude = endless.select(a.compare("eq", 1.0).select(one, grows), magnitude)
    whole = c.intrinsic("trunc", y).compare("eq", y)
    half = y * 0.5
    odd = whole & c.intrinsic("trunc", half).compare("ne", half)
    negative = x.bits().compare("lt", 0)
    signed = (negative & odd).select(-magnitude, magnitude)
    undefined = x.compare("lt", 0.0) & x.compare("gt", -INF) & (whole ^ 1)
    nan = c.const(NAN, x.type)
    result = (undefined | x.is_nan() | y.is_nan()).select(nan, signed)
    return (x.compare("eq", 1.0) | y.compare("eq", 0.0)).select(one, result)


FUNCTIONS: dict[str, tuple[Function, int]] = {
    "exp": (exp, 1), "exp2": (exp2, 1), "log": (log, 1), "log2": (log2, 1), "log1p": (log1p, 1),
    "expm1": (expm1, 1), "tanh": (tanh, 1), "erf": (erf, 1), "gelu": (gelu, 1),
    "sigmoid": (sigmoid, 1),
    "sin": (sin, 1), "cos": (cos, 1), "tan": (tan, 1), "rsqrt": (rsqrt, 1), "pow": (pow, 2),
}  # fmt: skip
SUFFIX = {"float": "f32", "double": "f64"}


def symbol(name: str, llvm_type: str) -> str:
    """The LLVM name of a function for a type."""
    return f"sf.{name}.{SUFFIX[llvm_type]}"


def definition(name: str, llvm_type: str) -> str:
    """The LLVM text of one function."""
    function, arity = FUNCTIONS[name]
    code = Code()
    args = [code.value(f"%x{i}", llvm_type) for i in range(arity)]
    result = function(code, *args)
    return function_text(symbol(name, llvm_type), args, code, result)
