"""Resizing: per axis, each new position is a weighted sum of old ones that are known constants.

Source: the definition of Resize in the ONNX operator reference.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from stagefuse.dsl.dims import Expr, as_expr
from stagefuse.dsl.frozen import frozen
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val, axis_of
from stagefuse.onnx.record import Written, op

from .indexing import ranged
from .shapes import subscript
from .stretching import Stretch, scaled, stretched

LONGEST = 1 << 20
"""Positions of a side, at most: those of each are written down."""
WRITTEN = 4
"""Taps of an axis that are written out, at most: two, or four of a cubic."""
MODES = ("nearest", "linear", "cubic")
TRANSFORMS = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners",
              "asymmetric", "tf_crop_and_resize", "tf_half_pixel_for_nn")  # fmt: skip


@frozen
class Axis:
    """One axis to resize: old and new size, the scale, and the part that is kept."""

    axis: int
    size: int
    new: int
    scale: float
    roi: tuple[float, float] = (0.0, 1.0)

    def sources(self, transform: str) -> np.ndarray[Any, Any]:
        """The old position, not whole, of each new one."""
        at, one = np.arange(self.new, dtype=np.float64), self.new == 1
        whole = self.scale * self.size  # the new size before it is rounded down
        match transform:
            case "asymmetric":
                return np.asarray(at / self.scale)
            case "align_corners":
                return at * 0.0 if one else np.asarray(at * (self.size - 1) / (whole - 1))
            case "tf_half_pixel_for_nn":
                return np.asarray((at + 0.5) / self.scale)
            case "pytorch_half_pixel" if one:
                return at * 0.0
            case "half_pixel_symmetric":
                shift = self.size / 2 * (1 - self.new / whole)
                return np.asarray(shift + (at + 0.5) / self.scale - 0.5)
            case "tf_crop_and_resize":
                start, end = self.roi
                if one:
                    return np.asarray(at + 0.5 * (start + end) * (self.size - 1))
                step = (end - start) * (self.size - 1) / (whole - 1)
                return np.asarray(start * (self.size - 1) + at * step)
        return np.asarray((at + 0.5) / self.scale - 0.5)


def _nearest(x: np.ndarray[Any, Any], mode: str, size: int) -> np.ndarray[Any, Any]:
    rounding: dict[str, Any] = {
        "round_prefer_floor": lambda v: np.ceil(v - 0.5), "floor": np.floor, "ceil": np.ceil,
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }  # fmt: skip
    return np.asarray(np.clip(rounding[mode](x), 0, size - 1).astype(np.int64))


def _cubic(d: np.ndarray[Any, Any], a: float) -> np.ndarray[Any, Any]:
    """Keys' kernel."""
    d = np.abs(d)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0.0)))


def _taps(n: Node, axis: Axis, x: np.ndarray[Any, Any], mode: str) -> tuple[Any, Any]:
    """Old positions and weights, [new, taps]."""
    reach = 1 if mode == "linear" else 2
    squeeze = min(axis.scale, 1.0) if n.attr("antialias", 0) else 1.0
    first = math.floor(-reach / squeeze) + 1
    steps = np.arange(first, 2 - first)
    base = np.floor(x)
    at = base[:, None] + steps[None, :]
    distance = (at - x[:, None]) * squeeze
    weights = (
        np.clip(1 - np.abs(distance), 0, 1)
        if mode == "linear"
        else _cubic(distance, n.attr("cubic_coeff_a", -0.75))
    )
    if n.attr("exclude_outside", 0):
        weights = weights * ((at >= 0) & (at < axis.size))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(at, 0, axis.size - 1).astype(np.int64), weights


@op("Resize", unread=["coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a",
                      "exclude_outside", "antialias", "extrapolation_value",
                      "keep_aspect_ratio_policy"])  # fmt: skip
def _resize(n: Node) -> Written:
    mode = n.one_of("mode", "nearest", *MODES)
    value = n.val(0)
    if n.opset < 11:
        transform, nearest = "asymmetric", "simple"
    else:
        transform = n.one_of("coordinate_transformation_mode", "half_pixel", *TRANSFORMS)
        nearest = n.attr("nearest_mode", "round_prefer_floor")
    factors = _factors(n, value) if mode == "nearest" and _is_copy(transform, nearest) else None
    if factors is not None:
        return _repeated(n, value, factors)
    if n.opset < 11:
        axes = _by_scales(value, list(range(value.rank)), _floats(n, 1, "scales"))
    else:
        axes = _axes(n, value, transform)
    return _resized(n, value, axes, mode, transform, nearest)


@op("Upsample")
def _upsample(n: Node) -> Written:
    mode = n.one_of("mode", "nearest", "nearest", "linear")
    value = n.val(0)
    scales = n.attr("scales") or _floats(n, 1, "scales")
    axes = _by_scales(value, list(range(value.rank)), scales)
    return _resized(n, value, axes, mode, "asymmetric", "floor")


def _floats(n: Node, index: int, what: str) -> list[float]:
    return [float(v) for v in n.known(index, what).reshape(-1)]


def _fixed(value: Val, axis: int) -> int:
    size = value.shape[axis].as_int()
    if size is None:
        raise Refused(f"resizing axis {axis} of a size that varies",
                      "a constant size, or nearest by a whole factor")  # fmt: skip
    return size


def _by_scales(value: Val, axes: list[int], scales: list[float]) -> list[Axis | Stretch]:
    found: list[Axis | Stretch] = []
    for axis, scale in zip(axes, scales, strict=True):
        size = value.shape[axis].as_int()
        if scale != 1.0 and size is None:
            found.append(scaled(axis, value.shape[axis], scale))
        elif scale != 1.0 and size is not None:
            found.append(Axis(axis, size, math.floor(size * scale), scale))
    return found


def _by_sizes(value: Val, axes: list[int], wanted: list[Expr], crops: bool) -> list[Axis | Stretch]:
    found: list[Axis | Stretch] = []
    for axis, new in zip(axes, wanted, strict=True):
        size = value.shape[axis]
        old, number = size.as_int(), new.as_int()
        if size == new and not crops:
            continue
        if old is None or number is None:
            found.append(Stretch(axis, size, new))
        else:
            found.append(Axis(axis, old, number, number / max(old, 1)))
    return found


def _axes(n: Node, value: Val, transform: str) -> list[Axis | Stretch]:
    axes = [axis_of(a, value.rank) for a in n.attr("axes") or range(value.rank)]
    policy = n.attr("keep_aspect_ratio_policy", "stretch")
    sizes = n.maybe(3)
    if sizes is None or (sizes.known is not None and sizes.known.size == 0):
        found = _by_scales(value, axes, _floats(n, 2, "scales"))
        whole = {a.axis for a in found}
        if transform == "tf_crop_and_resize":
            found += [Axis(a, _fixed(value, a), _fixed(value, a), 1.0) for a in axes
                      if a not in whole]  # fmt: skip
    else:
        crops = transform == "tf_crop_and_resize"
        if policy == "stretch":
            found = _by_sizes(value, axes, n.sizes(3, "sizes"), crops)
        else:
            wanted = n.ints(3, "sizes")
            pick = min if policy == "not_larger" else max
            scale = pick(w / _fixed(value, a) for w, a in zip(wanted, axes, strict=True))
            wanted = [math.floor(scale * _fixed(value, a) + 0.5) for a in axes]
            found = [Axis(a, _fixed(value, a), w, scale)
                     for a, w in zip(axes, wanted, strict=True)]  # fmt: skip
    if transform != "tf_crop_and_resize":
        return found
    roi = _floats(n, 1, "roi")
    half = len(roi) // 2
    ends = {a: (roi[k], roi[half + k]) for k, a in enumerate(axes)}
    for a in found:
        if isinstance(a, Stretch):
            raise Refused("a part of a size that varies", "constant sizes")
    return [replace(a, roi=ends[a.axis]) for a in found if isinstance(a, Axis)]


def _factors(n: Node, value: Val) -> dict[int, int] | None:
    """Whole factors by axis, where sizes may vary; None where one is not whole or not known."""
    scales, sizes = n.maybe(1 if n.opset < 11 else 2), n.maybe(3)
    axes = [axis_of(a, value.rank) for a in n.attr("axes") or range(value.rank)]
    if sizes is not None and (sizes.known is None or sizes.known.size):
        wanted = n.sizes(3, "sizes")
        found = {}
        for axis, size in zip(axes, wanted, strict=True):
            fits = [k for k in range(1, 17) if n.body.same(value.shape[axis] * k, size)]
            if not fits:
                return None
            found[axis] = fits[0]
        return found
    if scales is None or scales.known is None or scales.known.size != len(axes):
        return None
    numbers = [float(s) for s in scales.known.reshape(-1)]
    if any(s != int(s) or s < 1 for s in numbers):
        return None
    return {axis: int(s) for axis, s in zip(axes, numbers, strict=True)}


def _is_copy(transform: str, nearest: str) -> bool:
    """Whether enlarging by a whole factor repeats each element."""
    return (transform == "asymmetric" and nearest in ("simple", "floor")) or (
        transform in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
        and nearest.startswith("round")
    )


def _repeated(n: Node, value: Val, factors: dict[int, int]) -> Written:
    """Each element as often as the factors say."""
    names = [f"i{k}" for k in range(value.rank)]
    times = [factors.get(k, 1) for k in range(value.rank)]
    if all(t == 1 for t in times):
        return value
    at = ", ".join(m if t == 1 else f"{m} // {t}" for m, t in zip(names, times, strict=True))
    shape = [d * t for d, t in zip(value.shape, times, strict=True)]
    return n.define(n.hint, ranged(names, shape), f"{n.bound(value)}[{at}]")


def _resized(
    n: Node, value: Val, axes: list[Axis | Stretch], mode: str, transform: str, nearest: str
) -> Written:
    text, dtype = n.bound(value), value.dtype
    if not axes:
        return value
    if mode != "nearest" and dtype.name != "f32":
        text = n.let("wide", f"f32({text})").text
    longest = max((max(a.size, a.new) for a in axes if isinstance(a, Axis)), default=0)
    if longest > LONGEST:
        raise Refused(f"a side of {longest} positions")
    names = [f"i{k}" for k in range(value.rank)]
    shape = list(value.shape)
    outside = []
    for axis in axes:
        shape[axis.axis] = as_expr(axis.new)
        rounding = _rounding(axis, nearest)
        if isinstance(axis, Stretch):
            text = stretched(n, text, value.rank, axis, mode, transform, rounding)
            continue
        x = axis.sources(transform)
        outside.append((axis, (x < 0) | (x > axis.size - 1)))
        if mode == "nearest":
            ids = _nearest(x, rounding, axis.size)
            text = _copied(n, text, axis, ids, value.rank)
            continue
        ids, weights = _taps(n, axis, x, mode)
        text = n.define("resized", ranged(names, shape), _sum(n, text, axis, ids, weights)).text
    if transform == "tf_crop_and_resize":
        text = _extrapolated(n, text, outside, value.rank)
    return text if mode == "nearest" or dtype.name == "f32" else f"{dtype}({text})"


def _sum(
    n: Node, text: str, axis: Axis, ids: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]
) -> str:
    """The sum over the taps of an axis; of few of them, written out: neighbours along that axis are
    then computed side by side."""
    own, rank = f"i{axis.axis}", n.val(0).rank
    place = n.x_of(n.constant(f"{n.hint}.places{axis.axis}", ids.T.astype(np.int32)))
    weight = n.x_of(n.constant(f"{n.hint}.weights{axis.axis}", weights.T.astype(np.float32)))

    def tap(t: str) -> str:
        at = (f"{place}[{t}, {own}]" if k == axis.axis else f"i{k}" for k in range(rank))
        return f"{text}[{', '.join(at)}] * {weight}[{t}, {own}]"

    taps = ids.shape[1]
    return " + ".join(map(tap, map(str, range(taps)))) if taps <= WRITTEN else f"sum[t] {tap('t')}"


def _rounding(axis: Axis | Stretch, nearest: str) -> str:
    """How an old position is rounded. Opset 10 has no attribute for it: as in ONNX Runtime, down
    where an axis grows and up where it shrinks."""
    if nearest != "simple":
        return nearest
    return "ceil" if axis.scale is not None and axis.scale < 1 else "floor"


def _copied(n: Node, text: str, axis: Axis, ids: np.ndarray[Any, Any], rank: int) -> str:
    """Nearest by any factor: a table of positions."""
    place = n.x_of(n.constant(f"{n.hint}.places{axis.axis}", ids))
    return n.let("resized", f"{text}[{subscript(rank, **{f'a{axis.axis}': place})}]").text


def _extrapolated(
    n: Node, text: str, outside: list[tuple[Axis, np.ndarray[Any, Any]]], rank: int
) -> str:
    """What lies outside of the image has a value of its own."""
    fill = n.attr("extrapolation_value", 0.0)
    for axis, away in outside:
        if away.any():
            mask = n.x_of(n.constant(f"{n.hint}.outside{axis.axis}", away))
            at = ", ".join(":" if k == axis.axis else "None" for k in range(rank))
            text = n.let("filled", f"select({mask}[{at}], {fill!r}, {text})").text
    return text
