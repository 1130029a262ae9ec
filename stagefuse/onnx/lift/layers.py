"""Products, convolutions, norms and tables with stored weights, as layers of the library.

A layer's weights are one scope, `nn.linear(x, w.fc)`: what its tensors are called is decided when
all layers are known. A tensor may be stored another way than the model has it: transposed, or
without axes of size 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from .algebra import factors, near, pair
from .terms import Rule, Term, Terms, integers, named, positional
from .views import is_new, is_whole, permutation

Part = tuple[str, str]
"""What a tensor is called in its layer, and how it is stored: "", "transposed" or "flat"."""


def scope(terms: Terms, parts: Sequence[tuple[Part, Term]]) -> Term:
    return terms.make("scope", tuple(p for p, _ in parts), *(t for _, t in parts))


def linear(terms: Terms, term: Term) -> Term | None:
    """x @ W, x @ W^T, of floats."""
    if term.kind != "binary" or term.value != "@" or term.type is None:
        return None
    x, weight = term.args
    how = "transposed"
    if permutation(weight) == (1, 0) or (weight.is_call("transpose") and len(weight.args) == 1):
        weight, how = weight.args[0], ""
    if weight.kind != "weight" or weight.rank != 2 or x.kind == "weight" or not x.is_operand:
        return None
    if not term.type.dtype.is_float or weight.type is None or weight.type.dtype != term.type.dtype:
        return None
    if x.rank is None or x.rank < 2:
        return None
    return terms.call("nn.linear", x, scope(terms, [(("weight", how), weight)]), like=term)


def with_bias(terms: Terms, term: Term) -> Term | None:
    """A layer that has no bias, and the bias."""
    if term.kind != "binary" or term.value != "+" or term.type is None:
        return None
    both = pair(list(term.args), lambda t: t.is_call(*_BIASED))
    if both is None:
        return None
    layer, added = both
    spatial = _BIASED[layer.value[0]]
    weights = layer.args[1]
    if weights.value[-1][0] == "bias":
        return None
    bias = _vector(added, spatial, weights.args[0], weights.value[0], term.rank or 0)
    if bias is None:
        return None
    joined = scope(terms, [*zip(weights.value, weights.args, strict=True), bias])
    made = terms.make("call", layer.value, layer.args[0], joined, *layer.args[2:])
    made.type, made.hint = term.type, layer.hint or term.hint
    return made


_BIASED = {"nn.linear": 0, "nn.layer_norm": 0, "nn.conv1d": 1, "nn.conv2d": 2}


def _vector(
    added: Term, spatial: int, weight: Term, part: Part, rank: int
) -> tuple[Part, Term] | None:
    """The stored vector of channels that is added, with axes of size 1 around them."""
    base, how = added, ""
    if added.kind == "sub" and spatial:
        rest = added.args[1:]
        if not is_whole(rest[0]) or len(rest) != 1 + spatial or not all(map(is_new, rest[1:])):
            return None
        base = added.args[0]
    elif spatial:
        how = "flat"
    if base.kind != "weight" or base.type is None or weight.type is None:
        return None
    channels = weight.type.shape[1 if part[1] else 0]
    shape = [d.as_int() for d in base.type.shape]
    wanted = [channels.as_int(), *[1] * spatial]
    if how or not spatial:
        if shape[-len(wanted) :] != wanted or set(shape[: -len(wanted)]) - {1} or len(shape) > rank:
            return None
        how = "flat" if len(shape) > 1 else ""
    elif shape != wanted[:1]:
        return None
    return (("bias", how), base) if base.type.dtype == weight.type.dtype else None


def convolution(terms: Terms, term: Term) -> Term | None:
    """`nn.convolve2d` of what is padded evenly is `nn.conv2d`."""
    kinds = {"nn.convolve1d": ("nn.conv1d", 1), "nn.convolve2d": ("nn.conv2d", 2)}
    if term.kind != "call" or term.value[0] not in kinds:
        return None
    name, rank = kinds[term.value[0]]
    x, weight = positional(term)[:2]
    if weight.kind != "weight":
        return None
    options = {k: integers(v) for k, v in named(term).items()}
    padding = 0
    if x.is_call("pad") and not x.value[1]:
        widths = [integers(w) for w in x.args[1].args]
        around = {n for w in widths[2:] if w is not None for n in w}
        plain = widths[:2] == [(0, 0), (0, 0)] and None not in widths
        if plain and len(around) == 1 and len(widths) == 2 + rank:
            x, padding = x.args[0], around.pop()
    plain_options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = {"stride": options["stride"], "padding": (padding,), "dilation": options["dilation"],
             "groups": options["groups"]}  # fmt: skip
    more = {k: terms.literal(v[0]) for k, v in given.items() if v and v[0] != plain_options[k]}
    return terms.call(name, x, scope(terms, [(("weight", ""), weight)]), like=term, **more)


def batch_norm(terms: Terms, term: Term) -> Term | None:
    """x * scale + shift, where both are made of the stored statistics."""
    if term.kind != "binary" or term.value != "+" or term.type is None:
        return None
    rank = term.rank or 0
    product, shift = term.args
    if product.kind != "binary" or product.value != "*" or rank not in (3, 4):
        return None
    x, scale = product.args
    s, t = _channels(scale, rank), _channels(shift, rank)
    if s is None or t is None or t.kind != "binary" or t.value != "-":
        return None
    bias, removed = t.args
    _, found = factors(s)
    both = pair(found, lambda f: f.is_call("rsqrt"))
    if both is None or removed.kind != "binary" or removed.args[1] is not s:
        return None
    under, gamma = both[0].args[0], both[1]
    if under.kind != "binary" or under.value != "+" or under.args[1].number is None:
        return None
    stored = [(("weight", ""), gamma), (("bias", ""), bias), (("running_mean", ""),
              removed.args[0]), (("running_var", ""), under.args[0])]  # fmt: skip
    if any(t.kind != "weight" for _, t in stored):
        return None
    name = "nn.batch_norm" if rank == 4 else "nn.batch_norm1d"
    eps = under.args[1]
    more = {} if near(eps.number or 0.0, 1e-5, term) else {"eps": eps}
    return terms.call(name, x, scope(terms, stored), like=term, **more)


def _channels(term: Term, rank: int) -> Term | None:
    """v of v[:, None, None]."""
    if term.kind != "sub" or len(term.args) != rank:
        return None
    whole, *new = term.args[1:]
    return term.args[0] if is_whole(whole) and all(map(is_new, new)) else None


def embedding(terms: Terms, term: Term) -> Term | None:
    """Rows of a stored table at positions that are data."""
    if term.kind != "sub" or term.free or term.args[0].kind != "weight" or term.args[0].rank != 2:
        return None
    table, ids, *rest = term.args
    is_data = ids.is_operand and ids.kind != "scope"
    if not is_data or ids.type is None or ids.type.dtype.name not in ("i64", "i32"):
        return None
    if not ids.rank or not all(map(is_whole, rest)) or len(rest) > 1:
        return None
    return terms.call("nn.embedding", ids, scope(terms, [(("weight", ""), table)]), like=term)


RULES: tuple[Rule, ...] = (linear, with_bias, convolution, batch_norm, embedding)
