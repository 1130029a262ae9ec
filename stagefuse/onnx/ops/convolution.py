"""Convolutions, as index notation over any number of spatial axes."""

from __future__ import annotations

from stagefuse.dsl.dims import as_expr

from ..errors import Refused
from ..node import Node, Val
from ..record import Written, op
from ..text import pairs
from ..windows import Window, padded, window_of
from .norms import per_channel


def kernel_size(n: Node, weight: Val) -> list[int]:
    """The sizes of the kernel, which are constants. Raises Refused."""
    sizes = [d.as_int() for d in weight.shape[2:]]
    if any(s is None for s in (*sizes, *(d.as_int() for d in weight.shape[:2]))):
        raise Refused("a kernel of a size that varies", "constant sizes")
    given = n.attr("kernel_shape")
    known = [s for s in sizes if s is not None]
    if given and list(given) != known:
        raise Refused(f"the kernel is {known}", attribute="kernel_shape")
    return known


def _fixed(weight: Val, axis: int) -> int:
    return weight.shape[axis].as_int() or 0


@op("Conv")
def _conv(n: Node) -> Written:
    value, weight = n.val(0), n.val(1)
    window = window_of(n, kernel_size(n, weight), value.shape[2:])
    groups = n.attr("group", 1)
    scoped = _layer(n, window, groups)
    if scoped is not None:
        return scoped
    x, w = padded(n, value, window), n.bound(weight, "kernel")
    text = _library(x, w, window, groups) or convolved(n, x, w, weight, window, groups).text
    if n.maybe(2) is None:
        return text
    return f"{text} + {per_channel(n.bound(n.val(2), 'bias'), value.rank)}"


def _library(x: str, w: str, window: Window, groups: int) -> str | None:
    """`nn.convolve2d(...)` where all axes have one stride and one dilation."""
    if window.rank > 2 or len(set(window.strides)) > 1 or len(set(window.dilations)) > 1:
        return None
    options = f"stride={window.strides[0]}, dilation={window.dilations[0]}, groups={groups}"
    return f"nn.convolve{window.rank}d({x}, {w}, {options})"


def _layer(n: Node, window: Window, groups: int) -> str | None:
    """`nn.conv2d(x, w.stem, ...)` where it is plain and its weights are named as a layer's."""
    name = {1: "conv1d", 2: "conv2d"}.get(window.rank)
    scope = n.layer(n.val(1), n.maybe(2))
    options = {"stride": window.strides, "dilation": window.dilations,
               "padding": tuple(a.as_int() for p in window.pads for a in p)}  # fmt: skip
    if name is None or scope is None or any(len(set(o)) > 1 for o in options.values()):
        return None
    if None in options["padding"]:
        return None
    plain = {"stride": 1, "padding": 0, "dilation": 1}
    more = [f"{k}={o[0]}" for k, o in options.items() if o[0] != plain[k]]
    more += [f"groups={groups}"] if groups != 1 else []
    return f"nn.{name}({', '.join([n.x(0), scope, *more])})"


def convolved(n: Node, x: str, w: str, weight: Val, window: Window, groups: int) -> Val:
    """The sums of products, without bias."""
    taps = ", ".join(window.taps)
    at = ", ".join(window.reads())
    indices = ["b", "o", *window.positions]
    channel = "c"
    if groups != 1:
        outputs, inputs = _fixed(weight, 0) // groups, _fixed(weight, 1)
        channel = f"o // {outputs} * {inputs} + c"
    where = f"sum[c in 0..{_fixed(weight, 1)}, {taps}]" if groups != 1 else f"sum[c, {taps}]"
    body = f"{where} {x}[b, {channel}, {at}] * {w}[o, c, {taps}]"
    return n.define(n.hint, indices, body)


@op("ConvTranspose")
def _conv_transpose(n: Node) -> Written:
    """The input spread by the strides, then convolved with the kernel in reverse."""
    value, weight = n.val(0), n.val(1)
    size = kernel_size(n, weight)
    window = _transposed_window(n, size, value)
    text = n.bound(value)
    if any(s != 1 for s in window.strides):
        text = _spread(n, text, value, window)
    text = _widened(n, text, value.rank, window)
    found = _reversed(n, text, n.bound(weight, "kernel"), weight, window)
    if n.maybe(2) is None:
        return found
    return f"{found.text} + {per_channel(n.bound(n.val(2), 'bias'), value.rank)}"


def _transposed_window(n: Node, size: list[int], value: Val) -> Window:
    """The widths to put around the spread input. Source: the op's definition."""
    rank = len(size)
    strides = tuple(n.attr("strides") or [1] * rank)
    dilations = tuple(n.attr("dilations") or [1] * rank)
    more = n.attr("output_padding") or [0] * rank
    given = n.attr("pads") or [0] * 2 * rank
    auto = n.one_of("auto_pad", "NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    wanted = n.attr("output_shape")
    pads = []
    for k in range(rank):
        extent = (size[k] - 1) * dilations[k] + 1
        before, after = as_expr(given[k]), as_expr(given[rank + k])
        if wanted or auto.startswith("SAME"):
            full = (value.shape[2 + k] - 1) * strides[k] + extent + more[k]
            target = as_expr(wanted[k]) if wanted else value.shape[2 + k] * strides[k]
            total = (full - target).as_int()
            if total is None:
                raise Refused("padding that depends on a size that varies", "a constant size")
            less = total // 2
            upper = auto == "SAME_UPPER"
            before, after = as_expr(less if upper else total - less), as_expr(
                total - less if upper else less)
        pads.append((extent - 1 - before, extent - 1 - after + more[k]))
    return Window(tuple(size), strides, dilations, tuple(pads))


def _spread(n: Node, text: str, value: Val, window: Window) -> str:
    """Zeros between the elements."""
    names, reads, holds = list(window.positions), [], []
    indices = ["b", "c"]
    for k, (name, stride) in enumerate(zip(names, window.strides, strict=True)):
        indices.append(f"{name} in 0..{(value.shape[2 + k] - 1) * stride + 1}")
        reads.append(name if stride == 1 else f"{name} // {stride}")
        if stride != 1:
            holds.append(f"({name} % {stride} == 0)")
    body = f"select({' & '.join(holds)}, {text}[b, c, {', '.join(reads)}], 0.0)"
    return n.define("spread", indices, body).text


def _widened(n: Node, text: str, rank: int, window: Window) -> str:
    """With the window's widths around it; negative ones cut."""
    known = [(a.as_int() or 0, b.as_int() or 0) for a, b in window.pads]
    if any(min(pair) < 0 for pair in known):
        cuts = [f"{max(-a, 0) or ''}:{min(b, 0) or ''}" for a, b in known]
        text = n.let("cut", f"{text}[:, :, {', '.join(cuts)}]").text
    wide = [(max(a, 0), max(b, 0)) for a, b in known]
    if not any(map(any, wide)):
        return text
    return n.let("padded", f"pad({text}, {pairs([(0, 0), (0, 0), *wide])})").text


def _reversed(n: Node, x: str, w: str, weight: Val, window: Window) -> Val:
    groups = n.attr("group", 1)
    each, inputs = _fixed(weight, 1), _fixed(weight, 0) // groups
    at = ", ".join(
        f"{i} + {m if d == 1 else f'{d} * {m}'}"
        for i, m, d in zip(window.positions, window.taps, window.dilations, strict=True)
    )
    back = ", ".join(f"{k - 1} - {m}" for k, m in zip(window.size, window.taps, strict=True))
    channel = "c" if groups == 1 else f"o // {each} * {inputs} + c"
    output = "o" if groups == 1 else f"o % {each}"
    taps = ", ".join([f"c in 0..{inputs}", *window.ranges()])
    first = "o" if groups == 1 else f"o in 0..{each * groups}"
    indices = ["b", first, *window.positions]
    body = f"sum[{taps}] {x}[b, {channel}, {at}] * {w}[{channel}, {output}, {back}]"
    return n.define(n.hint, indices, body)
