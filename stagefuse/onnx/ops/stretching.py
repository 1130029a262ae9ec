"""Resizing axes whose sizes vary: old positions are quotients of integers, computed by the program.

Source: the definition of Resize in the ONNX operator reference.
"""

from __future__ import annotations

import math
from fractions import Fraction

from stagefuse.dsl.dims import Expr, const, floordiv, minimum
from stagefuse.dsl.frozen import frozen
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node
from stagefuse.onnx.text import size_text

from .shapes import subscript

DENOMINATOR = 4096
"""Scales that are quotients of small numbers have exact positions."""
MOST_TAPS = 32
"""Elements that a new one may be a mean of."""
_REACHES = {"linear": (0, 1), "cubic": (-1, 0, 1, 2)}


@frozen
class Stretch:
    """An axis with the number of its old and new elements; `scale` if that is what was given."""

    axis: int
    size: Expr
    new: Expr
    scale: Fraction | None = None

    def position(self, transform: str) -> tuple[str, Expr]:
        """The old position of the new element i: a numerator, over i, and a denominator."""
        size, new = self.size, self.new
        up, down = (new, size) if self.scale is None else map(const, self.scale.as_integer_ratio())
        if transform == "asymmetric":
            return f"iota({size_text(new)}) * ({size_text(down)})", up
        if transform == "align_corners":
            last = new - 1 if self.scale is None else size * up - down
            steps = size - 1 if self.scale is None else (size - 1) * down
            whole = minimum(new - 1, 1)  # 0 for a single element, which is the first one
            below = last * whole + 1 - whole
            return f"iota({size_text(new)}) * ({size_text(steps * whole)})", below
        if transform == "half_pixel_symmetric" and self.scale is not None and down != const(1):
            raise Refused("a scale that is not whole, of a size that varies", "`sizes`")
        if transform not in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"):
            raise Refused(f"{transform} for a size that varies", "a constant size",
                          "coordinate_transformation_mode")  # fmt: skip
        shift = down - up
        if transform == "pytorch_half_pixel":
            whole = minimum(new - 1, 1)
            down, shift = down * whole, shift * whole
        return f"iota({size_text(new)}) * ({size_text(2 * down)}) + ({size_text(shift)})", up * 2


def scaled(axis: int, size: Expr, scale: float) -> Stretch:
    """An axis to be enlarged by a factor. Raises Refused for one that is no simple fraction."""
    found = Fraction(scale).limit_denominator(DENOMINATOR)
    if abs(float(found) - scale) > 1e-6 * scale or found <= 0:
        raise Refused(f"a scale of {scale} for a size that varies", "a quotient of small numbers")
    up, down = found.as_integer_ratio()
    return Stretch(axis, size, floordiv(size * up, down), found)


def stretched(
    n: Node, text: str, rank: int, to: Stretch, mode: str, transform: str, nearest: str
) -> str:
    """A tensor with one axis resized."""
    numerator, divisor = to.position(transform)
    below = size_text(divisor)
    at = n.let("place", numerator).text
    if mode == "nearest":
        place = {
            "floor": f"{at} // ({below})",
            "ceil": f"-(-{at} // ({below}))",
            "round_prefer_floor": f"-(-(2 * {at} - ({below})) // (2 * ({below})))",
            "round_prefer_ceil": f"(2 * {at} + ({below})) // (2 * ({below}))",
        }[nearest]
        return n.let("resized", _taken(text, rank, to, place)).text
    whole = n.let("whole", f"{at} // ({below})").text
    part = n.let("part", f"f32({at} % ({below})) / f32({below})").text
    taps = _taps(n, to, mode, part)
    places = [whole if t == 0 else f"{whole} {'+' if t > 0 else '-'} {abs(t)}" for t, _ in taps]
    shares = [n.let("share", weight).text for _, weight in taps]
    if n.attr("exclude_outside", 0) and mode == "cubic":
        size = size_text(to.size)
        shares = [n.let("share", f"select({p} >= 0 and {p} < {size}, {share}, 0.0)").text
                  for p, share in zip(places, shares, strict=True)]  # fmt: skip
    if n.attr("exclude_outside", 0) or len(taps) > len(_REACHES[mode]):
        total = n.let("total", " + ".join(shares)).text
        shares = [n.let("share", f"{share} / {total}").text for share in shares]
    behind = ", ".join([":", *["None"] * (rank - 1 - to.axis)])
    terms = [f"{_taken(text, rank, to, p)} * {share}{f'[{behind}]' if rank - 1 > to.axis else ''}"
             for p, share in zip(places, shares, strict=True)]  # fmt: skip
    return n.let("resized", " + ".join(terms)).text


def _taps(n: Node, to: Stretch, mode: str, part: str) -> list[tuple[int, str]]:
    """The elements that a new one is a mean of, by their distance from that before it, and their
    weights. With `antialias` a kernel is as much wider as the axis becomes shorter."""
    squeeze = Fraction(1)
    if n.attr("antialias", 0):
        if to.scale is None:
            raise Refused("smoothing to a size that varies", "`scales`", "antialias")
        squeeze = min(to.scale, squeeze)
    reach = len(_REACHES[mode]) // 2
    first = math.floor(-reach / squeeze) + 1
    if 2 - 2 * first > MOST_TAPS:
        raise Refused(f"smoothing over {2 - 2 * first} elements of a size that varies",
                      f"at most {MOST_TAPS}", "antialias")  # fmt: skip
    if squeeze == 1 and mode == "linear":
        return [(0, f"1.0 - {part}"), (1, part)]
    times = "" if squeeze == 1 else f" * {float(squeeze)!r}"
    away = {t: f"({part} - {t}.0){times}" if times else f"{part} - {t}.0"
            for t in range(first, 2 - first)}  # fmt: skip
    if mode == "linear":
        return [(t, f"maximum(1.0 - abs({d}), 0.0)") for t, d in away.items()]
    a = n.attr("cubic_coeff_a", -0.75)
    return [(t, f"onnx.cubic({d}, {a!r})") for t, d in away.items()]


def _taken(text: str, rank: int, to: Stretch, place: str) -> str:
    """The elements at places along the axis, those beyond its ends at the ends."""
    inside = f"clamp({place}, 0, {size_text(to.size - 1)})"
    return f"{text}[{subscript(rank, **{f'a{to.axis}': inside})}]"
