"""Elements at positions that are data: gathers, sorted positions, running sums."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.dims import Expr
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, axis_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import listed, size_text

from .shapes import subscript


@op("Gather")
def _gather(n: Node) -> str:
    value, ids = n.val(0), n.val(1)
    axis = axis_of(n.attr("axis", 0), value.rank)
    if ids.known is not None and not ids.known.shape:
        at = size_text(ids.known.item())
    else:
        at = n.bound(ids, "ids")
    return f"{n.bound(value)}[{subscript(value.rank, **{f'a{axis}': at})}]"


def ranged(names: Sequence[str], sizes: Sequence[Expr]) -> list[str]:
    """Indices with their ranges stated."""
    return [f"{n} in 0..{size_text(d)}" for n, d in zip(names, sizes, strict=True)]


@op("GatherElements")
def _gather_elements(n: Node) -> Written:
    value, ids = n.val(0), n.val(1)
    axis = axis_of(n.attr("axis", 0), value.rank)
    names = [f"i{k}" for k in range(value.rank)]
    place = n.bound(ids, "ids")
    at = [f"{place}[{', '.join(names)}]" if k == axis else name for k, name in enumerate(names)]
    return n.define(n.hint, ranged(names, ids.shape), f"{n.bound(value)}[{', '.join(at)}]")


@op("GatherND")
def _gather_nd(n: Node) -> Written:
    value, ids = n.val(0), n.val(1)
    batch = n.attr("batch_dims", 0)
    depth = ids.shape[-1].as_int()
    if depth is None:
        raise Refused("positions of a number of axes that varies", "a constant last size")
    if not 0 <= batch < min(ids.rank, value.rank) or not 1 <= depth <= value.rank - batch:
        raise Refused(f"positions along {depth} axes of an input of {value.rank}, behind {batch}")
    if depth == 1 and not batch and value.rank > 1:
        rows = f"reshape({n.x(1)}, {listed(ids.shape[:-1])})"
        return f"{n.bound(value)}[{rows}{', :' * (value.rank - 1)}]"
    place = n.bound(ids, "ids")
    outer = [f"b{k}" for k in range(batch)]
    inner = [f"q{k}" for k in range(ids.rank - 1 - batch)]
    rest = [f"r{k}" for k in range(value.rank - batch - depth)]
    reads = [f"{place}[{', '.join([*outer, *inner, str(k)])}]" for k in range(depth)]
    sizes = [*ids.shape[:-1], *value.shape[batch + depth :]]
    indices = ranged([*outer, *inner, *rest], sizes)
    text = f"{n.bound(value)}[{', '.join([*outer, *reads, *rest])}]"
    if not indices:
        return f"reshape({n.define('one', ['q in 0..1'], _with_axis(place, text)).text}, [])"
    return n.define(n.hint, indices, text)


def _with_axis(place: str, text: str) -> str:
    """A single element is read under an index that is always 0."""
    return text.replace(f"{place}[", f"{place}[0 * q + ", 1)


@op("TopK")
def _topk(n: Node) -> Written:
    value = n.val(0)
    k = n.attr("k") if n.opset < 10 else n.sizes(1, "k")[0]
    n.attr("sorted")
    axis = n.attr("axis", -1)
    hints = [o or "unused" for o in n.outputs]
    if n.attr("largest", 1):
        return n.many(hints, f"topk({n.x(0)}, {size_text(k)}, axis={axis})")
    turn = "-" if value.dtype.is_float else "~"
    top, places = n.many(["top", hints[1]], f"topk({turn}{n.x(0)}, {size_text(k)}, axis={axis})")
    return [f"{turn}{top.text}", places]


@op("CumSum", "CumProd")
def _running(n: Node) -> str:
    name, first = ("cumsum", 0) if n.op == "CumSum" else ("cumprod", 1)
    value = n.val(0)
    axis = axis_of(n.ints(1, "axis")[0], value.rank)
    text = n.x(0)
    if n.attr("reverse", 0):
        text = f"flip({text}, axis={axis})"
    if n.attr("exclusive", 0):
        widths = ", ".join("(1, 0)" if k == axis else "(0, 0)" for k in range(value.rank))
        ahead = n.let("ahead", f"pad({text}, [{widths}], value={first})").text
        text = f"{ahead}[{subscript(value.rank, **{f'a{axis}': ':-1'})}]"
    text = f"{name}({text}, axis={axis})"
    if n.attr("reverse", 0):
        text = f"flip({text}, axis={axis})"
    plain = value.dtype.is_float or value.dtype.name == "i64"
    return text if plain else f"{value.dtype}({text})"


@op("ReverseSequence")
def _reverse_sequence(n: Node) -> Written:
    """The first `lengths[b]` elements in reverse, the rest as they are."""
    value = n.val(0)
    time = axis_of(n.attr("time_axis", 0), value.rank)
    batch = axis_of(n.attr("batch_axis", 1), value.rank)
    names = [f"i{k}" for k in range(value.rank)]
    lengths = n.bound(n.val(1), "lengths")
    length, t = f"{lengths}[{names[batch]}]", names[time]
    place = n.define(
        "place", ranged(["b", "t"], [value.shape[batch], value.shape[time]]),
        f"select(t < {lengths}[b], {lengths}[b] - 1 - t, t)",
    )
    at = [f"{place.text}[{names[batch]}, {t}]" if k == time else m for k, m in enumerate(names)]
    del length
    return n.define(n.hint, ranged(names, value.shape), f"{n.bound(value)}[{', '.join(at)}]")
