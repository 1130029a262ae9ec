"""Transposed convolutions: convolutions of the input for each phase of the strides."""

from __future__ import annotations

from stagefuse.dsl.dims import as_expr
from stagefuse.dsl.frozen import frozen
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import pairs
from stagefuse.onnx.windows import Window

from .convolution import fixed, kernel_size
from .norms import per_channel


@op("ConvTranspose")
def _conv_transpose(n: Node) -> Written:
    """Each phase of the strides is a convolution with a part of the kernel in reverse; where the
    kernel is dilated, the input is spread by the strides and convolved with the whole of it."""
    value, weight = n.val(0), n.val(1)
    size = kernel_size(n, weight)
    window = _transposed_window(n, size, value)
    if _has_phases(window):
        found = _by_phases(n, value, weight, window)
    else:
        text = n.bound(value)
        if any(s != 1 for s in window.strides):
            text = _spread(n, text, value, window)
        text = _widened(n, text, value.rank, window)
        found = _reversed(n, text, n.bound(weight, "kernel"), window)
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
            before, after = (
                as_expr(less if upper else total - less),
                as_expr(total - less if upper else less),
            )
        pads.append((extent - 1 - before, extent - 1 - after + more[k]))
    return Window(tuple(size), strides, dilations, tuple(pads))


def _has_phases(window: Window) -> bool:
    """Whether every phase of the strides has a tap, in a window that begins inside the kernel."""
    begins = all((a.as_int() or 0) < k for (a, _), k in zip(window.pads, window.size, strict=True))
    taps = all(s <= k for s, k in zip(window.strides, window.size, strict=True))
    return max(window.strides) > 1 and max(window.dilations) == 1 and taps and begins


def _by_phases(n: Node, value: Val, weight: Val, window: Window) -> Val:
    """Element s * q + r of the padded result is a sum over the taps r, s + r, 2 * s + r...

    Those are windows of the input that begin at q, for all r of as many taps at once. Of an axis
    with `before` and `after` around the spread input, the first element wanted is
    `size - 1 - before`.
    """
    strides, rank = window.strides, window.rank
    known = [(a.as_int() or 0, b.as_int() or 0) for a, b in window.pads]
    most = tuple(-(-k // s) for k, s in zip(window.size, strides, strict=True))
    around = tuple(
        (as_expr(u - 1), as_expr(after // s))
        for u, s, (_, after) in zip(most, strides, known, strict=True)
    )
    inner = Window(most, (1,) * rank, (1,) * rank, around)
    x, w = _widened(n, n.bound(value), value.rank, inner), n.bound(weight, "kernel")
    split = [k for k in range(rank) if strides[k] > 1]

    def sums(chosen: list[_Phases]) -> str:
        """The sums for some phases of the first axes, and all of the others."""
        axis = len(chosen)
        if axis == rank:
            return _convolved(n, x, w, inner, chosen)
        stride, longer = strides[axis], window.size[axis] % strides[axis]
        parts = [
            _Phases(stride, 0, longer, most[axis]),
            _Phases(stride, longer, stride - longer, most[axis] - bool(longer)),
        ]
        texts = [sums([*chosen, part]) for part in parts if part.count]
        if len(texts) == 1:
            return texts[0]
        return n.let("phases", f"concat([{', '.join(texts)}], axis={2 + split.index(axis)})").text

    found = sums([])
    phases, places, indices = [], [], ["b", "o"]
    for k, i in enumerate(inner.positions):
        first, stride = window.size[k] - 1 - known[k][0], strides[k]
        at = f"({i} + {first})" if first else i
        phases += [f"{at} % {stride}"] if stride > 1 else []
        places.append(at if stride == 1 else f"{at} // {stride}")
        count = (value.shape[2 + k] - 1) * stride + 1 + sum(known[k]) - (window.size[k] - 1)
        indices.append(f"{i} in 0..{count}")
    return n.define(n.hint, indices, f"{found}[b, o, {', '.join([*phases, *places])}]")


@frozen
class _Phases:
    """`count` phases of a stride from the `first` on, which have so many `taps` of the kernel."""

    stride: int
    first: int
    count: int
    taps: int


def _convolved(n: Node, x: str, w: str, inner: Window, chosen: list[_Phases]) -> str:
    """The sums for some phases of each axis."""
    outputs, channel, output, inputs = _channels(n)
    indices, taps, at, back, positions = ["b", outputs], [f"c in 0..{inputs}"], [], [], []
    for k, phases in enumerate(chosen):
        i, m, r = inner.positions[k], inner.taps[k], f"r{k}"
        skipped, last = inner.size[k] - phases.taps, phases.taps - 1
        taps.append(f"{m} in 0..{phases.taps}")
        at.append(f"{i} + {m} + {skipped}" if skipped else f"{i} + {m}")
        size = n.val(0).shape[2 + k] + (inner.pads[k][1].as_int() or 0)
        positions.append(f"{i} in 0..{size}")
        if phases.stride == 1:
            back.append(f"{last} - {m}")
            continue
        indices.append(f"{r} in 0..{phases.count}")
        start = f"{r} + {phases.first}" if phases.first else r
        back.append(f"{phases.stride} * ({last} - {m}) + {start}")
    body = (
        f"sum[{', '.join(taps)}] {x}[b, {channel}, {', '.join(at)}]"
        f" * {w}[{channel}, {output}, {', '.join(back)}]"
    )
    return n.define("phase", [*indices, *positions], body).text


def _channels(n: Node) -> tuple[str, str, str, int]:
    """The results' channels; of the input and of the kernel, those that belong to channel `o` and
    `c`; how many `c` are."""
    groups, weight = n.attr("group", 1), n.val(1)
    each, inputs = fixed(weight, 1), fixed(weight, 0) // groups
    if groups == 1:
        return "o", "c", "o", inputs
    return f"o in 0..{each * groups}", f"o // {each} * {inputs} + c", f"o % {each}", inputs


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


def _reversed(n: Node, x: str, w: str, window: Window) -> Val:
    outputs, channel, output, inputs = _channels(n)
    at = ", ".join(
        f"{i} + {m if d == 1 else f'{d} * {m}'}"
        for i, m, d in zip(window.positions, window.taps, window.dilations, strict=True)
    )
    back = ", ".join(f"{k - 1} - {m}" for k, m in zip(window.size, window.taps, strict=True))
    taps = ", ".join([f"c in 0..{inputs}", *window.ranges()])
    body = f"sum[{taps}] {x}[b, {channel}, {at}] * {w}[{channel}, {output}, {back}]"
    return n.define(n.hint, ["b", outputs, *window.positions], body)
