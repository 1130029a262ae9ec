"""Integers with scales: to and from floats, products, convolutions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from stagefuse.dsl.dtypes import DType
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.reading import HELD, dtype_of, type_name
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.windows import padded, window_of

from .convolution import convolved, kernel_size
from .elementwise import narrowed
from .norms import per_channel

_WHOLE = ("u8", "i8", "u16", "i16")


def spread(n: Node, value: Val, of: Val, axis: int, block: int = 0) -> str:
    """A scale or zero point so that it meets a tensor: one, one per channel, or one per block.

    What calibration found is data of the model, even where it is one number: layers that differ
    in it are alike.
    """
    text = n.stored(value)
    if value.rank == 0 or (value.rank == 1 and value.shape[0].as_int() == 1 and not block):
        return text if value.rank == 0 else f"{text}[0]"
    if value.rank == 1:
        axis = axis % of.rank
        at = ", ".join(":" if k == axis else "None" for k in range(axis, of.rank))
        return f"{text}[{at}]" if axis + 1 < of.rank else text
    if not block:
        raise Refused(f"a scale of {value.rank} dimensions", "a block size", "block_size")
    names = [f"i{k}" for k in range(of.rank)]
    axis = axis % of.rank
    at = ", ".join(f"{m} // {block}" if k == axis else m for k, m in enumerate(names))
    ranges = [f"{m} in 0..{d}" for m, d in zip(names, of.shape, strict=True)]
    return n.define("scale", ranges, f"{text}[{at}]").text


def saturated(
    dtype: DType, text: str, zero: str | None, ends: tuple[int, int] | None = None
) -> str:
    """round(text) + zero in an integer dtype, at most its ends, or those given."""
    info = np.iinfo(dtype.numpy)
    low, high = ends or (info.min, info.max)
    whole = f"round({text})" + (f" + {zero}" if zero else "")
    return f"{dtype}(clamp({whole}, {low}.0, {high}.0))"


@op("QuantizeLinear", unread=["saturate", "precision"])
def _quantize(n: Node) -> Val | str:
    """round(x / scale) + zero point, to even; f8 by conversion, which saturates."""
    value, scale = n.val(0), n.val(1)
    axis, block = n.attr("axis", 1), n.attr("block_size", 0)
    number = n.attr("output_dtype", 0)
    zero = n.maybe(2)
    number = number or (2 if zero is None else zero.held)
    dtype = zero.dtype if zero is not None else dtype_of(number)
    x = n.x(0) if value.dtype.is_float else f"f32({n.x(0)})"
    s = spread(n, scale, value, axis, block)
    is_plain = {value.dtype.name, scale.dtype.name} <= {"f32", "i32"} and number not in HELD
    if is_plain and dtype.name in _WHOLE:
        at = f"{dtype}(0)" if zero is None else spread(n, zero, value, axis, block)
        return f"nn.quantize({x}, {s}, {at})"
    if value.dtype.is_float and scale.dtype != value.dtype:
        x, s = f"f32({x})", f"f32({s})"
    if value.dtype.is_small_float and scale.dtype == value.dtype:
        x, s = f"f32({x})", f"f32({s})"
    if dtype.is_float:
        held = number in HELD
        return narrowed(n, number, f"{x} / {s}") if held else f"{dtype}({x} / {s})"
    z = None if zero is None else f"f32({spread(n, zero, value, axis, block)})"
    if number not in HELD:
        return saturated(dtype, f"{x} / {s}", z)
    bits = int(type_name(number)[-1])
    low = -(1 << (bits - 1)) if dtype.kind == "int" else 0
    text = saturated(dtype, f"{x} / {s}", z, (low, low + (1 << bits) - 1))
    return replace(n.let(n.hint, text), held=number)


def _is_zero(point: Val) -> bool:
    return point.known is not None and point.known.dtype != object and not point.known.any()


def _single(n: Node) -> Val | None:
    """The one number that is meant, where it is known."""
    q, scale = n.number(0), n.number(1)
    zero = np.int64(0) if n.maybe(2) is None else n.number(2)
    if q is None or scale is None or zero is None or not n.val(0).dtype.is_int:
        return None
    if not isinstance(scale, np.float32):
        return None
    shape = [d.as_int() or 0 for d in n.val(0).shape]
    whole = np.float32(int(q.item()) - int(zero.item()))
    return n.constant(n.hint, np.full(shape, whole * scale, np.float32))


@op("DequantizeLinear")
def _dequantize(n: Node) -> Val | str:
    """(x - zero point) * scale."""
    value, scale = n.val(0), n.val(1)
    axis, block = n.attr("axis", 1), n.attr("block_size", 0)
    number = n.attr("output_dtype", 0)
    zero = n.maybe(2)
    single = _single(n) if number in (0, TensorProto.FLOAT) else None
    if single is not None:
        return single
    text = n.x(0)
    if not value.dtype.is_float and scale.dtype.name == "f32" and number in (0, TensorProto.FLOAT):
        given = [text, spread(n, scale, value, axis, block)]
        if zero is not None and not (value.known is not None and _is_zero(zero)):
            given.append(spread(n, zero, value, axis, block))
        return f"nn.dequantize({', '.join(given)})"
    if value.dtype.is_float or zero is None:
        text = f"f32({text})"
    else:
        text = f"f32(i32({text}) - i32({spread(n, zero, value, axis, block)}))"
    result = dtype_of(number) if number else scale.dtype
    s = spread(n, scale, value, axis, block)
    found = f"{text} * {s if scale.dtype.name == 'f32' else f'f32({s})'}"
    return found if result.name == "f32" else f"{result}({found})"


def _shifted(n: Node, index: int, zero: int, rows: bool = False) -> Val:
    """An integer operand less its zero point, as i32."""
    value = n.val(index)
    text = f"i32({n.x(index)})"
    point = n.maybe(zero)
    if point is not None:
        at = n.bound(point, "zero")
        if point.rank == 1 and point.shape[0].as_int() == 1:
            at = f"{at}[0]"
        elif point.rank == 1 and rows:
            at = f"{at}[:, None]"
        text = f"{text} - i32({at})"
    found = n.let("whole", text)
    return Val(found.text, found.type, None, value.depends)


@op("MatMulInteger")
def _matmul_integer(n: Node) -> str:
    return f"{_shifted(n, 0, 2, rows=True).text} @ {_shifted(n, 1, 3).text}"


@op("QLinearMatMul")
def _qlinear_matmul(n: Node) -> str:
    """Products in i32, scaled in f32."""
    a = n.let("whole", less_zero(n, 0, 2, rows=True)).text
    b = n.let("whole", less_zero(n, 3, 5)).text
    return requantised(n, f"{a} @ {b}", scale_of(n, 1, rows=True), scale_of(n, 4))


def requantised(n: Node, total: str, first: str, second: str) -> str:
    """Sums of products of integers at two scales, at the scale and zero point of inputs 6 and 7."""
    own = scale_of(n, 6)
    if n.val(7).dtype.name in _WHOLE:
        return f"nn.requantize({total}, {first}, {second}, {own}, {stored_point(n, 7)})"
    scale = f"{first} * {second} / {own}"
    return saturated(n.val(7).dtype, f"f32({total}) * ({scale})", f"f32({point(n, 7)})")


def stored_point(n: Node, index: int) -> str:
    """A scale or zero point as data of the model, even where it is one known number."""
    value = n.val(index)
    text = n.stored(value) if value.known is not None else n.bound(value, "c")
    return f"{text}[0]" if value.rank == 1 and value.shape[0].as_int() == 1 else text


def point(n: Node, index: int, rows: bool = False) -> str:
    """A scale or zero point: one for all, or one for each row or column."""
    value = n.val(index)
    text = n.bound(value, "c")
    if value.rank == 1 and value.shape[0].as_int() == 1:
        return f"{text}[0]"
    return f"{text}[:, None]" if rows and value.rank == 1 else text


def scale_of(n: Node, index: int, rows: bool = False) -> str:
    """A scale as f32."""
    value = n.val(index)
    single = value.rank == 0 or (value.rank == 1 and value.shape[0].as_int() == 1)
    text = stored_point(n, index) if single else point(n, index, rows)
    return text if n.val(index).dtype.name == "f32" else f"f32({text})"


def less_zero(n: Node, index: int, zero: int, rows: bool = False) -> str:
    """A quantised input without its zero point, in i32."""
    at = n.maybe(zero)
    if at is None:
        return f"i32({n.x(index)})"
    return f"i32({n.x(index)}) - i32({point(n, zero, rows)})"


def _whole_conv(n: Node, x: Val, weight: Val, index: int) -> Val:
    """The convolution of two i32 tensors, zeros around."""
    window = window_of(n, kernel_size(n, n.val(index)), x.shape[2:])
    inputs = n.inputs
    n.inputs = [x, *inputs[1:]]
    text = padded(n, x, window)
    n.inputs = inputs
    return convolved(n, text, weight.text, weight, window, n.attr("group", 1))


@op("ConvInteger")
def _conv_integer(n: Node) -> Written:
    x = _shifted(n, 0, 2)
    zero = n.maybe(3)
    w = _shifted(n, 1, 3) if zero is None or not zero.rank else n.let(
        "kernel", f"i32({n.x(1)}) - i32({n.bound(zero)}[:{', None' * (n.val(1).rank - 1)}])")
    found = _whole_conv(n, x, w, 1)
    return f"i32({found.text})" if found.dtype.name != "i32" else found


@op("QLinearConv")
def _qlinear_conv(n: Node) -> str:
    rank = n.val(0).rank
    x = n.let("whole", less_zero(n, 0, 2))
    kernel = n.val(5)
    text = less_zero(n, 3, 5)
    if kernel.rank and kernel.shape[0].as_int() != 1:
        zero = f"{n.bound(kernel, 'c')}[:{', None' * (rank - 1)}]"
        text = f"i32({n.x(3)}) - i32({zero})"
    w = n.let("kernel", text)
    found = _whole_conv(n, x, w, 3)
    total = found.text if found.dtype.name == "i32" else f"i32({found.text})"
    if n.maybe(8) is not None:
        total = f"{total} + {per_channel(n.bound(n.val(8), 'bias'), rank)}"
    scales = n.val(4)
    ws = scale_of(n, 4)
    if scales.rank and scales.shape[0].as_int() != 1:
        ws = per_channel(n.bound(scales, "scales"), rank)
    return requantised(n, total, scale_of(n, 1), ws)
