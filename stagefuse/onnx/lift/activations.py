"""Activations and norms written out in arithmetic, as functions of the library."""

from __future__ import annotations

import math

from .algebra import factors, is_product, near, pair, scaled, scalings, shifted
from .terms import Rule, Term, Terms, integers, named, positional


def gelu(terms: Terms, term: Term) -> Term | None:
    """0.5 * x * (1 + erf(x / sqrt(2))), and the same by tanh."""
    if not is_product(term):
        return None
    for sum_ in factors(term)[1]:
        one, inner = shifted(sum_)
        if one != 1.0 or not inner.is_call("erf", "tanh"):
            continue
        name = "nn.gelu" if inner.is_call("erf") else "nn.gelu_tanh"
        for x in _gelu_of(inner, term):
            coefficient, rest = factors(term, (x, sum_))
            if near(coefficient, 0.5, term) and _are(rest, x, sum_):
                return terms.call(name, x, like=term)
    return None


def _gelu_of(inner: Term, like: Term) -> list[Term]:
    """What x may be in erf(x / sqrt(2)) or tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))."""
    wanted = math.sqrt(0.5) if inner.is_call("erf") else math.sqrt(2 / math.pi)
    found = [t for c, t in scalings(inner.args[0]) if near(c, wanted, like)]
    if inner.is_call("erf"):
        return found
    return [x for t in found for x in _cubic_bases(t) if _is_cubic(t, x)]


def _are(found: list[Term], a: Term, b: Term) -> bool:
    return found in ([a, b], [b, a])


def _cubic_bases(term: Term) -> list[Term]:
    """What x may be in x + 0.044715 * x^3 or x * (1 + 0.044715 * x^2)."""
    return list(term.args) if term.kind == "binary" and term.value in ("+", "*") else []


def _is_cubic(term: Term, x: Term) -> bool:
    both = pair(term.args, lambda t: t is x)
    if both is None:
        return False
    rest, power = both[1], 3
    if term.value == "*":
        one, rest = shifted(rest)
        power = 2
        if one != 1.0:
            return False
    coefficient, found = factors(rest, (x,))
    return found == [x] * power and near(coefficient, 0.044715, x)


def silu(terms: Terms, term: Term) -> Term | None:
    """x * sigmoid(x)."""
    if not is_product(term):
        return None
    both = pair(term.args, lambda t: t.is_call("sigmoid"))
    if term.value != "*" or both is None or both[0].args[0] is not both[1]:
        return None
    return terms.call("nn.silu", both[1], like=term)


def hard_sigmoid(terms: Terms, term: Term) -> Term | None:
    """clamp(x / 6 + 1/2, 0, 1) and clamp(x + 3, 0, 6) / 6."""
    if term.is_call("clamp") and _bounds(term) == (0.0, 1.0):
        half, inner = shifted(term.args[0])
        for scale, x in scalings(inner) if near(half, 0.5, term) else ():
            if near(scale, 1 / 6, term):
                return terms.call("nn.hard_sigmoid", x, like=term)
    if is_product(term):
        scale, clamped = scaled(term)
        if near(scale, 1 / 6, term) and _is_clamped(clamped):
            return terms.call("nn.hard_sigmoid", shifted(clamped.args[0])[1], like=term)
    return None


def _is_clamped(term: Term) -> bool:
    """clamp(x + 3, 0, 6)."""
    return (
        term.is_call("clamp") and _bounds(term) == (0.0, 6.0) and shifted(term.args[0])[0] == 3.0
    )


def hard_swish(terms: Terms, term: Term) -> Term | None:
    """x * hard_sigmoid(x), and x * clamp(x + 3, 0, 6) / 6."""
    if not is_product(term):
        return None
    both = pair(term.args, lambda t: t.is_call("nn.hard_sigmoid"))
    if term.value == "*" and both is not None and both[0].args[0] is both[1]:
        return terms.call("nn.hard_swish", both[1], like=term)
    for clamped in factors(term)[1]:
        if _is_clamped(clamped):
            x = shifted(clamped.args[0])[1]
            scale, rest = factors(term, (x, clamped))
            if near(scale, 1 / 6, term) and _are(rest, x, clamped):
                return terms.call("nn.hard_swish", x, like=term)
    return None


def _bounds(term: Term) -> tuple[float | None, float | None]:
    return (term.args[1].number, term.args[2].number) if len(term.args) == 3 else (None, None)


def softmax(terms: Terms, term: Term) -> Term | None:
    """exp(x - max(x)) over its sum, along one axis."""
    if term.kind != "binary" or term.value != "/" or term.rank is None:
        return None
    e, total = term.args
    kept = _reduced(total, "sum", term.rank)
    if not e.is_call("exp") or kept is None or kept[0] is not e:
        return None
    inner = e.args[0]
    if inner.kind != "binary" or inner.value != "-":
        return None
    if _reduced(inner.args[1], "max", term.rank) != (inner.args[0], kept[1]):
        return None
    more = {} if kept[1] == term.rank - 1 else {"axis": terms.literal(kept[1])}
    return terms.call("nn.softmax", inner.args[0], like=term, **more)


def _reduced(term: Term, kind: str, rank: int) -> tuple[Term, int] | None:
    """x and the axis of sum(x, axis=1, keepdims=True), or of sum(x, axis=1)[:, None]."""
    inserted = None
    if term.kind == "sub":
        new = [n for n, t in enumerate(term.args[1:]) if t.kind == "literal"]
        if len(new) != 1 or any(t.kind not in ("literal", "slice") for t in term.args[1:]):
            return None
        inserted, term = new[0], term.args[0]
    if not term.is_call(kind) or len(positional(term)) != 1:
        return None
    options = named(term)
    axis = integers(options["axis"]) if "axis" in options else None
    if axis is None or len(axis) != 1 or ("keepdims" in options) == (inserted is not None):
        return None
    found = axis[0] % rank
    return (positional(term)[0], found) if inserted in (None, found) else None


def reciprocal_root(terms: Terms, term: Term) -> Term | None:
    """1 / sqrt(x) is rsqrt(x), and x / sqrt(y) is x * rsqrt(y)."""
    if term.kind != "binary" or term.value != "/" or not term.args[1].is_call("sqrt"):
        return None
    inner = terms.call("rsqrt", *term.args[1].args, like=term.args[1])
    if term.args[0].number == 1.0:
        return inner
    return terms.make("binary", "*", term.args[0], inner)


def layer_norm(terms: Terms, term: Term) -> Term | None:
    """centred * rsqrt(mean(centred^2) + eps) * weight + bias, along the last axis."""
    if term.kind != "binary" or term.value not in ("+", "*") or term.type is None:
        return None
    product, bias = term, None
    if term.value == "+":
        both = pair(list(term.args), lambda t: _is_vector(t, term))
        if both is None:
            return None
        bias, product = both
    coefficient, found = factors(product)
    if coefficient != 1.0 or len(found) != 3:
        return None
    roots = [t for t in found if t.is_call("rsqrt")]
    scales = [t for t in found if _is_vector(t, term)]
    rest = [t for t in found if t not in roots and t not in scales]
    if not len(roots) == len(scales) == len(rest) == 1:
        return None
    return _normed(terms, term, rest[0], roots[0].args[0], scales[0], bias)


def _normed(
    terms: Terms, term: Term, base: Term, under: Term, scale: Term, bias: Term | None
) -> Term | None:
    """`base` over the root of `under`, scaled: a layer norm, or an RMS norm."""
    eps, rest = shifted(under)
    squares = _mean_of(rest, term)
    if not eps or squares is None or factors(squares, (base,)) != (1.0, [base, base]):
        return None
    number = terms.literal(eps)
    if base.kind == "binary" and base.value == "-" and _mean_of(base.args[1], term) is base.args[0]:
        ends = (("weight", ""),) if bias is None else (("weight", ""), ("bias", ""))
        scope = terms.make("scope", ends, scale, *((bias,) if bias is not None else ()))
        return terms.call("nn.layer_norm", base.args[0], scope, like=term, eps=number)
    if bias is not None:
        return None
    scope = terms.make("scope", (("weight", ""),), scale)
    return terms.call("nn.rms_norm", base, scope, like=term, eps=number)


def _mean_of(term: Term, like: Term) -> Term | None:
    """x of mean(x, axis=-1, keepdims=True)."""
    if not term.is_call("mean") or like.rank is None:
        return None
    options = named(term)
    axis = integers(options["axis"]) if "axis" in options else None
    keeps = options.get("keepdims")
    if axis is None or keeps is None or keeps.value[1] is not True:
        return None
    return positional(term)[0] if axis in ((-1,), (like.rank - 1,)) else None


def _is_vector(term: Term, like: Term) -> bool:
    """A stored vector as long as the last axis."""
    if term.kind != "weight" or term.type is None or like.type is None or term.rank != 1:
        return False
    return term.type.dtype == like.type.dtype and term.type.shape[0] == like.type.shape[-1]


def mean_of_squares(terms: Terms, term: Term) -> Term | None:
    """x ** 2.0 is x * x."""
    if term.kind == "binary" and term.value == "**" and term.args[1].number == 2.0:
        if term.args[0].is_operand:
            return terms.make("binary", "*", term.args[0], term.args[0])
    return None


def plain_number(terms: Terms, term: Term) -> Term | None:
    """A number takes the dtype that it meets; x * 1.0 is x, and so is maximum(x, -infinity)."""
    if term.kind == "binary" or term.is_call("maximum", "minimum", "select"):
        numbers = [n for n, a in enumerate(term.args) if a.kind == "call" and a.number is not None]
        for n in numbers:
            others = [a for k, a in enumerate(term.args) if k != n and a.is_operand]
            if others and others[-1].type is not None:
                if others[-1].type.dtype.name == term.args[n].value[0] and others[-1].rank:
                    args = [a.args[0] if k == n else a for k, a in enumerate(term.args)]
                    return terms.make(term.kind, term.value, *args)
    if term.kind == "binary" and term.value == "*":
        both = pair(term.args, lambda t: t.kind == "literal" and t.value == ("float", 1.0))
        if both is not None and both[1].type is not None and both[1].type.dtype.is_float:
            return both[1]
    if term.is_call("maximum") and not term.value[1]:
        both = pair(term.args, lambda t: t.number == -math.inf)
        if both is not None and both[1].type is not None and both[1].type.dtype.is_float:
            return both[1]
    return None


RULES: tuple[Rule, ...] = (
    plain_number, mean_of_squares, reciprocal_root, gelu, silu, hard_sigmoid, hard_swish, softmax,
    layer_norm,
)  # fmt: skip
