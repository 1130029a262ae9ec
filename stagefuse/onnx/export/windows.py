"""Windows: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.graph import Map, Node, Reduce, Ref, View
from stagefuse.compiler.scalar import lowest
from stagefuse.dsl.dims import Expr, const, floordiv, sym
from stagefuse.dsl.dtypes import F16, F32
from stagefuse.dsl.frozen import frozen

from .forms import Context, Form, Traced, one
from .layout import Labels
from .model import Tensor
from .views import Access


def axes_of(c: Context, found: Traced, shape: Sequence[Expr]) -> Labels | None:
    """For each axis of the root the axis of the product that it is, all of it; None for 0."""
    labels: Labels = []
    for index, size in zip(found.indices, c.shape(found.root), strict=True):
        if index.terms and str(index) not in found.symbols:
            return None
        label = found.symbols.index(str(index)) if index.terms else None
        if label is not None and shape[label] != size:
            return None
        labels.append(label)
    used = [n for n in labels if n is not None]
    return labels if len(set(used)) == len(used) else None


@frozen
class _Window:
    """Along one axis: elements, steps between windows and within one, and the axis within."""

    kernel: int
    stride: int
    dilation: int
    axis: int | None


def _window(
    c: Context, index: Expr, extent: Expr, place: int, x: Traced, axes: Sequence[int],
    shape: Sequence[Expr],
) -> _Window | None:  # fmt: skip
    """The window of place*stride + inside*dilation that fits as often as it has room.

    An axis with one window, or one element in it, has no symbol for it.
    """
    used = [n for n in axes if x.symbols[n] in index.symbols()]
    kernel = shape[used[0]].as_int() if used else 1
    step = index.coefficient(x.symbols[used[0]]) if used else const(1)
    dilation = None if step is None else step.as_int()
    names = (x.symbols[place], *(x.symbols[n] for n in used))
    rest = index.substitute(dict.fromkeys(names, 0))
    if len(used) > 1 or not kernel or not dilation or dilation < 0 or rest.terms:
        return None
    room = extent - (dilation * (kernel - 1) + 1)
    slope = index.coefficient(names[0]) if names[0] in index.symbols() else room + 1
    stride = None if slope is None else slope.as_int()
    if stride is None or stride < 1:
        return None
    fits = c.graph.facts.prove_eq(floordiv(room, stride, c.graph.facts) + 1, shape[place])
    return _Window(kernel, stride, dilation, used[0] if used else None) if fits else None


def _windows(
    c: Context, x: Traced, axes: Sequence[int], shape: Sequence[Expr], lead: int = 2
) -> list[_Window] | None:
    """The windows of the axes after the first `lead`, a batch and channels."""
    out = [n for n in range(len(shape)) if n not in axes]
    own = c.shape(x.root)
    if len(own) <= lead or len(out) != len(own):
        return None
    if x.indices[0] != (const(0) if shape[out[0]].as_int() == 1 else sym(x.symbols[out[0]])):
        return None
    found = [
        _window(c, index, extent, place, x, axes, shape)
        for index, extent, place in zip(x.indices[lead:], own[lead:], out[lead:], strict=True)
    ]
    return [w for w in found if w is not None] if None not in found else None


def _source(c: Context, ref: Ref, fill: float) -> tuple[Ref, list[int]]:
    """What a pad of the spatial axes with `fill` is of, and its pads; none where it is no pad."""
    node = c.node(ref)
    view = node.primitive
    rank = len(node.type.shape)
    none = (ref, [0] * (2 * (rank - 2)))
    if not isinstance(view, View) or not view.guard or view.fill != fill:
        return none
    own = c.shape(node.operands[0])
    before, after, inside = [], [], set()
    for index, size, extent, name in zip(
        view.indices, node.type.shape, own, view.symbols, strict=False
    ):
        low = (sym(name) - index).as_int()
        high = None if low is None else (size - extent - low).as_int()
        if low is None or high is None or low < 0 or high < 0:
            return none
        inside |= {index, extent - 1 - index}
        before.append(low)
        after.append(high)
    plain = len(own) == rank and not any((*before[:2], *after[:2])) and set(view.guard) <= inside
    return (node.operands[0], [*before[2:], *after[2:]]) if plain else none


def convolution(c: Context, node: Node, a: Traced, b: Traced, axes: tuple[int, ...]) -> Form | None:
    for x, w in ((a, b), (b, a)):
        found = _as_conv(c, node, x, w, axes) or _in_groups(c, node, x, w, axes)
        if found is not None:
            return found
    return None


def _as_conv(c: Context, node: Node, x: Traced, w: Traced, axes: tuple[int, ...]) -> Form | None:
    """y[b, o, t] = sum[c, k] x[b, c, t*stride + k*dilation] * w[o, c, k], in groups or not."""
    shape = c.shape(node.operands[0])
    labels, windows = axes_of(c, w, shape), _windows(c, x, axes, shape)
    if labels is None or windows is None or len(labels) != len(windows) + 2:
        return None
    if not node.type.dtype.is_float or c.graph.type(x.root).dtype != c.graph.type(w.root).dtype:
        return None
    out = next(n for n in range(1, len(shape)) if n not in axes)
    sizes = [d.as_int() for d in c.shape(w.root)]
    groups = _groups(c, x, labels, sizes[:2], out)
    if groups is None or labels[0] not in (out, None) or labels[2:] != [v.axis for v in windows]:
        return None
    if {n for n in labels[1:] if n is not None} != {n for n in axes if shape[n].as_int() != 1}:
        return None
    source, pads = _source(c, x.root, 0.0)
    own = node.type.shape

    def write(image: Tensor, weight: Tensor) -> Tensor:
        given = [c.layout.whole(image, c.shape(source)), c.layout.whole(weight, c.shape(w.root))]
        return c.model.node(
            "Conv", given, image.dtype, own, group=groups, pads=pads,
            kernel_shape=[v.kernel for v in windows], strides=[v.stride for v in windows],
            dilations=[v.dilation for v in windows],
        )  # fmt: skip

    return one([source, w.root], write)


def _in_groups(
    c: Context, node: Node, x: Traced, w: Traced, axes: tuple[int, ...]
) -> Form | None:
    """y[b, g, o, t] = sum[c, k] x[b, g, c, t*stride + k*dilation] * w[g, o, c, k]."""
    shape = c.shape(node.operands[0])
    labels, windows = axes_of(c, w, shape), _windows(c, x, axes, shape, 3)
    if labels is None or windows is None or len(labels) != len(windows) + 3:
        return None
    kinds = {c.graph.type(ref).dtype for ref in (x.root, w.root)}
    if not node.type.dtype.is_float or kinds != {node.type.dtype}:
        return None
    out = [n for n in range(len(shape)) if n not in axes]
    own, kernel = c.shape(x.root), c.shape(w.root)
    groups = own[1].as_int()
    named = [None if n is None else x.symbols[n] for n in labels]
    read = [str(e) if e.terms else None for e in x.indices[1:3]]
    if groups is None or read != [named[0], named[2]] or labels[0] not in (out[1], None):
        return None
    if labels[1] not in (out[2], None) or labels[3:] != [v.axis for v in windows]:
        return None
    if {n for n in labels[2:] if n is not None} != {n for n in axes if shape[n].as_int() != 1}:
        return None
    merged, made = (own[0], own[1] * own[2], *own[3:]), (node.type.shape)
    source, pads = _source(c, _unsplit(c, x.root, merged), 0.0)
    results = (made[0], made[1] * made[2], *made[3:])
    weights = (kernel[0] * kernel[1], *kernel[2:])

    def write(image: Tensor, weight: Tensor) -> Tensor:
        image = c.layout.whole(image, c.shape(source))
        image = image if source != x.root else c.layout.reshaped(image, merged)
        weight = c.layout.reshaped(c.layout.whole(weight, kernel), weights)
        found = c.model.node(
            "Conv", [image, weight], image.dtype, results, group=groups, pads=pads,
            kernel_shape=[v.kernel for v in windows], strides=[v.stride for v in windows],
            dilations=[v.dilation for v in windows],
        )  # fmt: skip
        return c.layout.reshaped(found, made)

    return one([source, w.root], write)


def _unsplit(c: Context, ref: Ref, shape: tuple[Expr, ...]) -> Ref:
    """What a reshape to groups of channels is of, if it has that shape; else the value itself."""
    node = c.node(ref)
    if not isinstance(node.primitive, View) or node.primitive.guard:
        return ref
    below = node.operands[0]
    access = Access(
        c.shape(below), node.primitive.symbols, node.type.shape, node.primitive.indices
    )
    is_split = c.shape(below) == shape and c.views.is_reshape(access)
    return below if is_split else ref


def _groups(
    c: Context, x: Traced, labels: Sequence[int | None], sizes: Sequence[int | None], out: int
) -> int | None:
    """How many groups the channel index of x makes; None if it is something else."""
    channels, (made, inner) = c.shape(x.root)[1].as_int(), sizes
    if channels is None or made is None or inner is None or not inner or channels % inner:
        return None
    groups = channels // inner
    own = const(0) if labels[1] is None else sym(x.symbols[labels[1]])
    if groups == 1:
        return 1 if x.indices[1] == own else None
    if made % groups or labels[0] != out:
        return None
    wide, o = made // groups, sym(x.symbols[out])
    return groups if x.indices[1] == floordiv(o, wide, c.graph.facts) * inner + own else None


def pool(c: Context, node: Node) -> Form | None:
    """The greatest, or the mean, of windows along the axes from the third."""
    found = c.reduced(Ref(node.id), "mean") if node.primitive == Map("div") else None
    kind = "AveragePool"
    if isinstance(node.primitive, Reduce) and node.primitive.kind == "max":
        found, kind = (node.operands[0], node.primitive.axes), "MaxPool"
    if found is None or node.type.dtype not in (F32, F16):
        return None
    ref, axes = found
    x, shape = c.traced(ref, 1), c.shape(ref)
    windows = _windows(c, x, axes, shape) if x.root != ref else None
    if windows is None:
        return None
    out = next(n for n in range(1, len(shape)) if n not in axes)
    if x.indices[1] != (const(0) if shape[out].as_int() == 1 else sym(x.symbols[out])):
        return None
    fill = 0.0 if kind == "AveragePool" else float(lowest(node.type.dtype))
    source, pads = _source(c, x.root, fill)
    kernel = [v.kernel for v in windows]
    if {v.axis for v in windows} - {None} != {n for n in axes if shape[n].as_int() != 1}:
        return None
    if any(p >= k for p, k in zip(pads, kernel * 2, strict=True)):
        source, pads = x.root, [0] * len(pads)
    more: dict[str, object] = {"count_include_pad": 1} if kind == "AveragePool" else {}
    if kind == "MaxPool" or c.model.opset >= 19:
        more["dilations"] = [v.dilation for v in windows]
    elif any(v.dilation != 1 for v in windows):
        return None
    own = node.type.shape

    def write(image: Tensor) -> Tensor:
        whole = c.layout.whole(image, c.shape(source))
        return c.model.node(
            kind, [whole], image.dtype, own, kernel_shape=kernel, pads=pads,
            strides=[v.stride for v in windows], **more,
        )  # fmt: skip

    return one([source], write)
