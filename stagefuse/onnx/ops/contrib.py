"""Ops of ONNX Runtime's own domain that its quantizer and optimizer write.

Source: "Contrib Operators" of ONNX Runtime (domain com.microsoft).
"""

from __future__ import annotations

from ..errors import Refused
from ..node import Node
from ..record import Written, op
from .quantised import less_zero, point, saturated, scale_of
from .reductions import axis_text

DOMAIN = "com.microsoft"


def real(n: Node, index: int) -> str:
    """A quantised input, its scale and its zero point (the next two), as f32."""
    whole = f"f32({less_zero(n, index, index + 2)})"
    return n.let("real", f"{whole} * {scale_of(n, index + 1)}").text


def requantised(n: Node, text: str, scale: int) -> str:
    """f32 in the dtype of the zero point after its scale."""
    zero = n.val(scale + 1)
    return saturated(zero.dtype, f"({text}) / {scale_of(n, scale)}", f"f32({point(n, scale + 1)})")


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
    if n.attr("channels_last", 0):
        raise Refused("channels last", "channels first", "channels_last")
    axes = axis_text(tuple(range(2, n.val(0).rank)))
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


@op(f"{DOMAIN}::Gelu")
def _gelu(n: Node) -> str:
    return f"nn.gelu({n.x(0)})"


@op(f"{DOMAIN}::BiasGelu")
def _bias_gelu(n: Node) -> str:
    return f"nn.gelu({n.x(0)} + {n.x(1)})"


@op(f"{DOMAIN}::FastGelu")
def _fast_gelu(n: Node) -> str:
    bias = f" + {n.x(1)}" if n.maybe(1) is not None else ""
    return f"nn.gelu_tanh({n.x(0)}{bias})"


@op(f"{DOMAIN}::QuickGelu")
def _quick_gelu(n: Node) -> str:
    x = n.x(0)
    return f"{x} * sigmoid({n.attr('alpha', 1.702)!r} * {x})"


@op(f"{DOMAIN}::FusedMatMul", unread=["transBatchA", "transBatchB"])
def _fused_matmul(n: Node) -> str:
    sides = []
    for index, name in enumerate(("transA", "transB")):
        rank, text = n.val(index).rank, n.x(index)
        if n.attr(name, 0) and rank > 1:
            order = [*range(rank - 2), rank - 1, rank - 2]
            text = f"transpose({text}, {order})"
        sides.append(text)
    alpha = n.attr("alpha", 1.0)
    text = f"{sides[0]} @ {sides[1]}"
    return text if alpha == 1.0 else f"{alpha!r} * ({text})"


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
    shape = f"[{rows}, {blocks}]"
    zero = n.maybe(3)
    if zero is None:
        zeros = f"full({shape}, {1 << bits - 1}.0, f32)"
    elif zero.dtype.is_int:
        packed = f"reshape({n.x(3)}, [{rows}, 1, {-(-blocks * bits // 8)}])"
        zeros = f"f32(onnx.unpacked({packed}, {bits}))[:, 0, :{blocks}]"
    else:
        zeros = f"f32(reshape({n.x(3)}, {shape}))"
    codes = f"reshape({n.x(1)}, [{rows}, {blocks}, {size * bits // 8}])"
    scale = f"f32(reshape({n.x(2)}, {shape}))"
    matrix = f"onnx.unfolded({codes}, {scale}, {zeros}, {bits})[:, :{depth}]"
    dtype = n.val(0).dtype.name
    x = n.x(0) if dtype == "f32" else f"f32({n.x(0)})"
    text = f"{x} @ transpose({n.let('matrix', matrix).text})"
    if n.maybe(5) is not None:
        text += f" + {n.x(5)}" if dtype == "f32" else f" + f32({n.x(5)})"
    return text if dtype == "f32" else f"{dtype}({text})"
