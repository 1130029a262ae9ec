"""Products: matrices, linear layers, einsum."""

from __future__ import annotations

import re
import string

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node
from stagefuse.onnx.record import op


@op("MatMul")
def _matmul(n: Node) -> str:
    return f"{n.x(0)} @ {n.x(1)}"


@op("Gemm", unread=["broadcast"])
def _gemm(n: Node) -> str:
    """alpha * A' @ B' + beta * C; a plain layer is `nn.linear`."""
    plain = n.attr("alpha", 1.0) == n.attr("beta", 1.0) == 1.0 and not n.attr("transA", 0)
    if plain and n.attr("transB", 0) and (n.maybe(2) is None or n.val(2).rank == 1):
        scope = n.layer(n.val(1), n.maybe(2))
        if scope is not None:
            return f"nn.linear({n.x(0)}, {scope})"
    a = f"transpose({n.x(0)})" if n.attr("transA", 0) else n.x(0)
    b = f"transpose({n.x(1)})" if n.attr("transB", 0) else n.x(1)
    alpha, beta = n.attr("alpha", 1.0), n.attr("beta", 1.0)
    text = f"{a} @ {b}"
    scale = repr(alpha) if n.val(0).dtype.is_float else str(int(alpha))
    text = text if alpha == 1.0 else f"{scale} * ({text})"
    if n.maybe(2) is None or beta == 0.0:
        return text
    shift = repr(beta) if n.val(0).dtype.is_float else str(int(beta))
    return f"{text} + {n.x(2)}" if beta == 1.0 else f"{text} + {shift} * {n.x(2)}"


@op("Einsum")
def _einsum(n: Node) -> str:
    """The equation as index notation."""
    equation = re.sub(r"\s", "", n.attr("equation", ""))
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(n.inputs):
        raise Refused(f"{len(terms)} terms for {len(n.inputs)} inputs", attribute="equation")
    expanded = [_letters(t, n.val(k).rank) for k, t in enumerate(terms)]
    dots = max((t for t in expanded), key=lambda t: sum(c.isdigit() for c in t))
    wide = [c for c in dots if c.isdigit()]
    if not arrow:
        joined = left.replace(",", "").replace("...", "")
        once = sorted(c for c in set(joined) if joined.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    result = [*re.sub(r"\.\.\.", "".join(wide), right)]
    return _as_notation(n, expanded, result)


def _letters(term: str, rank: int) -> list[str]:
    """One index for each axis; those of `...` are digits, counted from the last."""
    named = term.replace("...", "")
    count = rank - len(named)
    if count < 0 or (count and "..." not in term):
        raise Refused(f"the term `{term}` for {rank} dimensions", attribute="equation")
    at = term.find("...")
    digits = [str(k) for k in range(count - 1, -1, -1)]
    return [*term] if at < 0 else [*term[:at], *digits, *term[at + 3 :]]


def _as_notation(n: Node, terms: list[list[str]], result: list[str]) -> str:
    used = list(dict.fromkeys(c for t in terms for c in t))
    if any(c not in string.ascii_letters + string.digits for c in used):
        raise Refused("the equation has a sign that is no letter", attribute="equation")
    names = {c: _index(c) for c in used}
    sizes: dict[str, object] = {}
    for k, term in enumerate(terms):
        for c, size in zip(term, n.val(k).shape, strict=True):
            if sizes.get(c) is None or str(sizes[c]) == "1":
                sizes[c] = size
    factors = []
    for k, term in enumerate(terms):
        name, shape = n.bound(n.val(k), "factor"), n.val(k).shape
        at = [_at(names[c], size, sizes[c]) for c, size in zip(term, shape, strict=True)]
        factors.append(f"{name}[{', '.join(at)}]" if at else name)
    product = " * ".join(factors)
    summed = [names[c] for c in used if c not in result]
    text = f"sum[{', '.join(summed)}] {product}" if summed else product
    if not result:
        return text
    return n.define(n.hint, [names[c] for c in result], text).text


def _at(index: str, size: object, whole: object) -> str:
    """A size of 1 is broadcast."""
    return "0" if str(size) == "1" and str(whole) != "1" else index


def _index(letter: str) -> str:
    if letter.isdigit():
        return f"d{letter}"
    return letter if letter.islower() else f"{letter.lower()}{letter.lower()}"
