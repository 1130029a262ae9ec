"""Discrete Fourier transforms, as products with matrices of cosines and sines.

Source: the definitions of DFT and STFT in the ONNX operator reference.
"""

from __future__ import annotations

import numpy as np

from stagefuse.dsl.dims import as_expr, floordiv
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val, axis_of
from stagefuse.onnx.reading import dtype_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import pairs, size_text

from .shapes import subscript

MAX_LENGTH = 4096
"""Of a transform: its matrices are stored, and a fast one would be another algorithm."""


@op("DFT")
def _dft(n: Node) -> Written:
    """The last axis holds real and imaginary parts, or real parts alone."""
    value = n.val(0)
    axis = n.attr("axis", 1) if n.opset < 20 else -2
    if n.opset >= 20 and n.maybe(2) is not None:
        axis = n.ints(2, "axis")[0]
    axis = axis_of(axis, value.rank)
    size = value.shape[axis].as_int()
    length = n.ints(1, "dft_length")[0] if n.maybe(1) is not None else size
    if size is None or length is None or length > MAX_LENGTH:
        raise Refused("a transform of a length that varies, or is long",
                      f"a constant length, at most {MAX_LENGTH}")  # fmt: skip
    inverse, half = bool(n.attr("inverse", 0)), bool(n.attr("onesided", 0))
    if inverse and half:
        return _from_half(n, value, axis, length if n.maybe(1) is not None else 2 * (size - 1))
    text = _fitted(n, value, axis, size, length)
    count = length // 2 + 1 if half else length
    turns = np.outer(np.arange(length), np.arange(count)) / length
    angle = 2 * np.pi * turns * (1 if inverse else -1)
    scale = 1 / length if inverse else 1.0
    matrices = [
        n.x_of(n.constant(f"{n.hint}.{name}", (part * scale).astype(value.dtype.numpy)))
        for name, part in (("cos", np.cos(angle)), ("sin", np.sin(angle)))
    ]
    parts = [f"{text}[..., {k}]" for k in range(_parts(value))]
    return _transformed(n, parts, matrices, axis, value.rank)


def _parts(value: Val) -> int:
    """1 for real numbers, 2 for real and imaginary parts along the last axis."""
    count = value.shape[-1].as_int()
    if count not in (1, 2):
        raise Refused("numbers of a last axis that is neither 1 nor 2", "a constant size, 1 or 2")
    return count


def _from_half(n: Node, value: Val, axis: int, length: int) -> Written:
    """The real signal of a half spectrum: the other half is its conjugate."""
    count, size = length // 2 + 1, value.shape[axis].as_int() or 0
    if length < 1 or value.shape[-1].as_int() != 2:
        raise Refused("the inverse of a half spectrum without imaginary parts", "both parts")
    text = _fitted(n, value, axis, size, count)
    angle = 2 * np.pi * np.outer(np.arange(count), np.arange(length)) / length
    twice = np.full((count, 1), 2.0)
    twice[0] = 1.0
    twice[-1] = 1.0 if length % 2 == 0 else 2.0 if count > 1 else 1.0
    cosine, sine = (
        n.x_of(n.constant(f"{n.hint}.{name}", (part * twice / length).astype(value.dtype.numpy)))
        for name, part in (("cos", np.cos(angle)), ("sin", np.sin(angle)))
    )
    order = [k for k in range(value.rank - 1) if k != axis] + [axis]
    back = [order.index(k) for k in range(value.rank - 1)]
    real, imaginary = (n.let("part", f"transpose({text}[..., {k}], {order})").text for k in (0, 1))
    y = n.let("signal", f"transpose({real} @ {cosine} - {imaginary} @ {sine}, {back})")
    return f"{y.text}[..., None]"


def _fitted(n: Node, value: Val, axis: int, size: int, length: int) -> str:
    """The input cut, or with zeros added, to the length of the transform."""
    if length < size:
        cut = subscript(value.rank, **{f"a{axis}": f":{length}"})
        return n.let("cut", f"{n.bound(value)}[{cut}]").text
    if length == size:
        return n.bound(value)
    zero = as_expr(0)
    widths = [(zero, as_expr(length - size) if k == axis else zero) for k in range(value.rank)]
    return n.let("padded", f"pad({n.x(0)}, {pairs(widths)})").text


def _transformed(
    n: Node, parts: list[str], matrices: list[str], axis: int, rank: int
) -> str:
    """(re + i im) @ (cos + i sin) along an axis, the parts stacked behind."""
    order = [k for k in range(rank - 1) if k != axis] + [axis]
    back = [order.index(k) for k in range(rank - 1)]
    moved = [n.let("part", f"transpose({p}, {order})").text for p in parts]
    real, imaginary = (f"{moved[0]} @ {m}" for m in matrices)
    if len(moved) > 1:
        real = f"{real} - {moved[1]} @ {matrices[1]}"
        imaginary = f"{imaginary} + {moved[1]} @ {matrices[0]}"
    both = [f"transpose({t}, {back})" for t in (f"({real})", f"({imaginary})")]
    return f"stack([{', '.join(both)}], axis=-1)"


@op("STFT")
def _stft(n: Node) -> Written:
    """Transforms of stretches of a signal, [batch, stretch, frequency, real and imaginary]."""
    value = n.val(0)
    step = n.ints(1, "frame_step")[0]
    window = n.maybe(2)
    size = window.shape[0].as_int() if window is not None else n.ints(3, "frame_length")[0]
    if size is None or not 1 <= size <= MAX_LENGTH or step < 1:
        raise Refused("a transform of a length that varies, or is long",
                      f"a constant length, at most {MAX_LENGTH}")  # fmt: skip
    count = size // 2 + 1 if n.attr("onesided", 1) else size
    angle = -2 * np.pi * np.outer(np.arange(size), np.arange(count)) / size
    matrices = [
        n.x_of(n.constant(f"{n.hint}.{name}", part.astype(value.dtype.numpy)))
        for name, part in (("cos", np.cos(angle)), ("sin", np.sin(angle)))
    ]
    stretches = floordiv(value.shape[1] - size, step) + 1
    ranges = ["b", f"f in 0..{size_text(stretches)}", f"t in 0..{size}"]
    share = "" if window is None else f" * {n.bound(window, 'window')}[t]"
    text, parts = n.bound(value), []
    for k in range(1 if value.rank == 2 else _parts(value)):
        signal = text if value.rank == 2 else n.let("signal", f"{text}[:, :, {k}]").text
        parts.append(n.define("stretch", ranges, f"{signal}[b, {step} * f + t]{share}").text)
    return _transformed(n, parts, matrices, 2, 4)


@op("MelWeightMatrix")
def _mel_weights(n: Node) -> Written:
    """Triangles over the bins of a spectrum, evenly spaced in mel. Source: the op's definition."""
    bins, length, rate = (n.ints(k, "a number")[0] for k in range(3))
    low, high = (float(n.known(k, "an edge").reshape(-1)[0]) for k in (3, 4))
    if not (0 < bins <= MAX_LENGTH and 0 < length <= MAX_LENGTH and rate > 0):
        raise Refused("a spectrum of so many bins", f"at most {MAX_LENGTH}")
    ends = 2595 * np.log10(1 + np.array([low, high]) / 700)
    mel = np.arange(bins + 2) * ((ends[1] - ends[0]) / (bins + 2)) + ends[0]
    at = np.floor((length + 1) * (700 * np.expm1(mel / 2595 * np.log(10))) // rate)
    j = np.arange(length // 2 + 1)[:, None]
    left, centre, right = at[:-2], at[1:-1], at[2:]
    with np.errstate(all="ignore"):
        rising = np.where(centre > left, (j - left) / (centre - left), j == centre)
        falling = (right - j) / (right - centre)
    weights = np.where((j >= left) & (j <= centre), rising, 0.0)
    weights = np.where((j >= centre) & (j < right) & (right > centre), falling, weights)
    dtype = dtype_of(n.attr("output_datatype", 1))
    return n.constant(n.hint, weights.astype(dtype.numpy))
