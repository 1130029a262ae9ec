"""Ops of ONNX Runtime's own domain that its optimizer writes: norms, activations, products.

Source: "Contrib Operators" of ONNX Runtime (domain com.microsoft).
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val, axis_of
from stagefuse.onnx.record import Written, op, records
from stagefuse.onnx.text import listed, literal, size_text

from .norms import per_channel, standardized

DOMAIN = "com.microsoft"
STANDARD = 16
"""The opset whose forms its namesakes of standard ops have."""


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


def product(n: Node) -> str:
    """Of two sides that may be transposed, scaled."""
    alpha = n.attr("alpha", 1.0)
    text = f"{_side(n, 0, 'A')} @ {_side(n, 1, 'B')}"
    return text if alpha == 1.0 else f"{alpha!r} * ({text})"


def _side(n: Node, index: int, name: str) -> str:
    """A factor, transposed: `transBatch` says that its rows are its first axis."""
    rank = n.val(index).rank
    order = list(range(rank))
    if n.attr(f"transBatch{name}", 0) and rank > 2:
        order = [*order[1:-1], order[0], order[-1]]
    if n.attr(f"trans{name}", 0) and rank > 1:
        order = [*order[:-2], order[-1], order[-2]]
    text = n.x(index)
    return text if order == sorted(order) else f"transpose({text}, {order})"


@op(f"{DOMAIN}::FusedMatMul", f"{DOMAIN}::TransposeMatMul")
def _fused_matmul(n: Node) -> str:
    return product(n)


# What follows a product


def activated(n: Node, text: str) -> str:
    """The activation that a fused op names, of the result before it. Raises Refused."""
    name = n.attr("activation", "") or ""
    given = n.attr("activation_params")
    if given is None:
        named = (n.attr(f"activation_{k}") for k in ("alpha", "beta", "gamma"))
        given = [v for v in named if v is not None]
    first, second = ([literal(float(v)) for v in given] + ["", ""])[:2]
    forms = {
        "": "{}", "Relu": "nn.relu({})", "Tanh": "tanh({})", "Sigmoid": "sigmoid({})",
        "Gelu": "nn.gelu({})", "LeakyRelu": f"nn.leaky_relu({{}}, {first or 0.01})",
        "Clip": f"clamp({{}}, {first}, {second})",
        "HardSigmoid": f"clamp({first or 0.2} * ({{}}) + {second or 0.5}, 0.0, 1.0)",
    }  # fmt: skip
    if name not in forms or (name == "Clip" and not second):
        raise Refused(f"the activation {name!r}", f"one of {', '.join(filter(None, forms))}",
                      "activation")  # fmt: skip
    return forms[name].format(n.let("whole", text).text if name else text)


def standard(n: Node, name: str, *inputs: Val | None) -> Val:
    """The first result of an op of the standard, with this node's attributes."""
    inner = replace(n, op=name, opset=STANDARD, inputs=list(inputs or n.inputs))
    written = records()[name].write(inner)
    first = written if isinstance(written, str | Val) else written[0]
    return first if isinstance(first, Val) else n.let(n.hint, first)


def channels_first(n: Node, value: Val) -> Val:
    order = [0, value.rank - 1, *range(1, value.rank - 1)]
    return n.let("x", f"transpose({n.x_of(value)}, {order})")


def channels_last(n: Node, value: Val) -> str:
    return f"transpose({n.x_of(value)}, {[0, *range(2, value.rank), 1]})"


@op(f"{DOMAIN}::FusedGemm")
def _fused_gemm(n: Node) -> str:
    return activated(n, standard(n, "Gemm").text)


@op(f"{DOMAIN}::FusedMatMulActivation")
def _activated_product(n: Node) -> str:
    return activated(n, product(n))


@op(f"{DOMAIN}::GemmFastGelu")
def _gemm_gelu(n: Node) -> str:
    bias = f" + {n.x(2)}" if n.maybe(2) is not None else ""
    return f"nn.gelu_tanh({n.x(0)} @ {n.x(1)}{bias})"


@op(f"{DOMAIN}::FusedConv")
def _fused_conv(n: Node) -> str:
    """A convolution, what is added to it, and an activation."""
    text = standard(n, "Conv", *n.inputs[:3]).text
    return activated(n, text if n.maybe(3) is None else f"{text} + {n.x(3)}")


@op(f"{DOMAIN}::NhwcFusedConv", f"{DOMAIN}::NhwcConv")
def _fused_conv_last(n: Node) -> str:
    """The same with channels last in the image and the result."""
    made = standard(n, "Conv", channels_first(n, n.val(0)), *n.inputs[1:3])
    text = channels_last(n, made)
    return activated(n, text if n.maybe(3) is None else f"{text} + {n.x(3)}")


@op(f"{DOMAIN}::NhwcMaxPool")
def _max_pool_last(n: Node) -> str:
    return channels_last(n, standard(n, "MaxPool", channels_first(n, n.val(0))))


def _as_standard(n: Node) -> Val:
    return standard(n, n.op)


for _name in ("GatherND", "GridSample", "Pad", "Range", "Trilu"):
    op(f"{DOMAIN}::{_name}")(_as_standard)


@op(f"{DOMAIN}::ExpandDims")
def _expand_dims(n: Node) -> str:
    (axis,) = n.ints(1, "axis")
    rank = n.val(0).rank + 1
    at = ["None" if k == axis_of(axis, rank) else ":" for k in range(rank)]
    return f"{n.bound(n.val(0))}[{', '.join(at)}]"


# Norms


@op("SimplifiedLayerNormalization", unread=["stash_type"])
def _simplified(n: Node) -> Written:
    """Without a mean; of the standard's domain, though the standard does not have it."""
    return [standard(n, "RMSNormalization")]


def _skipped(n: Node, bias: int) -> Val:
    """The sum that a norm is of."""
    text = f"{n.x(0)} + {n.x(1)}"
    return n.let("total", text if n.maybe(bias) is None else f"{text} + {n.x(bias)}")


def _with_sum(n: Node, normed: Val, total: Val) -> Written:
    """The norm and, as the fourth result, the sum. Raises Refused for those between."""
    if any(n.outputs[1:3]):
        raise Refused("the statistics of a norm as results", "the norm and the sum")
    return [normed, normed, normed, total]


@op(f"{DOMAIN}::SkipLayerNormalization")
def _skip_norm(n: Node) -> Written:
    """Inputs: x, what is added, scale, shift, bias of the sum."""
    total = _skipped(n, 4)
    inner = replace(n, outputs=n.outputs[:1], attributes={"epsilon": 1e-12, **n.attributes})
    return _with_sum(n, standard(inner, "LayerNormalization", total, n.val(2), n.maybe(3)), total)


@op(f"{DOMAIN}::SkipSimplifiedLayerNormalization")
def _skip_rms_norm(n: Node) -> Written:
    total = _skipped(n, 3)
    inner = replace(n, attributes={"epsilon": 1e-12, **n.attributes})
    return _with_sum(n, standard(inner, "RMSNormalization", total, n.val(2)), total)


@op(f"{DOMAIN}::EmbedLayerNormalization", unread=["mask_index_type"])
def _embed_norm(n: Node) -> Written:
    """Inputs: ids, segments, tables of words, positions and segments, scale, shift, mask,
    positions. Results: the norm, how many tokens the mask keeps, the sum."""
    steps, batch = n.val(0).shape[1], n.val(0).shape[0]
    text = f"{n.x(2)}[{n.x(0)}]"
    text += (
        f" + {n.x(3)}[{n.x(8)}]"
        if n.maybe(8) is not None
        else (f" + {n.x(3)}[:{size_text(steps)}]")
    )
    if n.maybe(1) is not None:
        text += f" + {n.x(4)}[{n.x(1)}]"
    total = n.let("total", text)
    inner = replace(n, outputs=n.outputs[:1], attributes={"epsilon": 1e-12, **n.attributes})
    normed = standard(inner, "LayerNormalization", total, n.val(5), n.val(6))
    kept = f"zeros([{size_text(batch)}], i32)"
    if n.maybe(7) is not None:
        kept = f"i32(sum({n.x(7)}, axis=1))"
    return [normed, kept, total]


@op(f"{DOMAIN}::GroupNorm", f"{DOMAIN}::SkipGroupNorm")
def _group_norm(n: Node) -> Written:
    """In f32, with SiLU behind it if asked for; channels are last unless told otherwise."""
    last, value = bool(n.attr("channels_last", 1)), n.val(0)
    total = value
    if n.op == "SkipGroupNorm":
        skip = n.bound(n.val(3), "skip")
        if n.val(3).rank == 2:
            skip += "[:, None, None, :]" if last else "[:, :, None, None]"
        total = n.let("total", f"{n.x(0)} + {skip}")
        if n.maybe(4) is not None:
            bias = n.x(4) if last else per_channel(n.bound(n.val(4), "bias"), value.rank)
            total = n.let("total", f"{total.text} + {bias}")
    x = channels_first(n, total) if last else total
    groups, (b, c, *rest) = n.attr("groups"), x.shape
    count = c.as_int()
    if count is None or count % groups:
        raise Refused(f"{c} channels in {groups} groups", "a multiple of the groups")
    split = listed([b, groups, count // groups, *rest])
    grouped = n.let("grouped", f"reshape(f32({n.x_of(x)}), {split})").text
    y = standardized(n, grouped, tuple(range(2, x.rank + 1)), n.attr("epsilon", 1e-5))
    scale, shift = (per_channel(n.bound(n.val(k), "c"), x.rank) for k in (1, 2))
    text = f"reshape({y}, {listed(x.shape)}) * f32({scale}) + f32({shift})"
    if n.attr("activation", 0):
        text = f"nn.silu({text})"
    if value.dtype.name != "f32":
        text = f"{value.dtype}({text})"
    normed = n.let("normed", text)
    return [channels_last(n, normed) if last else normed, total]


# Sums


@op(f"{DOMAIN}::BiasAdd")
def _bias_add(n: Node) -> str:
    return f"{n.x(0)} + {n.x(1)} + {n.x(2)}"


@op(f"{DOMAIN}::BiasSplitGelu")
def _bias_split_gelu(n: Node) -> str:
    total = n.let("total", f"{n.x(0)} + {n.x(1)}")
    a, gate = n.many(["a", "gate"], f"split({total.text}, 2, axis=-1)")
    return f"{a.text} * nn.gelu({gate.text})"


@op(f"{DOMAIN}::BiasSoftmax", unread=["is_inner_broadcast"])
def _bias_softmax(n: Node) -> str:
    rank, axis = n.val(0).rank, n.attr("axis", 1)
    if axis_of(axis, rank) != rank - 1:
        raise Refused("a softmax over several axes", "the last one", "axis")
    return f"nn.softmax({n.x(0)} + {n.x(1)})"


@op(f"{DOMAIN}::BiasDropout", unread=["seed"])
def _bias_dropout(n: Node) -> str:
    """Nothing is dropped outside of training."""
    if n.maybe(4) is not None and bool(n.known(4, "training_mode").reshape(-1)[0]):
        raise Refused("dropout in training", "random numbers in the language")
    text = f"{n.x(0)} + {n.x(1)}"
    return text if n.maybe(2) is None else f"{text} + {n.x(2)}"
