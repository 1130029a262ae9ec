"""Convolutions, as index notation over any number of spatial axes."""

from __future__ import annotations

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.windows import Window, padded, window_of

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


def fixed(weight: Val, axis: int) -> int:
    """A size that is known."""
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
        outputs, inputs = fixed(weight, 0) // groups, fixed(weight, 1)
        channel = f"o // {outputs} * {inputs} + c"
    where = f"sum[c in 0..{fixed(weight, 1)}, {taps}]" if groups != 1 else f"sum[c, {taps}]"
    body = f"{where} {x}[b, {channel}, {at}] * {w}[o, c, {taps}]"
    return n.define(n.hint, indices, body)
