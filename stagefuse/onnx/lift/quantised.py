"""Stored tensors in integers with their scales, and values that are rounded as integers hold them.

A tensor, its scale and its zero point are one scope: `nn.dequantized(w.fc.weight)` has them as
`w.fc.weight.q`, `.scale` and, if it is not 0, `.zero`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layers import Part, scope
from .terms import Rule, Term, Terms, integers
from .views import is_new, is_whole


def dequantized(terms: Terms, term: Term) -> Term | None:
    """nn.dequantize of what is stored."""
    if not term.is_call("nn.dequantize") or term.args[0].kind != "weight":
        return None
    parts = _scaling(term.args[1:])
    if parts is None:
        return None
    stored = scope(terms, [(("q", ""), term.args[0]), *parts])
    return terms.call("nn.dequantized", stored, like=term)


def fake_quantized(terms: Terms, term: Term) -> Term | None:
    """nn.dequantize of nn.quantize with the same stored scale and zero point."""
    if not term.is_call("nn.dequantize") or not term.args[0].is_call("nn.quantize"):
        return None
    x, *given = term.args[0].args
    parts = _scaling(given)
    if parts is None or tuple(given) != term.args[1:]:
        return None
    return terms.call("nn.fake_quantize", x, scope(terms, parts), like=term)


def once(terms: Terms, term: Term) -> Term | None:
    """What is rounded once and then only laid out anew is not rounded again: (q * s) / s is less
    than 0.5 from q for all integers of 16 bits."""
    if not term.is_call("nn.fake_quantize"):
        return None
    laid, own = term.args
    while laid.is_call("reshape", "transpose"):
        laid = laid.args[0]
    is_same = laid.is_call("nn.fake_quantize") and laid.args[1] is own
    return term.args[0] if is_same else None


def _scaling(given: Sequence[Term]) -> list[tuple[Part, Term]] | None:
    """A scale, and a zero point if there is one, as parts of a scope."""
    found: list[tuple[Part, Term]] = []
    for end, term in zip(("scale", "zero"), given, strict=False):
        tensor, how = term, ""
        if term.kind == "sub":
            tensor, first, *rest = term.args
            if integers(first) == (0,) and not rest and tensor.rank == 1:
                how = "scalar"
            elif is_whole(first) and all(map(is_new, rest)):
                how = f"spread{len(rest)}"
            else:
                return None
        if tensor.kind != "weight":
            return None
        found.append(((end, how), tensor))
    return found


RULES: tuple[Rule, ...] = (dequantized, fake_quantized, once)
