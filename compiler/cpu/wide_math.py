"""Elementary functions of f32 over vectors, where those have what a single element has not.

In the text of a kernel such a function is one declared for an element, with forms for vectors named
beside it that LLVM's loop vectoriser chooses from (the vector function ABI). The definitions are
linked behind the passes and made part of the loops then. All of them come down to one form of a
whole vector, so that an element's result does not depend on where in a loop it stands.

A vector whose elements are all ordinary takes a branch. With AVX-512 an exponent and a mantissa are
an instruction each, which knows denormals, infinities, zeros and NaN (`vgetexpps`, `vgetmantps`;
Intel 64 and IA-32 Manual, volume 2). Polynomials are fits by least squares, driven towards the
least largest error, in 60-digit arithmetic, their coefficients rounded one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import trigonometry, vector_math
from .exact import MAGIC
from .ir import Code, Value
from .vector_math import INF, LOG2E, Function

LANES = {"v3": 8, "v4": 16}
WIDTHS = (2, 4, 8, 16, 32, 64)
"""Of the vectors that loops may be made of."""
INLINED = "\n; linked before the micro-kernels, and made part of the loops\n"
# (log(1 + f) - f + f^2 / 2) / f^3 on f in -1/4 .. 1/2, to 2^-27 of log(1 + f)
LOG = (
    0.3333345055580139, -0.2500010132789612, 0.19990812242031097, -0.16647067666053772,
    0.14478544890880585, -0.13163620233535767, 0.1046740710735321, -0.045099202543497086,
)  # fmt: skip
# (sin(r) - r) / r^3 and (cos(r) - 1 + r^2 / 2) / r^4 in r^2 on |r| <= pi / 4, to 2^-28 and 2^-33
SIN = (-0.16666655242443085, 0.008332190103828907, -0.0001951840822584927)
COS = (0.04166664555668831, -0.00138873013202101, 2.443066296109464e-05)
# log2((1 + s) / (1 - s)) / s in s^2 on 0 .. 1/25, to 2^-34
LOG2 = (
    2.8853900818368357, 0.9617966209768325, 0.577092457846215, 0.41120111449742724,
    0.348466535001444,
)  # fmt: skip
# (tanh(a) - a) / a^3 in a^2 on a <= 0.36, to 2^-30
TANH = (-0.33333319425582886, 0.1333223283290863, -0.05370189622044563, 0.019316518679261208)
# (tan(r) - r) / r^3 in r^2 on |r| <= pi / 4, to 2^-25.7 of tan(r)
TAN = (
    0.33333155512809753, 0.13338825106620789, 0.05340969190001488, 0.024434514343738556,
    0.0031143170781433582, 0.00938812643289566,
)  # fmt: skip
# pi / 2 in three f32 numbers, of which the second has 14 bits
PI_HALF = (1.5707963705062866, -4.371031536720693e-08, -1.074634630414406e-12)
TURNED = 1600.0
"""Up to where an argument less a multiple of pi / 2 comes out of three steps: multiples of at most
10 bits, whose products with the second number are exact."""


def split(c: Code, x: Value) -> tuple[Value, Value]:
    """(m, k) with x = m 2^k and m in 3/4 .. 3/2. Of zeros and infinities m is 1 and k infinite, of
    what is below 0 m is NaN, and of NaN both."""
    none = c.const(0.0, "float").listed_text
    m = _native(c, "mask.getmant", x.listed_text, "i32 15", none, ALL)
    exponents = [_native(c, "mask.getexp", v.listed_text, none, ALL) for v in (x, m)]
    return m, exponents[0] - exponents[1]


def scaled(c: Code, p: Value, k: Value) -> Value:
    """p 2^k for a whole number k, rounded once."""
    none = c.const(0.0, "float").listed_text
    return _native(c, "mask.scalef", p.listed_text, k.listed_text, none, ALL)


def whole(c: Code, x: Value) -> Value:
    """The nearest whole number."""
    none = c.const(0.0, "float").listed_text
    return _native(c, "mask.rndscale", x.listed_text, "i32 8", none, ALL)


def within(c: Code, x: Value, limit: float) -> Value:
    """x with a magnitude of at most a limit, which NaN becomes."""
    none, most = (c.const(v, "float").listed_text for v in (0.0, limit))
    return _native(c, "mask.range", x.listed_text, most, "i32 2", none, ALL)


ALL = "i16 -1, i32 4"
"""Every element, rounded as usual."""


def _native(c: Code, name: str, *passed: str) -> Value:
    """An instruction of AVX-512 on 16 elements."""
    kind = c.spelled("float")
    return c.pure(f"call {kind} @llvm.x86.avx512.{name}.ps.512({', '.join(passed)})", "float")


class VectorCode(Code):
    """The text of a function of vectors."""

    def own_exp(self, x: Value) -> Value | None:
        return exp(self, x) if x.type == "float" else None


def exp(c: Code, x: Value) -> Value:
    """e^x. With AVX-512 the power of two alone tells what is too large, too small, infinite or NaN:
    of these the rest, which means nothing then, becomes some number near 0."""
    if c.lanes != LANES["v4"]:
        return _exp_by_bits(c, x)
    k = whole(c, x * LOG2E)
    r = c.fma(-k, vector_math.LN2_HIGH["float"], x)
    r = c.fma(-k, vector_math.LN2_LOW["float"], r)
    return scaled(c, vector_math.exp_near_zero(c, within(c, r, 0.35)), k)


def _exp_by_bits(c: Code, x: Value) -> Value:
    """e^x, the power of two added to the exponent, where no result is subnormal or endless."""
    shifted = c.fma(x, LOG2E, MAGIC["float"])
    k = shifted - MAGIC["float"]
    r = c.fma(-k, vector_math.LN2_HIGH["float"], x)
    r = c.fma(-k, vector_math.LN2_LOW["float"], r)
    bits = vector_math.exp_near_zero(c, r).bits() + shifted.bits().shl(23)
    vanishes = x.compare("lt", -104.0)
    found = vanishes.select(c.const(0.0, "float"), bits.as_float("float"))
    ordinary = x.compare("le", 88.0) & (x.compare("ge", -87.0) | vanishes)
    return _unless(c, ordinary, found, lambda: vector_math.exp_of_any(c, x))


def exp2(c: Code, x: Value) -> Value:
    k = whole(c, x)
    return scaled(c, c.polynomial(within(c, x - k, 0.5), vector_math.EXP2_F32), k)


def gelu(c: Code, x: Value) -> Value:
    """As `vector_math.gelu`; beyond 14 what is left to 1 counts as 0."""
    a = vector_math.absolute(c, x)
    power = c.polynomial(a, vector_math.GELU_F32)
    power = a.compare("gt", 14.0).select(c.const(-1000.0, "float"), power)
    k = whole(c, power)
    tail = scaled(c, c.polynomial(power - k, vector_math.EXP2_F32), k)
    return x * x.compare("ge", 0.0).select(1.0 - tail, tail)


def log(c: Code, x: Value) -> Value:
    m, k = split(c, x)
    return vector_math.log_of_f32(c, m - 1.0, k, LOG)


def log2(c: Code, x: Value) -> Value:
    m, k = split(c, x)
    return vector_math.log2_of_f32(c, m - 1.0, k, LOG)


def log1p(c: Code, x: Value) -> Value:
    u, lost = vector_math.one_and(x)
    m, k = split(c, u)
    lost = u.compare("lt", INF).select(lost, 0.0)
    above = k.compare("gt", -200.0).select(k, c.const(-200.0, "float"))  # log1p(-1): k is infinite
    f = (m - 1.0) + scaled(c, lost, -above)
    return vector_math.signed_as(vector_math.log_of_f32(c, f, k, LOG), x)


def tanh(c: Code, x: Value) -> Value:
    """t / (t + 2) for t = e^2a - 1, but a polynomial near 0, where all roundings would count."""
    a = vector_math.absolute(c, x)
    limited = a.compare("gt", 10.0).select(c.const(10.0, "float"), a)
    k, bits = vector_math.nearest(c, limited, 2 * LOG2E)
    high = c.fma(-k, vector_math.LN2_HIGH["float"], limited * 2.0)
    r = c.fma(-k, vector_math.LN2_LOW["float"], high)
    two = vector_math.power_of_two(c, bits, "float")
    tail = c.fma(c.polynomial(r, vector_math.EXP_F32) * r, r, r)
    t = c.fma(tail, two, two - 1.0)
    z = a * a
    small = c.fma(a * z, c.polynomial(z, TANH), a)
    return vector_math.copysign(c, a.compare("lt", 0.35).select(small, t / (t + 2.0)), x)


def reduced(c: Code, a: Value) -> tuple[Value, Value, Value]:
    """The nearest multiple of pi / 2 and what a number up to `TURNED` is beyond it, in two parts.

    The first step is exact: it subtracts numbers of the same last place, 2^-23. What rounding loses
    of the second is added to the third, 2^-29 or less, whose own rounding is 2^-24 of that: far
    less than what is left of an f32 number, 2^-28 or more.
    """
    k, bits = vector_math.nearest(c, a, 2 / math.pi)
    first = c.fma(-k, PI_HALF[0], a)
    high = c.fma(-k, PI_HALF[1], first)
    low = c.fma(-k, PI_HALF[2], c.fma(-k, PI_HALF[1], first - high))
    return bits, high, low


def _of_quadrant(c: Code, x: Value, cosine: bool) -> Value:
    """The sine or the cosine: by f32 where all elements allow that."""
    a = vector_math.absolute(c, x)
    quadrant, high, low = reduced(c, a)
    r = high + low
    z = r * r
    parts = (
        c.fma(r * z, c.polynomial(z, SIN), r),
        c.fma(z * z, c.polynomial(z, COS), c.fma(z, -0.5, 1.0)),
    )
    even = (quadrant & 1).compare("eq", 0)
    size = even.select(*reversed(parts)) if cosine else even.select(*parts)
    sign = ((quadrant + 1 if cosine else quadrant) & 2).shl(30)
    if not cosine:
        sign = sign ^ (x.bits() & 0x80000000)
    found = (size.bits() ^ sign).as_float("float")
    slow = trigonometry.cos if cosine else trigonometry.sin
    return _unless(c, a.compare("le", TURNED), found, lambda: slow(c, x))


def sin(c: Code, x: Value) -> Value:
    return _of_quadrant(c, x, cosine=False)


def cos(c: Code, x: Value) -> Value:
    return _of_quadrant(c, x, cosine=True)


def tan(c: Code, x: Value) -> Value:
    """A polynomial t, or -1 / t. What rounding loses of the angle r is multiplied by 1 + t^2, the
    slope, and added to all but r, which is added last."""
    a = vector_math.absolute(c, x)
    quadrant, high, low = reduced(c, a)
    r = high + low
    lost, z = low - (r - high), r * r
    tail = r * (z * c.polynomial(z, TAN))
    t = r + tail
    t = r + (tail + c.fma(lost * t, t, lost))
    even = (quadrant & 1).compare("eq", 0)
    size = even.select(t, c.const(-1.0, "float")) / even.select(c.const(1.0, "float"), t)
    found = (size.bits() ^ (x.bits() & 0x80000000)).as_float("float")
    return _unless(c, a.compare("le", TURNED), found, lambda: trigonometry.tan(c, x))


def pow(c: Code, x: Value, y: Value) -> Value:
    """2^(y log2 x), the logarithm in f64, where x is positive and both are finite."""
    ordinary = x.compare("gt", 0.0) & x.compare("lt", INF)
    ordinary = ordinary & vector_math.absolute(c, y).compare("lt", INF)
    m, k = split(c, x)
    wide = m.to("fpext", "double")
    s = (wide - 1.0) / (wide + 1.0)
    log = c.fma(s, c.polynomial(s * s, LOG2), k.to("fpext", "double"))
    power = vector_math.clamp(c, log * y.to("fpext", "double"), -1000.0, 1000.0)
    whole = (power + MAGIC["double"]) - MAGIC["double"]
    part = (power - whole).to("fptrunc", "float")
    p = c.polynomial(part, vector_math.EXP2_F32)
    found = scaled(c, p, whole.to("fptrunc", "float"))
    return _unless(c, ordinary, found, lambda: vector_math.pow_of_f32(c, x, y))


SELDOM = '!{!"branch_weights", i32 1000, i32 1}'
"""Of a branch: the first way, as good as always."""


def _unless(c: Code, ordinary: Value, found: Value, other: Function) -> Value:
    """What was found where elements are ordinary; the other way is gone if one is not."""
    ask, go, done = (c.label(name) for name in ("ask", "other", "done"))
    c.branch(ask)
    c.start(ask)
    name = f"llvm.vector.reduce.and.v{c.lanes}i1"
    every = c.value(c.fresh(), "i1")
    c.line(f"{every.text} = call i1 @{name}({ordinary.listed_text})")
    c.branch_if(every, done, go, f", !prof {SELDOM}")
    c.start(go)
    with c.scope():
        chosen = ordinary.select(found, other())
    after = c.block
    c.branch(done)
    c.start(done)
    kind = c.spelled("float")
    phi = f"phi {kind} [ {found.text}, %{ask} ], [ {chosen.text}, %{after} ]"
    return c.emit(phi, "float")


def rem(c: Code, a: Value, b: Value) -> Value:
    """a - trunc(a / b) b, in f64.

    A quotient below 2^28 that is no whole number is 2^-24 from one, and its rounding in f64 less
    than that; the whole number times b has 52 bits, and what is left of a 24.
    """
    x, y = a.to("fpext", "double"), b.to("fpext", "double")
    quotient = x / y
    rest = c.fma(-c.intrinsic("trunc", quotient), y, x).to("fptrunc", "float")
    ordinary = vector_math.absolute(c, quotient).compare("lt", 2.0**28)
    ordinary = ordinary & vector_math.absolute(c, b).compare("lt", INF)
    found = vector_math.signed_as(rest, a)
    return _unless(c, ordinary, found, lambda: c.remainder(a, b))


FUNCTIONS: dict[str, tuple[Function, int]] = {
    "exp": (exp, 1), "exp2": (exp2, 1), "gelu": (gelu, 1),
    "sigmoid": (vector_math.sigmoid, 1), "erf": (vector_math.erf, 1),
    "log": (log, 1), "log2": (log2, 1), "log1p": (log1p, 1), "sin": (sin, 1), "cos": (cos, 1),
    "tan": (tan, 1), "tanh": (tanh, 1), "pow": (pow, 2), "rem": (rem, 2),
}  # fmt: skip
"""And how many operands each has. `rem` is there for an element only by way of a vector."""
ANYWHERE = ("sin", "cos", "tan", "rem", "exp", "sigmoid", "erf", "tanh")
"""What takes nothing of AVX-512."""


def is_wide(name: str, llvm_type: str, level: str) -> bool:
    """Whether a function of a type is one of vectors on a level of x86-64."""
    return llvm_type == "float" and name in (FUNCTIONS if level == "v4" else ANYWHERE)


def declarations(names: Sequence[str]) -> str:
    """The functions as a module declares them that knows no more of them."""
    lines, kept = [], []
    for number, name in enumerate(names):
        symbol, count = vector_math.symbol(name, "float"), FUNCTIONS[name][1]
        forms = []
        for width in WIDTHS:
            kind = f"<{width} x float>"
            lines.append(f"declare {kind} @{symbol}.x{width}({', '.join([kind] * count)}) #1")
            forms.append(f"_ZGV_LLVM_N{width}{'v' * count}_{symbol}({symbol}.x{width})")
            kept.append(f"ptr @{symbol}.x{width}")
        lines.append(f"declare float @{symbol}({', '.join(['float'] * count)}) #{number + 2}")
        lines.append(
            f"attributes #{number + 2} = {{ nounwind willreturn speculatable memory(none)"
            f' "vector-function-abi-variant"="{",".join(forms)}" }}'
        )
    lines.append("attributes #1 = { nounwind willreturn speculatable memory(none) }")
    lines.append(f"@{KEPT} = global [{len(kept)} x ptr] [{', '.join(kept)}]")
    return "\n".join(lines)


KEPT = "sf.kept"
"""A variable that names the forms, so that no pass before the vectoriser drops them."""


def definitions(names: Sequence[str], level: str) -> str:
    """The functions, to be linked with what declares them."""
    lanes = LANES[level]
    texts = [_definition(name, lanes) for name in names]
    widths = [width for width in (1, *WIDTHS) if width != lanes]
    texts += [_form(name, width, lanes) for name in names for width in widths]
    for kind, suffix in vector_math.SUFFIX.items():
        if any(f"@sf.scale.{suffix}" in text for text in texts):
            texts.append(vector_math.scale_text(kind, level, lanes))
    return "\n\n".join(texts)


def _definition(name: str, lanes: int) -> str:
    function, count = FUNCTIONS[name]
    code = VectorCode(lanes)
    args = [code.value(f"%x{i}", "float") for i in range(count)]
    symbol = f"{vector_math.symbol(name, 'float')}.x{lanes}"
    return vector_math.function_text(symbol, args, code, function(code, *args), "")


def _form(name: str, width: int, lanes: int) -> str:
    """A function of other vectors by that of a whole one: in parts, or with elements repeated."""
    symbol, count = vector_math.symbol(name, "float"), FUNCTIONS[name][1]
    kind, whole = f"<{width} x float>" if width > 1 else "float", f"<{lanes} x float>"
    lines: list[str] = []

    def emit(text: str) -> str:
        lines.append(f"  %v{len(lines)} = {text}")
        return f"%v{len(lines) - 1}"

    def taken(value: str, of: str, first: int, size: int, period: int) -> str:
        mask = ", ".join(f"i32 {first + i % period}" for i in range(size))
        return emit(f"shufflevector {of} {value}, {of} poison, <{size} x i32> <{mask}>")

    def called(part: int) -> str:
        passed = []
        for operand in range(count):
            value, of, first = f"%x{operand}", kind, part * lanes
            if width == 1:
                value = emit(f"insertelement {whole} poison, float {value}, i32 0")
                of = whole
            passed.append(f"{whole} " + taken(value, of, first, lanes, min(width, lanes)))
        return emit(f"call {whole} @{symbol}.x{lanes}({', '.join(passed)})")

    parts = [called(part) for part in range(max(1, width // lanes))]
    if width == 1:
        result = emit(f"extractelement {whole} {parts[0]}, i32 0")
    elif width < lanes:
        result = taken(parts[0], whole, 0, width, lanes)
    else:
        size = lanes
        while len(parts) > 1:
            size *= 2
            mask = ", ".join(f"i32 {i}" for i in range(size))
            of = f"<{size // 2} x float>"
            parts = [
                emit(f"shufflevector {of} {a}, {of} {b}, <{size} x i32> <{mask}>")
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        (result,) = parts
    listed = ", ".join(f"{kind} %x{i}" for i in range(count))
    end = "" if width == 1 else f".x{width}"
    head = f"define {kind} @{symbol}{end}({listed}) alwaysinline {{"
    return "\n".join([head, "entry:", *lines, f"  ret {kind} {result}", "}"])
