"""Integers with scales in ONNX Runtime's own domain, as its quantizer writes them.

Source: "Contrib Operators" of ONNX Runtime (domain com.microsoft).
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node
from stagefuse.onnx.record import Written, op

from .contrib import DOMAIN, channels_first, channels_last, standard
from .quantised import less_zero, scale_of, stored_point
from .recurrent import recurrent
from .reductions import axis_text


def real(n: Node, index: int) -> str:
    """A quantised input, its scale and its zero point (the next two), as f32."""
    given = [n.x(index), stored_point(n, index + 1)]
    if n.maybe(index + 2) is not None:
        given.append(stored_point(n, index + 2))
    return n.let("real", f"nn.dequantize({', '.join(given)})").text


def requantised(n: Node, text: str, scale: int) -> str:
    """f32 in the dtype of the zero point after its scale."""
    return f"nn.quantize({text}, {stored_point(n, scale)}, {stored_point(n, scale + 1)})"


@op(f"{DOMAIN}::QLinearAdd", f"{DOMAIN}::QLinearMul")
def _qlinear_binary(n: Node) -> str:
    sign = "+" if n.op == "QLinearAdd" else "*"
    return requantised(n, f"{real(n, 0)} {sign} {real(n, 3)}", 6)


@op(f"{DOMAIN}::QLinearSigmoid")
def _qlinear_sigmoid(n: Node) -> str:
    return requantised(n, f"sigmoid({real(n, 0)})", 3)


@op(f"{DOMAIN}::QLinearLeakyRelu")
def _qlinear_leaky(n: Node) -> str:
    return requantised(n, f"nn.leaky_relu({real(n, 0)}, {n.attr('alpha', 0.01)!r})", 3)


@op(f"{DOMAIN}::QLinearSoftmax", unread=["opset"])
def _qlinear_softmax(n: Node) -> str:
    return requantised(n, f"nn.softmax({real(n, 0)}, axis={n.attr('axis', -1)})", 3)


@op(f"{DOMAIN}::QLinearGlobalAveragePool")
def _qlinear_global_average(n: Node) -> str:
    rank, last = n.val(0).rank, bool(n.attr("channels_last", 0))
    axes = axis_text(tuple(range(1, rank - 1) if last else range(2, rank)))
    return requantised(n, f"mean({real(n, 0)}, axis={axes}, keepdims=True)", 3)


@op(f"{DOMAIN}::QLinearConcat")
def _qlinear_concat(n: Node) -> str:
    """The scale and zero point of the result come first."""
    parts = [real(n, k) for k in range(2, len(n.inputs), 3)]
    return requantised(n, f"concat([{', '.join(parts)}], axis={n.attr('axis', 1)})", 0)


@op(f"{DOMAIN}::QGemm")
def _qgemm(n: Node) -> Written:
    """Products in i32; without a scale of its own the result stays f32. The second matrix may
    have a zero point and a scale for each column of the result."""
    a = n.let("whole", less_zero(n, 0, 2)).text
    b = n.let("whole", less_zero(n, 3, 5, rows=bool(n.attr("transB", 0)))).text
    a = f"transpose({a})" if n.attr("transA", 0) else a
    b = f"transpose({b})" if n.attr("transB", 0) else b
    total = n.let("total", f"{a} @ {b}").text
    if n.maybe(6) is not None:
        total = f"({total} + {n.x(6)})"
    text = f"f32({total}) * ({scale_of(n, 1)} * {scale_of(n, 4)})"
    alpha = n.attr("alpha", 1.0)
    text = text if alpha == 1.0 else f"{text} * {alpha!r}"
    return text if n.maybe(7) is None else requantised(n, text, 7)


def _blocks(n: Node, codes: int, sizes: tuple[int, int, int], bits: int, scale: int, zero: int
            ) -> str:  # fmt: skip
    """The matrix of rows of blocks, from inputs: codes in bytes, scales, and zero points."""
    rows, blocks, size = sizes
    shape, point = f"[{rows}, {blocks}]", n.maybe(zero)
    if point is None:
        zeros = f"full({shape}, {1 << bits - 1}.0, f32)"
    elif point.dtype.is_int:
        packed = f"reshape({n.x(zero)}, [{rows}, 1, {-(-blocks * bits // 8)}])"
        zeros = f"f32(onnx.unpacked({packed}, {bits}))[:, 0, :{blocks}]"
    else:
        zeros = f"f32(reshape({n.x(zero)}, {shape}))"
    packed = f"reshape({n.x(codes)}, [{rows}, {blocks}, {size * bits // 8}])"
    return f"onnx.unfolded({packed}, f32(reshape({n.x(scale)}, {shape})), {zeros}, {bits})"


@op(f"{DOMAIN}::MatMulNBits", unread=["accuracy_level", "weight_prepacked"])
def _matmul_nbits(n: Node) -> str:
    """x times a matrix [N, K] of blocks along K, whose codes have 2, 4 or 8 bits."""
    rows, depth, size = n.attr("N"), n.attr("K"), n.attr("block_size")
    bits = n.attr("bits", 4)
    if bits not in (2, 4, 8):
        raise Refused(f"codes of {bits} bits", "2, 4 or 8", "bits")
    if n.maybe(4) is not None:
        raise Refused("blocks in another order", "no `g_idx`")
    blocks = -(-depth // size)
    matrix = f"{_blocks(n, 1, (rows, blocks, size), bits, 2, 3)}[:, :{depth}]"
    dtype = n.val(0).dtype.name
    x = n.x(0) if dtype == "f32" else f"f32({n.x(0)})"
    text = f"{x} @ transpose({n.let('matrix', matrix).text})"
    if n.maybe(5) is not None:
        text += f" + {n.x(5)}" if dtype == "f32" else f" + f32({n.x(5)})"
    return text if dtype == "f32" else f"{dtype}({text})"


@op(f"{DOMAIN}::QLinearAveragePool")
def _qlinear_average(n: Node) -> str:
    """The pool of what the integers mean; channels may be last."""
    last = bool(n.attr("channels_last", 0))
    x = n.let("real", real(n, 0))
    y = standard(n, "AveragePool", channels_first(n, x) if last else x)
    return requantised(n, channels_last(n, y) if last else y.text, 3)


@op(f"{DOMAIN}::QLinearReduceMean")
def _qlinear_mean(n: Node) -> str:
    axes = tuple(n.attr("axes") or range(n.val(0).rank))
    keep = bool(n.attr("keepdims", 1))
    return requantised(n, f"mean({real(n, 0)}, axis={axis_text(axes)}, keepdims={keep})", 3)


@op(f"{DOMAIN}::QLinearWhere")
def _qlinear_where(n: Node) -> str:
    return requantised(n, f"select({n.x(0)}, {real(n, 1)}, {real(n, 4)})", 7)


@op(f"{DOMAIN}::QLinearConv")
def _qlinear_conv(n: Node) -> Written:
    """The standard's, whose channels may be last."""
    if not n.attr("channels_last", 0):
        return standard(n, "QLinearConv")
    x = channels_first(n, n.val(0))
    return channels_last(n, standard(n, "QLinearConv", x, *n.inputs[1:]))


for _name in ("QuantizeLinear", "DequantizeLinear"):
    op(f"{DOMAIN}::{_name}", unread=["saturate", "precision"])(lambda n: standard(n, n.op))


@op(f"{DOMAIN}::MatMulIntegerToFloat")
def _integer_to_float(n: Node) -> str:
    """Products in i32, scaled. Inputs: a, b, their scales, their zero points, bias."""
    a, b = (n.let("whole", less_zero(n, k, k + 4)).text for k in (0, 1))
    text = f"f32({a} @ {b}) * ({scale_of(n, 2)} * {scale_of(n, 3)})"
    return text if n.maybe(6) is None else f"{text} + {n.x(6)}"


@op(f"{DOMAIN}::DynamicQuantizeMatMul")
def _dynamic_matmul(n: Node) -> str:
    """x in u8 by its own range, times integers. Inputs: x, matrix, scale, zero point, bias."""
    q, scale, zero = n.many(["codes", "scale", "zero"], f"onnx.dynamic_quantized({n.x(0)})")
    b = n.let("whole", less_zero(n, 1, 3)).text
    product = f"(i32({q.text}) - i32({zero.text})) @ {b}"
    text = f"f32({product}) * ({scale.text} * {scale_of(n, 2)})"
    return text if n.maybe(4) is None else f"{text} + {n.x(4)}"


@op(f"{DOMAIN}::DynamicQuantizeLSTM")
def _dynamic_lstm(n: Node) -> Written:
    """An LSTM of weights in integers, [directions, inputs, 4 * hidden]. What it is given and
    carries stays in floats, where ONNX Runtime rounds it to 8 bits for each product."""
    inputs = list(n.inputs)
    for index, scale in ((1, 8), (2, 10)):
        text = f"i32({n.x(index)})"
        spread = "[:, None, None]" if n.val(scale).rank == 1 else "[:, None, :]"
        if n.maybe(scale + 1) is not None:
            text = f"({text} - i32({n.x(scale + 1)}{spread}))"
        real_ = f"transpose(f32({text}) * {n.x(scale)}{spread}, [0, 2, 1])"
        inputs[index] = n.let("weight", real_)
    return recurrent(replace(n, op="LSTM", inputs=inputs[:8]))


@op(f"{DOMAIN}::GatherBlockQuantized")
def _gather_blocks(n: Node) -> str:
    """Rows of a table of codes, whose last axis is in blocks with a scale each."""
    codes, scales = n.val(0), n.val(2)
    if n.attr("gather_axis", 0) or codes.rank != 2 or n.attr("quantize_axis", 1) % 2 != 1:
        raise Refused("blocks along the axis of the rows", "a table with blocks along columns")
    bits, size = n.attr("bits", 4), n.attr("block_size", 128)
    rows, width = (d.as_int() for d in codes.shape)
    if rows is None or width is None:
        raise Refused("a table of a size that varies", "constant sizes")
    if codes.held or bits == 8:
        zero = "" if n.maybe(3) is None else f" - f32({n.bound(n.val(3), 'zero')}[i, k // {size}])"
        if not zero and codes.dtype.kind == "uint":
            zero = f" - {1 << bits - 1}.0"
        body = f"(f32({n.bound(codes)}[i, k]){zero}) * f32({n.bound(scales)}[i, k // {size}])"
        matrix = n.define("matrix", ["i", "k"], body).text
    else:
        blocks = -(-width * 8 // bits // size)
        matrix = _blocks(n, 0, (rows, blocks, size), bits, 2, 3)
    text = f"{matrix}[{n.x(1)}]"
    return text if scales.dtype.name == "f32" else f"{scales.dtype}({text})"
