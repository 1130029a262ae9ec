"""Normalizations."""

from __future__ import annotations

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, axis_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import listed

from .reductions import axis_text


def per_channel(text: str, rank: int) -> str:
    """A vector of channels, to be used with [B, C, ...]."""
    return f"{text}[:{', None' * (rank - 2)}]" if rank > 2 else text


@op("BatchNormalization", unread=["momentum", "is_test"])
def _batch_norm(n: Node) -> Written:
    """With the statistics of the model; in training with those of the batch.

    Until opset 8 `spatial=0` asks for those of each place, [C, D1, ...], not of each channel.
    """
    if n.attr("training_mode", 0):
        return _trained(n)
    rank, eps = n.val(0).rank, n.attr("epsilon", 1e-5)
    gamma, beta, mean, var = (n.bound(n.val(k), "c") for k in range(1, 5))
    dtype, wide = n.val(0).dtype, n.val(4).dtype
    if n.val(1).dtype != wide:
        gamma, beta = (n.let("c", f"{wide}({c})").text for c in (gamma, beta))
    scale = n.let("scale", f"{gamma} * rsqrt({var} + {eps!r})").text
    shift = n.let("shift", f"{beta} - {mean} * {scale}").text
    if n.attr("spatial", 1):
        scale, shift = per_channel(scale, rank), per_channel(shift, rank)
    x = n.x(0) if dtype == wide else f"{wide}({n.x(0)})"
    text = f"{x} * {scale} + {shift}"
    return text if dtype == wide else f"{dtype}({text})"


def _trained(n: Node) -> Written:
    """By the batch's own mean and variance, with which the model's are mixed."""
    rank, wide = n.val(0).rank, n.val(3).dtype
    axes = ", ".join(str(k) for k in range(rank) if k != 1)
    x = n.let("x", f"{wide}({n.x(0)})").text
    gamma, beta, mean, var = (n.bound(n.val(k), "c") for k in range(1, 5))
    found = n.let("mean_of_batch", f"mean({x}, axis=({axes},))").text
    spread = n.let("variance_of_batch", f"var({x}, axis=({axes},))").text
    scale = n.let("scale", f"{wide}({gamma}) * rsqrt({spread} + {n.attr('epsilon', 1e-5)!r})").text
    y = (f"({x} - {per_channel(found, rank)}) * {per_channel(scale, rank)}"
         f" + {per_channel(f'{wide}({beta})', rank)}")  # fmt: skip
    keep = n.attr("momentum", 0.9)
    mixed = ((mean, found), (var, spread))
    kept = [f"{old} * {keep!r} + {new} * {1 - keep!r}" for old, new in mixed]
    return [f"{n.val(0).dtype}({y})", *kept]


def standardized(n: Node, x: str, axes: tuple[int, ...], eps: float) -> str:
    """Lines for mean 0 and variance 1 along axes."""
    where = f"axis={axis_text(axes)}, keepdims=True"
    centred = n.let("centred", f"{x} - mean({x}, {where})").text
    return f"{centred} * rsqrt(mean({centred} * {centred}, {where}) + {eps!r})"


@op("InstanceNormalization")
def _instance_norm(n: Node) -> str:
    rank = n.val(0).rank
    y = standardized(n, n.x(0), tuple(range(2, rank)), n.attr("epsilon", 1e-5))
    scale, bias = (per_channel(n.bound(n.val(k), "c"), rank) for k in (1, 2))
    return f"{y} * {scale} + {bias}"


@op("LayerNormalization", unread=["stash_type"])
def _layer_norm(n: Node) -> Written:
    """Computed in f32 or wider; the mean and 1 / deviation are results too."""
    value = n.val(0)
    axis, eps = axis_of(n.attr("axis", -1), value.rank), n.attr("epsilon", 1e-5)
    scope = n.layer(n.val(1), n.maybe(2))
    alone = len(n.outputs) == 1 and axis == value.rank - 1 and n.val(1).rank == 1
    if scope is not None and alone and not value.dtype.is_small_float:
        return f"nn.layer_norm({n.x(0)}, {scope}, eps={eps!r})"
    axes = tuple(range(axis, value.rank))
    where = f"axis={axis_text(axes)}, keepdims=True"
    x = n.x(0)
    if value.dtype.is_small_float:
        x = n.let("wide", f"f32({x})").text
    mean = n.let("mean_", f"mean({x}, {where})")
    centred = n.let("centred", f"{x} - {mean.text}").text
    scale = n.let("inv_std", f"rsqrt(mean({centred} * {centred}, {where}) + {eps!r})")
    y = f"{centred} * {scale.text}"
    y = f"{value.dtype}({y})" if value.dtype.is_small_float else y
    y = f"{y} * {n.x(1)}"
    if n.maybe(2) is not None:
        y = f"{y} + {n.x(2)}"
    return [y, mean, scale]


@op("RMSNormalization", unread=["stash_type"])
def _rms_norm(n: Node) -> str:
    value = n.val(0)
    axis, eps = axis_of(n.attr("axis", -1), value.rank), n.attr("epsilon", 1e-5)
    where = f"axis={axis_text(tuple(range(axis, value.rank)))}, keepdims=True"
    x = n.x(0)
    if value.dtype.is_small_float:
        x = n.let("wide", f"f32({x})").text
    y = f"{x} * rsqrt(mean({x} * {x}, {where}) + {eps!r})"
    y = f"{value.dtype}({y})" if value.dtype.is_small_float else y
    return f"{y} * {n.x(1)}"


@op("GroupNormalization", unread=["stash_type"])
def _group_norm(n: Node) -> str:
    """The scale is per group before opset 21, per channel since."""
    value, groups = n.val(0), n.attr("num_groups")
    b, c, *rest = value.shape
    count = c.as_int()
    if count is None or count % groups:
        raise Refused(f"{c} channels in {groups} groups", "a multiple of the groups")
    split = [b, groups, count // groups, *rest]
    g = n.let("grouped", f"reshape({n.x(0)}, {listed(split)})").text
    y = standardized(n, g, tuple(range(2, 2 + len(rest) + 1)), n.attr("epsilon", 1e-5))
    scale, bias = (n.bound(n.val(k), "c") for k in (1, 2))
    if n.opset < 21:
        spread = f"[:{', None' * (len(rest) + 1)}]"
        return f"reshape({y} * {scale}{spread} + {bias}{spread}, {listed(value.shape)})"
    whole = f"reshape({y}, {listed(value.shape)})"
    return f"{whole} * {per_channel(scale, value.rank)} + {per_channel(bias, value.rank)}"


@op("LpNormalization")
def _lp_norm(n: Node) -> str:
    axis, p, x = n.attr("axis", -1), n.attr("p", 2), n.x(0)
    where = f"axis={axis}, keepdims=True"
    length = f"sqrt(sum({x} * {x}, {where}))" if p == 2 else f"sum(abs({x}), {where})"
    length = n.let("length", length).text
    return f"select({length} == 0.0, 0.0, {x} / {length})"


@op("MeanVarianceNormalization")
def _mvn(n: Node) -> str:
    axes = tuple(n.attr("axes") or (0, 2, 3))
    where = f"axis={axis_text(axes)}, keepdims=True"
    x = n.x(0)
    centred = n.let("centred", f"{x} - mean({x}, {where})").text
    return f"{centred} / (sqrt(mean({centred} * {centred}, {where})) + 1e-09)"


@op("LRN")
def _lrn(n: Node) -> str:
    """Source: the op's definition: a window of channels, the odd one after the centre."""
    value, size = n.val(0), n.attr("size")
    alpha, beta, bias = n.attr("alpha", 1e-4), n.attr("beta", 0.75), n.attr("bias", 1.0)
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    widths = ", ".join([f"(0, 0), ({before}, {after})", *["(0, 0)"] * (value.rank - 2)])
    x = n.x(0)
    padded = n.let("squares", f"pad({x} * {x}, [{widths}])").text
    names = [f"i{k}" for k in range(value.rank)]
    at = ", ".join(f"{m} + k" if k == 1 else m for k, m in enumerate(names))
    total = n.define("around", names, f"sum[k in 0..{size}] {padded}[{at}]").text
    return f"{x} / ({bias!r} + {alpha / size!r} * {total}) ** {beta!r}"
