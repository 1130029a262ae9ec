"""Windows over spatial axes: padding, strides and dilations of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.dims import Expr, as_expr, floordiv, maximum, minimum, mod
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .errors import Refused
from .node import Node, Val
from .text import pairs

POSITIONS = ("i", "j", "k", "i3", "i4", "i5")
TAPS = ("m", "n", "q", "m3", "m4", "m5")


@frozen
class Window:
    """How a window moves, one entry for each spatial axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[Expr, Expr], ...]

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def extents(self) -> tuple[int, ...]:
        """Elements that a window spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilations, strict=True))

    @property
    def is_padded(self) -> bool:
        return any(p.as_int() != 0 for pair in self.pads for p in pair)

    @property
    def positions(self) -> tuple[str, ...]:
        return POSITIONS[: self.rank]

    @property
    def taps(self) -> tuple[str, ...]:
        return TAPS[: self.rank]

    def reads(self) -> list[str]:
        """The element that a tap reads: `2 * i + m`."""
        found = []
        for i, m, s, d in zip(self.positions, self.taps, self.strides, self.dilations,
                              strict=True):  # fmt: skip
            found.append(f"{i if s == 1 else f'{s} * {i}'} + {m if d == 1 else f'{d} * {m}'}")
        return found

    def ranges(self) -> list[str]:
        """The taps with their ranges."""
        return [f"{m} in 0..{k}" for m, k in zip(self.taps, self.size, strict=True)]


def window_of(n: Node, size: Sequence[int], spatial: Sequence[Expr]) -> Window:
    """The window that a node's attributes describe. Raises Refused."""
    rank = len(size)
    if rank > len(POSITIONS):
        raise Refused(f"{rank} spatial axes", f"at most {len(POSITIONS)}")
    strides = tuple(n.attr("strides") or [1] * rank)
    dilations = tuple(n.attr("dilations") or [1] * rank)
    if any(s < 1 for s in (*strides, *dilations, *size)):
        raise Refused("a stride, dilation or size below 1", attribute="strides")
    given = n.attr("pads") or [0] * 2 * rank
    pads = tuple((as_expr(given[k]), as_expr(given[rank + k])) for k in range(rank))
    window = Window(tuple(size), strides, dilations, pads)
    auto = n.one_of("auto_pad", "NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    if auto == "VALID":
        return Window(tuple(size), strides, dilations, ((as_expr(0), as_expr(0)),) * rank)
    if auto.startswith("SAME"):
        same = tuple(
            _same(d, s, e, auto == "SAME_LOWER")
            for d, s, e in zip(spatial, strides, window.extents, strict=True)
        )
        return Window(tuple(size), strides, dilations, same)
    return window


def _same(size: Expr, stride: int, extent: int, lower: bool) -> tuple[Expr, Expr]:
    """Widths that give ceil(size / stride) positions.

    The last window begins at the last multiple of the stride, so that it spans `extent - 1` more
    than what lies behind it.
    """
    behind = mod(size - 1, stride)
    total = maximum(extent - 1 - behind, 0, Facts())
    less = floordiv(total, 2)
    if stride == 2 <= extent:  # without a quotient: `behind` is 0 or 1
        less = as_expr((extent - 1) // 2) - (behind if extent % 2 else 0)
    return (total - less, less) if lower else (less, total - less)


def rounded_up(n: Node, window: Window, spatial: Sequence[Expr]) -> Window:
    """With `ceil_mode`: wider at the end, so that the last window is whole."""
    if not n.attr("ceil_mode", 0):
        return window
    pads = []
    for k, size in enumerate(spatial):
        (before, after), stride, extent = window.pads[k], window.strides[k], window.extents[k]
        whole = size + before + after
        count = floordiv(whole - extent + stride - 1, stride) + 1
        last = after.as_int()
        more = (count - 1) * stride + extent - whole
        if last is None or last > extent - stride:
            # the last window begins at an element, not in the padding behind it
            begun = floordiv(size + before + stride - 1, stride)
            count = minimum(count, maximum(count - 1, begun))
            more = maximum((count - 1) * stride + extent - whole, 0)
        pads.append((before, after + more))
    return Window(window.size, window.strides, window.dilations, tuple(pads))


def padded(n: Node, value: Val, window: Window, fill: str = "") -> str:
    """A name for the input with the window's padding around it."""
    if not window.is_padded:
        return n.bound(value)
    zero = (as_expr(0), as_expr(0))
    widths = pairs([zero, zero, *window.pads])
    return n.let("padded", f"pad({n.x(0)}, {widths}{f', value={fill}' if fill else ''})").text
