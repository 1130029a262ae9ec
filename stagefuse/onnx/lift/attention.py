"""Attention written out, as `nn.attend`."""

from __future__ import annotations

import math

from stagefuse.dsl.dims import Expr, as_expr

from .algebra import near, scaled
from .terms import Rule, Term, Terms, integers, named, positional
from .views import permutation


def attend(terms: Terms, term: Term) -> Term | None:
    """softmax(q @ k^T * scale) @ v for every head, with a bias of the scores where there is one."""
    if term.kind != "binary" or term.value != "@" or term.rank != 4 or term.type is None:
        return None
    probs, v = term.args
    if not probs.is_call("nn.softmax") or v.rank != 4 or "axis" in named(probs):
        return None
    scores, bias = probs.args[0], None
    if scores.kind == "binary" and scores.value == "+":
        products = [_product(a) for a in scores.args]
        at = next((n for n, p in enumerate(products) if p is not None), None)
        if at is None:
            return None
        scores, bias = scores.args[at], scores.args[1 - at]
    found = _product(scores)
    if found is None:
        return None
    scale, q, k = found
    if q.type is None or k.type is None or v.type is None:
        return None
    if not q.type.shape[1] == k.type.shape[1] == v.type.shape[1]:
        return None
    depth = q.type.shape[3].as_int()
    if depth is None or k.type.shape[3] != q.type.shape[3]:
        return None
    if k.is_call("nn.repeat_heads") and v.is_call("nn.repeat_heads") and k.args[1] is v.args[1]:
        k, v = k.args[0], v.args[0]
    more = {"bias": bias} if bias is not None else {}
    if not near(scale, 1 / math.sqrt(depth), term):
        more["scale"] = terms.literal(scale)
    return terms.call("nn.attend", q, k, v, like=term, **more)


def _product(term: Term) -> tuple[float, Term, Term] | None:
    """The scale, q and k of q @ k^T, scaled before or after."""
    found = scaled(term)
    if found[1].kind != "binary" or found[1].value != "@":
        return None
    left, right = (scaled(t) for t in found[1].args)
    if permutation(right[1]) != (0, 1, 3, 2):
        return None
    inner = scaled(right[1].args[0])
    if left[1].rank != 4 or inner[1].rank != 4:
        return None
    return found[0] * left[0] * right[0] * inner[0], left[1], inner[1]


def masked(terms: Terms, term: Term) -> Term | None:
    """Scores that a mask replaces: causal attention, where no row is masked whole."""
    if term.kind != "binary" or term.value != "@" or term.rank != 4:
        return None
    probs, v = term.args
    if not probs.is_call("nn.softmax") or "axis" in named(probs):
        return None
    chosen = probs.args[0]
    if not chosen.is_call("select") or (chosen.args[2].number or 0.0) > -1e30:
        return None  # beside any score that is kept, the exponential of the others is 0
    if not _is_causal(chosen.args[0], chosen):
        return None
    plain = terms.call("nn.softmax", chosen.args[1], like=probs)
    found = attend(terms, _typed(terms.make("binary", "@", plain, v), term))
    if found is None:
        return None
    return terms.call("nn.attend", *positional(found), like=term, causal=terms.literal(True),
                      **named(found))  # fmt: skip


def _typed(term: Term, like: Term) -> Term:
    term.type = term.type or like.type
    return term


def _is_causal(mask: Term, scores: Term) -> bool:
    """iota(S)[None, :] - iota(T)[:, None] <= S - T."""
    if mask.kind != "binary" or mask.value != "<=" or scores.type is None:
        return False
    t, s = scores.type.shape[2:]
    past = integers(mask.args[1])
    if past is None or s - t != as_expr(past[0]) or mask.args[0].kind != "binary":
        return False
    if mask.args[0].value != "-":
        return False
    columns, rows = mask.args[0].args
    return _is_range(columns, s, 0) and _is_range(rows, t, 1)


def _is_range(term: Term, size: Expr, axis: int) -> bool:
    """iota(n)[None, :] or iota(n)[:, None], where n is the size."""
    if term.kind != "sub" or not term.args[0].is_call("iota") or term.args[0].type is None:
        return False
    new = [n for n, t in enumerate(term.args[1:]) if t.kind == "literal"]
    return new == [axis] and term.args[0].type.shape[0] == size


def repeat_heads(terms: Terms, term: Term) -> Term | None:
    """[B, G, 1, S, D] broadcast along its third axis, as heads."""
    if not term.is_call("reshape") or not term.args[0].is_call("broadcast_to"):
        return None
    wide = term.args[0]
    inserted = wide.args[0]
    if wide.type is None or term.type is None or inserted.kind != "sub":
        return None
    new = [n for n, t in enumerate(inserted.args[1:]) if t.kind == "literal"]
    x = inserted.args[0]
    if new != [2] or x.type is None or x.rank != 4 or wide.rank != 5:
        return None
    b, g, times, s, d = wide.type.shape
    if x.type.shape != (b, g, s, d) or term.type.shape != (b, g * times, s, d):
        return None
    count = times.as_int()
    if count is None:
        return None
    return terms.call("nn.repeat_heads", x, terms.literal(count), like=term)


RULES: tuple[Rule, ...] = (attend, masked, repeat_heads)
