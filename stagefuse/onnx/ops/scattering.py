"""Elements put at positions that are data."""

from __future__ import annotations

from stagefuse.dsl.dims import Expr
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val, axis_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import listed, size_text

from .shapes import product

KINDS = {"none": "scatter_set", "add": "scatter_add", "max": "scatter_max", "min": "scatter_max"}


def scattered(n: Node, base: str, places: str, updates: str) -> str:
    """Rows of `base` with `updates` put in, or combined, by the node's `reduction`."""
    kind = n.one_of("reduction", "none", *KINDS, "mul")
    if kind == "mul":
        return f"onnx.scatter_product({base}, {places}, {updates})"
    if kind != "min":
        return f"{KINDS[kind]}({base}, {places}, {updates})"
    turn = "-" if n.val(0).dtype.is_float else "~"
    return f"{turn}scatter_max({turn}{base}, {places}, {turn}{updates})"


def positive(text: str, size: Expr) -> str:
    """Positions that count from the end, from the start."""
    return f"select({text} < 0, {text} + {size_text(size)}, {text})"


@op("ScatterElements", "Scatter")
def _scatter_elements(n: Node) -> Written:
    """All elements in one row: position times stride, summed over the axes."""
    value, ids = n.val(0), n.val(1)
    axis = axis_of(n.attr("axis", 0), value.rank)
    names = [f"i{k}" for k in range(value.rank)]
    at = n.bound(n.let("ids", f"i64({n.x(1)})"))
    strides = [product(value.shape[k + 1 :]) for k in range(value.rank)]
    indices = [f"{m} in 0..{size_text(d)}" for m, d in zip(names, ids.shape, strict=True)]
    here = f"{at}[{', '.join(names)}]"
    terms = [
        f"{positive(here, value.shape[k]) if k == axis else m} * {_factor(s)}"
        for k, (m, s) in enumerate(zip(names, strides, strict=True))
    ]
    places = n.define("places", indices, " + ".join(terms)).text
    flat = [f"reshape({t}, [-1])" for t in (n.x(0), places, n.x(2))]
    return f"reshape({scattered(n, *flat)}, {listed(value.shape)})"


def _factor(size: Expr) -> str:
    return f"({size_text(size)})"


@op("ScatterND")
def _scatter_nd(n: Node) -> Written:
    """Rows of the leading axes as one, which the last axis of the positions names."""
    value, ids = n.val(0), n.val(1)
    depth = ids.shape[-1].as_int()
    if depth is None:
        raise Refused("positions of a number of axes that varies", "a constant last size")
    lead, rest = value.shape[:depth], value.shape[depth:]
    count = product(ids.shape[:-1])
    at = n.let("ids", f"reshape({n.x(1)}, {listed([count, depth])})")
    places = n.let("places", _places(at, lead, depth)).text
    base = f"reshape({n.x(0)}, {listed([product(lead), *rest])})"
    updates = f"reshape({n.x(2)}, {listed([count, *rest])})"
    return f"reshape({scattered(n, base, places, updates)}, {listed(value.shape)})"


def _places(at: Val, lead: tuple[Expr, ...], depth: int) -> str:
    terms = [
        f"{positive(f'{at.text}[:, {k}]', lead[k])} * {_factor(product(lead[k + 1 :]))}"
        for k in range(depth)
    ]
    return " + ".join(terms)


@op("TensorScatter")
def _tensor_scatter(n: Node) -> Written:
    """A cache with rows of each batch replaced from a position on. Source: the op's definition."""
    value, updates = n.val(0), n.val(1)
    axis = axis_of(n.attr("axis", -2), value.rank)
    circular = n.one_of("mode", "linear", "linear", "circular") == "circular"
    names = [f"i{k}" for k in range(value.rank)]
    size, count = size_text(value.shape[axis]), size_text(updates.shape[axis])
    start = "0"
    if n.maybe(2) is not None:
        start = f"{n.bound(n.val(2), 'start')}[i0]"
    step = f"{names[axis]} - {start}"
    ranges = [f"{m} in 0..{size_text(d)}" for m, d in zip(names, value.shape, strict=True)]
    gap = n.define("gap", ranges, f"({step}) % {size}" if circular else step).text
    inside = n.let("inside", f"({gap} >= 0) & ({gap} < {count})").text
    near = n.let("near", f"clamp({gap}, 0, {count} - 1)").text
    at = ", ".join(f"{near}[{', '.join(names)}]" if k == axis else m for k, m in enumerate(names))
    taken = n.define("taken", ranges, f"{n.bound(updates)}[{at}]").text
    return f"select({inside}, {taken}, {n.x(0)})"
