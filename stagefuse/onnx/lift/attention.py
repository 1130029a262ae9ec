"""Attention written out, as `nn.attend`."""

from __future__ import annotations

import math

from stagefuse.dsl.dims import Expr, const

from .algebra import near, pair, scaled
from .terms import Rule, Term, Terms, named, positional
from .views import is_all, permutation, range_axis, size_of


def attend(terms: Terms, term: Term) -> Term | None:
    """softmax(q @ k^T * scale) @ v for every head, with a bias or mask of the scores where there
    is one."""
    if term.kind != "binary" or term.value != "@" or term.rank != 4 or term.type is None:
        return None
    probs, v = term.args
    if v.rank != 4 or not probs.is_call("nn.softmax", "nn.masked_softmax") or probs.value[1]:
        return None
    scores, *masks = probs.args
    more = _masks(terms, masks[0], term, v) if masks else {}
    if scores.kind == "binary" and scores.value == "+":
        products = [_product(terms, a) for a in scores.args]
        at = next((n for n, p in enumerate(products) if p is not None), None)
        if at is None:
            return None
        scores, bias = scores.args[at], scores.args[1 - at]
        only = _masks(terms, bias.args[0], term, v) if _is_fill(bias, -1e30) else {}
        more |= only if only.keys() == {"causal"} else {"bias": bias}
    found = _product(terms, scores)
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
    if not near(scale, 1 / math.sqrt(depth), term):
        more["scale"] = terms.literal(scale)
    return terms.call("nn.attend", q, k, v, like=term, **more)


def _product(terms: Terms, term: Term) -> tuple[float, Term, Term] | None:
    """The scale, q and k of q @ k^T, scaled before or after, or before heads were split."""
    found = scaled(term)
    if found[1].kind != "binary" or found[1].value != "@":
        return None
    left, right = (scaled(t) for t in found[1].args)
    if permutation(right[1]) != (0, 1, 3, 2):
        return None
    inner = scaled(right[1].args[0])
    if left[1].rank != 4 or inner[1].rank != 4:
        return None
    scale = found[0] * left[0] * right[0] * inner[0]
    (a, q), (b, k) = (_unscaled_heads(terms, t) for t in (left[1], inner[1]))
    return scale * a * b, q, k


def _unscaled_heads(terms: Terms, term: Term) -> tuple[float, Term]:
    """Heads as a coefficient times heads: of `nn.split_heads(x * c, n)`, c."""
    if not term.is_call("nn.split_heads"):
        return 1.0, term
    coefficient, x = scaled(term.args[0])
    if coefficient == 1.0 or x.type is None or term.args[0].type is None:
        return 1.0, term
    if x.type != term.args[0].type:
        return 1.0, term
    return coefficient, terms.call("nn.split_heads", x, *term.args[1:], like=term)


def masked_softmax(terms: Terms, term: Term) -> Term | None:
    """A softmax of which 0 is taken where it is NaN: of finite scores that is a row all of which
    has become -infinity."""
    if not term.is_call("select") or not term.args[0].is_call("isnan"):
        return None
    nan, zero, probs = term.args
    if zero.number != 0.0 or nan.args[0] is not probs or not probs.is_call("nn.softmax"):
        return None
    if probs.value[1]:
        return None
    (scores,) = probs.args
    if scores.kind != "binary" or scores.value != "+":
        return probs if _product(terms, scores) else None
    both = pair(scores.args, lambda t: _is_fill(t, 0.0))
    if both is None or both[1].type != term.type:
        return None
    if both[0].args[2].number != -math.inf:
        return probs
    return terms.call("nn.masked_softmax", both[1], both[0].args[0], like=term)


def _is_fill(term: Term, most: float) -> bool:
    """0 where a mask is true, and a number of at most `most` where it is not.

    Beside any score that is kept, the exponential of one that -1e30 was added to is 0.
    """
    if not term.is_call("select") or term.args[1].number != 0.0:
        return False
    return term.args[2].number is not None and term.args[2].number <= most


def _masks(terms: Terms, mask: Term, attended: Term, v: Term) -> dict[str, Term]:
    """A mask as what `nn.attend` takes: `causal`, and what else must be true."""
    if attended.type is None or v.type is None:
        return {"mask": mask}
    parts, rest, found = [mask], None, dict[str, Term]()
    while parts:
        part = parts.pop(0)
        inner = part.args[0] if part.is_call("broadcast_to") else part
        if part.kind == "binary" and part.value == "&":
            parts[:0] = part.args
        elif _is_causal(inner, attended.type.shape[2], v.type.shape[2]):
            found["causal"] = terms.literal(True)
        elif not is_all(inner):
            rest = part if rest is None else terms.make("binary", "&", rest, part)
    if rest is not None:
        found["mask"] = rest
    return found


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
    if chosen.type is None or not _is_causal(chosen.args[0], *chosen.type.shape[2:]):
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


def _is_causal(mask: Term, t: Expr, s: Expr) -> bool:
    """iota(S)[None, :] - iota(T)[:, None] <= S - T, or iota(S)[None, :] <= (iota(T) + P)[:, None]
    where S is T + P."""
    if mask.kind != "binary" or mask.value != "<=" or mask.type is None:
        return False
    columns, rows = mask.args
    last, past = mask.type.rank - 1, s - t
    if size_of(rows) == past and columns.kind == "binary" and columns.value == "-":
        columns, rows = columns.args
        return (range_axis(columns, s), range_axis(rows, t)) == (last, last - 1)
    if range_axis(columns, s) != last:
        return False
    is_one_row = t == const(1) and size_of(rows) == past
    return is_one_row or range_axis(rows, t, past) == last - 1


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


RULES: tuple[Rule, ...] = (masked_softmax, attend, masked, repeat_heads)
