"""Samples of an image at positions that are data.

Source: the definitions of GridSample, RoiAlign and DeformConv in the ONNX operator reference.
"""

from __future__ import annotations

from stagefuse.dsl.dims import Expr
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import listed, size_text

from .indexing import ranged
from .scattering import scattered
from .shapes import product

CUBIC = -0.75
"""The coefficient of the cubic kernel, as OpenCV and PyTorch have it."""


@op("GridSample")
def _grid_sample(n: Node) -> Written:
    """Each axis by itself: positions and weights of its taps, then sums over all taps."""
    value, grid = n.val(0), n.val(1)
    mode = n.one_of("mode", "linear", "linear", "bilinear", "nearest", "cubic", "bicubic")
    around = n.one_of("padding_mode", "zeros", "zeros", "border", "reflection")
    corners = bool(n.attr("align_corners", 0))
    spatial = value.shape[2:]
    kind = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    at = n.bound(grid, "grid")
    taps = {"nearest": 1, "linear": 2, "cubic": 4}[kind]
    axes = []
    for k, size in enumerate(spatial):
        column = f"{at}[..., {len(spatial) - 1 - k}]"
        axes.append(_axis(n, column, size, kind, around, corners))
    return _summed(n, value, grid, axes, taps)


def _axis(
    n: Node, column: str, size: Expr, kind: str, around: str, corners: bool
) -> tuple[str, str]:
    """Names of the positions, [..., taps], and of their weights, along one axis."""
    length = f"f32({size_text(size)})"
    wide = n.let("where_", f"f32({column})").text
    if corners:
        x = n.let("pixel", f"({wide} + 1.0) * 0.5 * ({length} - 1.0)").text
    else:
        x = n.let("pixel", f"(({wide} + 1.0) * {length} - 1.0) * 0.5").text
    if around != "zeros" and kind != "cubic":
        x = n.let("pixel", _confined(x, length, around, corners)).text
    if kind == "nearest":
        base, steps = n.let("base", f"round({x})").text, "[0]"
    else:
        base = n.let("base", f"floor({x})").text
        steps = "[0, 1]" if kind == "linear" else "[-1, 0, 1, 2]"
    count = steps.count(",") + 1
    first = "" if kind != "cubic" else " - 1.0"
    places = n.let("taps", f"{base}[..., None] + f32(iota({count})){first}").text
    gap = n.let("gap", f"abs({x}[..., None] - {places})").text
    weights = _weights(n, kind, gap)
    inside = places
    if around != "zeros":
        inside = n.let("taps", _confined(places, length, around, corners)).text
    else:
        kept = f"({places} >= 0.0) & ({places} <= {length} - 1.0)"
        weights = n.let("weights_", f"select({kept}, {weights}, 0.0)").text
    bounded = n.let("places", f"i64(clamp({inside}, 0.0, {length} - 1.0))").text
    return bounded, weights


def _weights(n: Node, kind: str, gap: str) -> str:
    if kind == "nearest":
        return n.let("weights_", f"select({gap} >= 0.0, 1.0, {gap})").text
    if kind == "linear":
        return n.let("weights_", f"1.0 - {gap}").text
    a = CUBIC
    near = f"(({a + 2} * {gap} - {a + 3}) * {gap} * {gap} + 1.0)"
    far = f"((({gap} - 5.0) * {gap} + 8.0) * {gap} - 4.0) * {a}"
    return n.let("weights_", f"select({gap} <= 1.0, {near}, {far})").text


def _confined(x: str, length: str, around: str, corners: bool) -> str:
    """Positions within the image: those beyond are moved to its border, or mirrored at it."""
    if around == "border":
        return f"clamp({x}, 0.0, {length} - 1.0)"
    low, span = ("0.0", f"({length} - 1.0)") if corners else ("-0.5", length)
    period = f"maximum(2.0 * {span}, 1e-06)"
    folded = f"{span} - abs(({x} - ({low})) % {period} - {span}) + ({low})"
    return folded if corners else f"clamp({folded}, 0.0, {length} - 1.0)"


def _summed(
    n: Node, value: Val, grid: Val, axes: list[tuple[str, str]], taps: int
) -> Written:
    rank = len(axes)
    outer = [f"i{k}" for k in range(rank)]
    inner = [f"t{k}" for k in range(rank)]
    text = n.bound(value)
    where = ", ".join(["b", *outer])
    reads = ", ".join(f"{p}[{where}, {t}]" for (p, _), t in zip(axes, inner, strict=True))
    weights = " * ".join(f"{w}[{where}, {t}]" for (_, w), t in zip(axes, inner, strict=True))
    sums = ", ".join(f"{t} in 0..{taps}" for t in inner)
    indices = ranged(["b", "c", *outer], [*value.shape[:2], *grid.shape[1:-1]])
    wide = text if value.dtype.name == "f32" else n.let("wide", f"f32({text})").text
    found = n.define(n.hint, indices, f"sum[{sums}] {wide}[b, c, {reads}] * {weights}")
    return found if value.dtype.name == "f32" else f"{value.dtype}({found.text})"


@op("MaxUnpool", unread=["kernel_shape", "pads", "strides"])
def _max_unpool(n: Node) -> Written:
    """The elements back at their places in one row, zeros elsewhere."""
    value = n.val(0)
    if n.maybe(2) is not None:
        shape = n.sizes(2, "output_shape")
        natural = _natural(n)
        if len(shape) != len(natural):
            raise Refused("a result of another number of dimensions")
    else:
        shape = natural = _natural(n)
    base = f"zeros([{size_text(product(natural))}], {value.dtype})"
    places = n.let("places", f"reshape({n.x(1)}, [-1])").text
    n.attributes["reduction"] = "none"
    flat = n.let("flat", scattered(n, base, places, f"reshape({n.x(0)}, [-1])")).text
    whole = f"reshape({flat}, {listed(natural)})"
    if [str(s) for s in shape] == [str(s) for s in natural]:
        return whole
    widths = [(0, b - a) for a, b in zip(natural, shape, strict=True)]
    return f"pad({whole}, [{', '.join(f'({a}, {size_text(b)})' for a, b in widths)}])"


def _natural(n: Node) -> list[Expr]:
    """The shape before the pool, where its windows filled it."""
    kernel = n.attr("kernel_shape")
    rank = len(kernel)
    strides, pads = n.attr("strides") or [1] * rank, n.attr("pads") or [0] * 2 * rank
    lead = list(n.val(0).shape[:2])
    return lead + [
        (d - 1) * strides[k] + kernel[k] - pads[k] - pads[rank + k]
        for k, d in enumerate(n.val(0).shape[2:])
    ]


@op("RoiAlign", unread=["coordinate_transformation_mode"])
def _roi_align(n: Node) -> str:
    samples = n.attr("sampling_ratio", 0)
    half = n.opset >= 16 and n.one_of(
        "coordinate_transformation_mode", "half_pixel", "half_pixel", "output_half_pixel"
    ) == "half_pixel"
    largest = n.one_of("mode", "avg", "avg", "max") == "max"
    if largest and not samples:
        raise Refused("the largest of as many samples as a box has elements", "a number",
                      "sampling_ratio")  # fmt: skip
    rows, columns = n.attr("output_height", 1), n.attr("output_width", 1)
    scale = n.attr("spatial_scale", 1.0)
    given = f"{n.x(0)}, {n.x(1)}, {n.x(2)}, {rows}, {columns}"
    if not samples:
        return f"onnx.roi_means({given}, {scale!r}, {half})"
    return f"onnx.roi_align({given}, {samples}, {scale!r}, {half}, {largest})"


@op("MaxRoiPool")
def _max_roi_pool(n: Node) -> str:
    rows, columns = n.attr("pooled_shape")
    scale = n.attr("spatial_scale", 1.0)
    return f"onnx.roi_largest({n.x(0)}, {n.x(1)}, {rows}, {columns}, {scale!r})"


@op("DeformConv")
def _deform_conv(n: Node) -> str:
    """Two spatial axes; biases are added after."""
    value, weight, offset = n.val(0), n.val(1), n.val(2)
    if value.rank != 4:
        raise Refused(f"{value.rank - 2} spatial axes", "two")
    n.attr("kernel_shape")
    n.attr("group", 1)
    rows, columns = weight.shape[2:]
    sets = n.attr("offset_group", 1)
    places = [sets, rows, columns]
    size = [*offset.shape[2:]]
    moved = f"reshape({n.x(2)}, {listed([offset.shape[0], *places, 2, *size])})"
    options = []
    if n.maybe(4) is not None:
        options.append(f"mask=reshape({n.x(4)}, {listed([offset.shape[0], *places, *size])})")
    steps, apart = n.attr("strides") or [1, 1], n.attr("dilations") or [1, 1]
    before = n.attr("pads") or [0, 0, 0, 0]
    names = ("step_i", "step_j", "apart_k", "apart_l", "before_i", "before_j")
    given = zip(names, [*steps, *apart, *before[:2]], strict=True)
    options += [f"{name}={number}" for name, number in given]
    text = f"onnx.deform_conv({n.x(0)}, {n.x(1)}, {moved}, {', '.join(options)})"
    return text if n.maybe(3) is None else f"{text} + {n.x(3)}[:, None, None]"
