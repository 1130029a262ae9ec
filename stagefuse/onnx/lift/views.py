"""Rearrangements that do nothing, or what one does instead of several."""

from __future__ import annotations

from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import DTYPES

from .algebra import pair
from .terms import Rule, Term, Terms, integers, named, positional


def cast(terms: Terms, term: Term) -> Term | None:
    """A conversion to the dtype that it has; `not (not x)`, `True & x`, and a choice by `not x`."""
    if term.kind == "call" and len(term.args) == 1 and term.args[0].type is not None:
        if term.value == (term.args[0].type.dtype.name, ()) and term.args[0].number is None:
            return term.args[0]
    if term.kind == "binary" and term.value == "&":
        both = pair(term.args, lambda t: _is_bool(t, True) or is_all(t))
        if both is not None and both[1].type is not None and both[1].type == term.type:
            return both[1]
    if term.kind == "unary" and term.value == "not":
        inner = term.args[0]
        if inner.kind == "unary" and inner.value == "not":
            return inner.args[0]
    if term.is_call("select"):
        choice, a, b = term.args
        if choice.kind == "unary" and choice.value == "not":
            return terms.call("select", choice.args[0], b, a, like=term)
        if a.is_call("full") and _is_bool(a.args[1], True) and _is_bool(b, False):
            return choice if choice.type == term.type else None
        if a.is_call("full") and b.number is not None and choice.type is not None:
            if a.type is not None and choice.type.shape == a.type.shape:
                return terms.call("select", choice, a.args[1], b, like=term)
    if term.kind == "binary" and term.value == "==" and term.args[0].is_call("select"):
        choice, a, b = term.args[0].args
        if b.number == term.args[1].number is not None and a.number not in (None, b.number):
            return terms.make("unary", "not", choice)
    return None


def is_all(term: Term) -> bool:
    """A tensor that is true everywhere: a full one, and positions from 0 on."""
    if term.kind == "binary" and term.value == ">=" and term.args[1].number == 0.0:
        counts = term.args[0].args[0] if term.args[0].kind == "sub" else term.args[0]
        return counts.is_call("iota")
    if term.kind == "sub" or term.is_call("bool", "reshape", "broadcast_to"):
        return is_all(term.args[0])
    return term.is_call("full") and (_is_bool(term.args[1], True) or bool(term.args[1].number))


def _is_bool(term: Term, value: bool) -> bool:
    return term.kind == "literal" and term.value == ("bool", value)


def subscript(terms: Terms, term: Term) -> Term | None:
    """`x[:, :]` is x; `x[:, None][:, :, None]` inserts both axes at once."""
    if term.kind != "sub" or term.free:
        return None
    base, items = term.args[0], term.args[1:]
    if all(is_whole(i) for i in items):
        return base
    if base.kind == "sub" and all(is_whole(i) or is_new(i) for i in items):
        inner, merged = list(base.args[1:]), []
        rank = base.rank
        if rank is None or any(not (_is_slice(i) or is_new(i)) for i in inner):
            return None
        inner += [_whole(terms)] * (rank - len(inner))
        for item in items:
            merged.append(item if is_new(item) else inner.pop(0) if inner else item)
        return terms.make("sub", None, base.args[0], *merged, *inner)
    return None


def unflattened(terms: Terms, term: Term) -> Term | None:
    """Rows and columns of a matrix whose axes were joined: `reshape(m, [B * S, 1])` at
    `iota(S)[None, :] + iota(B)[:, None] * S` is `m[:, :, None]`."""
    if term.kind != "sub" or term.free or not term.args[0].is_call("reshape"):
        return None
    flat, at, *rest = term.args
    matrix = flat.args[0].type
    if matrix is None or flat.type is None or at.type is None or not all(map(is_whole, rest)):
        return None
    if matrix.rank != 2 or [s.as_int() for s in flat.type.shape[1:]] not in ([], [1]):
        return None
    rows, columns = matrix.shape
    both = pair(at.args, lambda t: t.kind == "binary") if at.kind == "binary" else None
    if both is None or (at.value, both[0].value) != ("+", "*"):
        return None
    row, column = range_axis(both[0].args[0], rows), range_axis(both[1], columns)
    if flat.type.shape[0] != rows * columns or size_of(both[0].args[1]) != columns:
        return None
    if row is None or column is None or row >= column:
        return None
    items = [terms.literal(None)] * (at.type.rank + flat.type.rank - 1)
    items[row] = items[column] = _whole(terms)
    return terms.make("sub", None, flat.args[0], *items)


def range_axis(term: Term, size: Expr, begin: Expr | None = None) -> int | None:
    """The axis along which `(iota(n) + begin)[None, :]` counts, where n is the size."""
    if term.kind != "sub" or not all(is_new(i) or is_whole(i) for i in term.args[1:]):
        return None
    counts, items = term.args[0], term.args[1:]
    if begin is not None and begin != const(0):
        if counts.kind != "binary" or counts.value != "+" or size_of(counts.args[1]) != begin:
            return None
        counts = counts.args[0]
    if not counts.is_call("iota"):
        return None
    length = size_of(counts.args[0]) if counts.type is None else counts.type.shape[0]
    if length != size:
        return None
    return next((n for n, i in enumerate(items) if is_whole(i)), len(items))


def size_of(term: Term) -> Expr | None:
    """A size as a number of i64, or a literal."""
    inner = term.args[0] if term.is_call("i64") and len(term.args) == 1 else term
    if inner.kind == "size":
        return sym(inner.value)
    number = integers(inner)
    return const(number[0]) if number is not None and len(number) == 1 else None


def _whole(terms: Terms) -> Term:
    return terms.make("slice", None, *[terms.make("absent")] * 3)


def _is_slice(term: Term) -> bool:
    return term.kind == "slice"


def is_whole(term: Term) -> bool:
    return term.kind == "slice" and all(a.kind == "absent" for a in term.args)


def is_new(term: Term) -> bool:
    return term.kind == "literal" and term.value[1] is None


def trailing(terms: Terms, term: Term) -> Term | None:
    """Whole axes at the end of brackets need not be written."""
    if term.kind != "sub" or term.free or len(term.args) < 3 or not is_whole(term.args[-1]):
        return None
    if term.args[0].rank is None or term.args[0].kind == "weight":
        return None
    return terms.make("sub", None, *term.args[:-1])


def reshape(terms: Terms, term: Term) -> Term | None:
    """A shape that it has; of two in a row the second decides."""
    if not term.is_call("reshape", "broadcast_to") or term.value[1]:
        return None
    base, shape = term.args
    if base.type is not None and base.type.shape == _shape(term, shape):
        return base
    only_new = base.kind == "sub" and all(is_new(i) or is_whole(i) for i in base.args[1:])
    if term.is_call("reshape") and (base.is_call("reshape") or only_new):
        return terms.call("reshape", base.args[0], shape, like=term)
    if term.is_call("broadcast_to") and base.is_call("reshape") and _is_scalar(base.args[0]):
        return terms.call("broadcast_to", base.args[0], shape, like=term)
    return None


def transpose(terms: Terms, term: Term) -> Term | None:
    """Two in a row are one, or none."""
    perm = permutation(term)
    if perm is None:
        return None
    if perm == tuple(range(len(perm))):
        return term.args[0]
    inner = permutation(term.args[0])
    if inner is None or len(inner) != len(perm):
        return None
    joined = tuple(inner[p] for p in perm)
    return terms.call("transpose", term.args[0].args[0], terms.ints(joined), like=term)


def _shape(term: Term, listed: Term) -> tuple[Expr, ...] | None:
    """The shape of a reshape that asks for one: its type's, or plain sizes and numbers."""
    if term.type is not None:
        return term.type.shape
    sizes = [size_of(a) for a in listed.args] if listed.kind == "list" else [None]
    whole = tuple(s for s in sizes if s is not None)
    return whole if len(whole) == len(sizes) else None


def _is_scalar(term: Term) -> bool:
    """Whether it has no axes: a size or number as a tensor has no operand."""
    return term.rank == 0 or (
        term.kind == "call" and term.value[0] in DTYPES and not term.args[0].is_operand
    )


def unmerged(terms: Terms, term: Term) -> Term | None:
    """Leading axes that are one while the others change places: [B, H, T, D] to [B * H, T, D],
    to [B * H, D, T], to [B, H, D, T]."""
    if not term.is_call("reshape") or term.value[1] or term.type is None:
        return None
    perm = permutation(term.args[0])
    if perm is None or perm[0]:
        return None
    merged = term.args[0].args[0]
    if not merged.is_call("reshape") or merged.value[1]:
        return None
    base, inner = merged.args[0].type, merged.type
    if base is None or inner is None:
        return None
    kept = inner.rank - 1
    lead = base.rank - kept
    if lead < 1 or base.shape[lead:] != inner.shape[1:]:
        return None
    moved = tuple(range(lead)) + tuple(lead - 1 + p for p in perm[1:])
    if term.type.shape != tuple(base.shape[m] for m in moved):
        return None
    return terms.call("transpose", merged.args[0], terms.ints(moved), like=term)


def permutation(term: Term) -> tuple[int, ...] | None:
    if not term.is_call("transpose") or len(term.args) != 2:
        return None
    return integers(term.args[1])


def split_heads(terms: Terms, term: Term) -> Term | None:
    """[B, T, H * D] to [B, H, T, D]; where D comes before T, that transposed."""
    perm = permutation(term)
    if perm not in ((0, 2, 1, 3), (0, 2, 3, 1)) or not term.args[0].is_call("reshape"):
        return None
    x, whole = term.args[0].args[0], term.args[0].type
    if x.type is None or whole is None or x.rank != 3 or whole.rank != 4:
        return None
    heads = whole.shape[2].as_int()
    if heads is None or x.type.shape[:2] != whole.shape[:2]:
        return None
    if whole.shape[2] * whole.shape[3] != x.type.shape[2]:
        return None
    found = terms.call("nn.split_heads", x, terms.literal(heads))
    b, t, h, d = whole.shape
    found.type = type(whole)(whole.dtype, (b, h, t, d))
    found.hint = found.hint or term.hint
    if perm == (0, 2, 1, 3):
        return found
    return terms.call("transpose", found, terms.ints((0, 1, 3, 2)), like=term)


def merge_heads(terms: Terms, term: Term) -> Term | None:
    """[B, H, T, D] to [B, T, H * D]."""
    if not term.is_call("reshape") or permutation(term.args[0]) != (0, 2, 1, 3):
        return None
    x = term.args[0].args[0]
    if x.type is None or term.type is None or x.rank != 4 or term.rank != 3:
        return None
    b, h, t, d = x.type.shape
    if term.type.shape != (b, t, h * d):
        return None
    return terms.call("nn.merge_heads", x, like=term)


def pooled(terms: Terms, term: Term) -> Term | None:
    """The mean over height and width, without the axes."""
    if not term.is_call("reshape") or not term.args[0].is_call("mean"):
        return None
    inner = term.args[0]
    x, options = positional(inner)[0], named(inner)
    keeps, axes = options.get("keepdims"), options.get("axis")
    if x.type is None or term.type is None or x.rank != 4 or keeps is None or axes is None:
        return None
    if integers(axes) != (2, 3) or term.type.shape != x.type.shape[:2]:
        return None
    return terms.call("nn.global_avg_pool", x, like=term)


def squeezed_mean(terms: Terms, term: Term) -> Term | None:
    """mean(x, axis=(2, 3)) of an image."""
    if not term.is_call("mean") or "keepdims" in named(term) or "axis" not in named(term):
        return None
    (x,) = positional(term)
    if x.rank != 4 or integers(named(term)["axis"]) != (2, 3):
        return None
    if x.type is None or not x.type.dtype.is_float:
        return None
    return terms.call("nn.global_avg_pool", x, like=term)


def inserted(terms: Terms, term: Term) -> Term | None:
    """A reshape that only puts in axes of size 1 is written with None."""
    if not term.is_call("reshape") or term.type is None or term.args[0].type is None:
        return None
    own: list[Expr] = list(term.args[0].type.shape)
    if len(own) >= len(term.type.shape) or not own or not term.args[0].is_operation:
        return None
    items = []
    for size in term.type.shape:
        if own and size == own[0]:
            own.pop(0)
            items.append(_whole(terms))
        elif size.as_int() == 1:
            items.append(terms.literal(None))
        else:
            return None
    return None if own else terms.make("sub", None, term.args[0], *items)


RULES: tuple[Rule, ...] = (
    cast, unflattened, subscript, trailing, reshape, unmerged, transpose, split_heads, merge_heads,
    pooled, squeezed_mean, inserted,
)  # fmt: skip
