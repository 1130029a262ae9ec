"""Rearrangements: shapes, axes, slices, parts, padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from stagefuse.dsl.dims import Expr, as_expr, divide, floordiv, maximum, minimum
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val, axis_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import listed, literal, pairs, size_text


def subscript(rank: int, **cuts: str) -> str:
    """`:, 1:3`: cuts by axis (`a1="1:3"`), the rest whole."""
    items = [cuts.get(f"a{k}", ":") for k in range(rank)]
    return ", ".join(items)


@op("Reshape")
def _reshape(n: Node) -> str:
    """0 keeps a size, unless `allowzero`; -1 is what is left."""
    given = n.attr("shape") if n.opset < 5 else None
    sizes = [as_expr(d) for d in given] if given else n.sizes(1, "shape")
    keep = not n.attr("allowzero", 0)
    own = n.val(0).shape
    shape = [own[k] if keep and d.as_int() == 0 else d for k, d in enumerate(sizes)]
    return f"reshape({n.x(0)}, {listed(_completed(shape, own))})"


def _completed(shape: list[Expr], own: Sequence[Expr]) -> list[Expr]:
    """A shape with a size in place of -1 where that divides whatever the sizes are, even 0."""
    if sum(d.as_int() == -1 for d in shape) != 1:
        return shape
    left, rest = divide(product(own), product([d for d in shape if d.as_int() != -1]))
    if rest != as_expr(0):
        return shape
    return [left if d.as_int() == -1 else d for d in shape]


@op("Flatten")
def _flatten(n: Node) -> str:
    shape = n.val(0).shape
    axis = n.attr("axis", 1)
    axis = len(shape) if axis == len(shape) else axis_of(axis, len(shape))
    rows, columns = product(shape[:axis]), product(shape[axis:])
    return f"reshape({n.x(0)}, {listed([rows, columns])})"


def product(sizes: Sequence[Expr]) -> Expr:
    total = as_expr(1)
    for size in sizes:
        total = total * size
    return total


@op("Transpose")
def _transpose(n: Node) -> str:
    perm = n.attr("perm")
    return f"transpose({n.x(0)}, {listed(perm)})" if perm else f"transpose({n.x(0)})"


@op("Squeeze")
def _squeeze(n: Node) -> str:
    value = n.val(0)
    axes = n.axes()
    if axes is None:
        axes = [k for k, d in enumerate(value.shape) if d.as_int() == 1]
    gone = {axis_of(a, value.rank) for a in axes}
    wrong = [k for k in gone if value.shape[k].as_int() not in (1, None)]
    if wrong:
        raise Refused(f"axis {wrong[0]} has size {value.shape[wrong[0]]}, not 1", attribute="axes")
    kept = [d for k, d in enumerate(value.shape) if k not in gone]
    return f"reshape({n.x(0)}, {listed(kept)})"


@op("Unsqueeze")
def _unsqueeze(n: Node) -> str:
    value = n.val(0)
    axes = n.axes() or []
    rank = value.rank + len(axes)
    new = {axis_of(a, rank) for a in axes}
    if len(new) != len(axes):
        raise Refused("an axis is given twice", attribute="axes")
    if not value.rank:
        return f"reshape({n.x(0)}, {listed([1] * rank)})"
    return f"{n.bound(value)}[{', '.join('None' if k in new else ':' for k in range(rank))}]"


@op("Expand")
def _expand(n: Node) -> str:
    own, wanted = list(n.val(0).shape), n.sizes(1, "shape")
    rank = max(len(own), len(wanted))
    left = [as_expr(1)] * (rank - len(own)) + own
    right = [as_expr(1)] * (rank - len(wanted)) + wanted
    shape = [a if b.as_int() == 1 else b for a, b in zip(left, right, strict=True)]
    number = n.number(0)
    if number is not None:
        return f"full({listed(shape)}, {literal(number)}, {n.val(0).dtype})"
    return f"broadcast_to({n.x(0)}, {listed(shape)})"


@op("Concat")
def _concat(n: Node) -> Written:
    axis = n.attr("axis", 1)
    if len(n.inputs) == 1:
        return n.val(0)
    parts = [n.x(k) for k in range(len(n.inputs))]
    return f"concat([{', '.join(parts)}], axis={axis})"


@op("Split")
def _split(n: Node) -> Written:
    axis, value = n.attr("axis", 0) % n.val(0).rank, n.val(0)
    count = len(n.outputs)
    given = n.attr("split")
    sizes = [as_expr(s) for s in given] if given else None
    if n.maybe(1) is not None:
        sizes = n.sizes(1, "split")
    size, shared = value.shape[axis], n.attr("num_outputs")
    facts = n.body.facts
    even = facts.prove_eq(floordiv(size, count, facts) * count, size)
    if sizes is None and (size.as_int() is not None or (shared and not even)):
        part = floordiv(size + (count - 1), count, facts)  # the last parts may be shorter
        ends = [*(minimum(part * k, size, facts) for k in range(count)), size]
        sizes = [end - start for start, end in pairwise(ends)]
    hints = [o or "unused" for o in n.outputs]
    if count == 1:
        return [value]
    if sizes is None:
        return n.many(hints, f"split({n.x(0)}, {count}, axis={axis})")
    cuts = [sum(sizes[:k], as_expr(0)) for k in range(1, count)]
    return n.many(hints, f"split({n.x(0)}, {listed(cuts)}, axis={axis})")


@op("Slice")
def _slice(n: Node) -> str:
    """Python's slices; an end far away is left out."""
    value = n.val(0)
    if n.opset < 10:
        starts, ends = ([as_expr(v) for v in n.attr(k)] for k in ("starts", "ends"))
        axes, steps = n.attr("axes") or list(range(len(starts))), [1] * len(starts)
    else:
        starts, ends = n.sizes(1, "starts"), n.sizes(2, "ends")
        axes = n.ints(3, "axes") if n.maybe(3) is not None else list(range(len(starts)))
        steps = n.ints(4, "steps") if n.maybe(4) is not None else [1] * len(starts)
    if not value.rank:
        raise Refused("a slice of a scalar")
    cuts = {
        f"a{axis_of(axis, value.rank)}": _cut(start, end, step, value.shape[axis])
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }
    return f"{n.bound(value)}[{subscript(value.rank, **cuts)}]"


_FAR = 1 << 31


def _cut(start: Expr, end: Expr, step: int, size: Expr) -> str:
    """`start:end:step`; what lies beyond the axis on its own side is left out.

    Backwards, a start before the axis is its first element, as the standard has it: in Python
    nothing is taken then.
    """
    first, last, extent = start.as_int(), end.as_int(), size.as_int()
    near = _FAR - 1 if extent is None else extent
    if step > 0:
        begin = "" if first == 0 or (first is not None and first <= -near) else _end(start, size)
        stop = "" if last is not None and last >= near else _end(end, size)
    else:
        if first is not None and -_FAR < first < -1:
            start = maximum(size + start, 0)
        begin = "" if first is not None and first >= near - 1 else _end(start, size)
        stop = "" if last is not None and last < -near else _end(end, size)
    return f"{begin}:{stop}" + (f":{step}" if step != 1 else "")


def _end(at: Expr, size: Expr) -> str:
    """A position; one far from the axis is that of its end."""
    number = at.as_int()
    if number is not None and not -_FAR < number < _FAR:
        at = size if number > 0 else as_expr(0)
    return size_text(at)


_PARTS = 16
"""Copies of an edge that are named one by one."""


@op("Pad", unread=["value"])
def _pad(n: Node) -> Written:
    value = n.val(0)
    mode = n.one_of("mode", "constant", "constant", "edge", "reflect", "wrap")
    given = n.attr("pads") or n.attr("paddings") if n.opset < 11 else None
    widths = [as_expr(p) for p in given] if given else n.sizes(1, "pads")
    axes = list(range(value.rank))
    if n.opset >= 11 and n.maybe(3) is not None:
        axes = [axis_of(a, value.rank) for a in n.ints(3, "axes")]
    half = len(widths) // 2
    if len(axes) != half:
        raise Refused(f"{2 * half} widths for {len(axes)} axes", attribute="pads")
    both = {a: (widths[k], widths[half + k]) for k, a in enumerate(axes)}
    if mode == "constant":
        return _filled(n, value, both)
    text = n.bound(value)
    for axis, (before, after) in both.items():
        if before.as_int() == 0 and after.as_int() == 0:
            continue
        parts = _repeated(n, mode, text, axis, before.as_int(), after.as_int())
        if parts:
            text = n.let("padded", f"concat([{', '.join(parts)}], axis={axis})").text
            continue
        ids = n.let("ids", _source(mode, value.shape[axis], before, after)).text
        text = n.let("padded", f"{text}[{subscript(value.rank, **{f'a{axis}': ids})}]").text
    return text


def _repeated(
    n: Node, mode: str, text: str, axis: int, before: int | None, after: int | None
) -> list[str]:
    """The parts of a padded axis, where the sizes are known and nothing is reflected twice; none
    where there would be many."""
    rank, size = n.val(0).rank, n.val(0).shape[axis].as_int()
    if before is None or after is None or size is None:
        return []
    if mode == "edge" and before + after > _PARTS:
        return []
    if min(before, after) < 0 or size < max(before, after, 1) + (mode == "reflect"):
        return []
    ends = {
        "edge": (":1", "-1:"),
        "wrap": (f"{size - before}:", f":{after}"),
        "reflect": (f"{before}:0:-1", f"-2:{-2 - after}:-1"),
    }[mode]
    first, last = (f"{text}[{subscript(rank, **{f'a{axis}': at})}]" for at in ends)
    copies = (before, after) if mode == "edge" else (min(before, 1), min(after, 1))
    return [first] * copies[0] + [text] + [last] * copies[1]


def _source(mode: str, size: Expr, before: Expr, after: Expr) -> str:
    """The position that each one of a padded axis copies."""
    length = size_text(size)
    at = f"iota({size_text(size + before + after)}) - {size_text(before)}"
    if mode == "edge":
        return f"clamp({at}, 0, {length} - 1)"
    if mode == "wrap":
        return f"({at}) % ({length})"
    period = f"(2 * ({length}) - 2)"
    return f"({length} - 1) - abs(({at}) % {period} - ({length} - 1))"


def _filled(n: Node, value: Val, both: dict[int, tuple[Expr, Expr]]) -> str:
    """Padding with a number; negative widths cut."""
    fill = "0"
    if n.opset < 11:
        fill = repr(float(n.attr("value", 0.0)))
    elif n.maybe(2) is not None:
        number = n.known(2, "constant_value").reshape(-1)
        fill = literal(number[0]) if number.size else "0"
    text = n.x(0)
    widths = [both.get(k, (as_expr(0), as_expr(0))) for k in range(value.rank)]
    less = [tuple((w.as_int() or 0) < 0 for w in pair) for pair in widths]
    if any(any(pair) for pair in less):
        cuts = {
            f"a{k}": f"{-a if la else ''}:{b if lb else ''}"
            for k, ((a, b), (la, lb)) in enumerate(zip(widths, less, strict=True))
        }
        text = n.let("cut", f"{n.bound(value)}[{subscript(value.rank, **cuts)}]").text
        zero = as_expr(0)
        widths = [(zero if la else a, zero if lb else b)
                  for (a, b), (la, lb) in zip(widths, less, strict=True)]  # fmt: skip
    more = "" if fill in ("0", "0.0") else f", value={fill}"
    return f"pad({text}, {pairs(widths)}{more})"


@op("Tile")
def _tile(n: Node) -> Written:
    value = n.val(0)
    repeats = n.sizes(1, "repeats")
    if len(repeats) != value.rank:
        raise Refused(f"{len(repeats)} repeats for {value.rank} dimensions")
    shape = [d * r for d, r in zip(value.shape, repeats, strict=True)]
    if shape == list(value.shape):
        return value
    if all(1 in (d.as_int(), r.as_int()) for d, r in zip(value.shape, repeats, strict=True)):
        return f"broadcast_to({n.x(0)}, {listed(shape)})"
    text = n.bound(value)
    names = [f"i{k}" for k in range(value.rank)]
    ends = [size_text(d) for d in shape]
    at = [
        name if r.as_int() == 1 else f"{name} % ({size_text(d)})"
        for name, r, d in zip(names, repeats, value.shape, strict=True)
    ]
    indices = [f"{name} in 0..{end}" for name, end in zip(names, ends, strict=True)]
    return n.define(n.hint, indices, f"{text}[{', '.join(at)}]")


@op("DepthToSpace")
def _depth_to_space(n: Node) -> str:
    b, c, h, w = n.val(0).shape
    s = n.attr("blocksize")
    from stagefuse.dsl.dims import floordiv

    deep = floordiv(c, s * s)
    if n.one_of("mode", "DCR", "DCR", "CRD") == "DCR":
        first, order = [b, s, s, deep, h, w], [0, 3, 4, 1, 5, 2]
    else:
        first, order = [b, deep, s, s, h, w], [0, 1, 4, 2, 5, 3]
    blocks = f"transpose(reshape({n.x(0)}, {listed(first)}), {listed(order)})"
    return f"reshape({blocks}, {listed([b, deep, h * s, w * s])})"


@op("SpaceToDepth")
def _space_to_depth(n: Node) -> str:
    from stagefuse.dsl.dims import floordiv

    b, c, h, w = n.val(0).shape
    s = n.attr("blocksize")
    high, wide = floordiv(h, s), floordiv(w, s)
    blocks = f"reshape({n.x(0)}, {listed([b, c, high, s, wide, s])})"
    deep_last = n.one_of("mode", "DCR", "DCR", "CRD") == "DCR"
    order = [0, 3, 5, 1, 2, 4] if deep_last else [0, 1, 3, 5, 2, 4]
    return f"reshape(transpose({blocks}, {order}), {listed([b, c * s * s, high, wide])})"


@op("CenterCropPad")
def _center_crop_pad(n: Node) -> Written:
    """Source: the op's definition: the middle, rounded down at the front."""
    value = n.val(0)
    axes = n.attr("axes") or list(range(value.rank))
    text = n.bound(value)
    for axis, size in zip([axis_of(a, value.rank) for a in axes], n.ints(1, "shape"), strict=True):
        own = value.shape[axis].as_int()
        if own is None:
            raise Refused(f"the size of axis {axis} varies", "a constant size")
        if own > size:
            start = (own - size) // 2
            cut = {f"a{axis}": f"{start}:{start + size}"}
            text = n.let("cropped", f"{text}[{subscript(value.rank, **cut)}]").text
        elif own < size:
            before = (size - own) // 2
            widths = [(0, 0)] * value.rank
            widths[axis] = (before, size - own - before)
            text = n.let("padded", f"pad({text}, {pairs(widths)})").text
    return text
