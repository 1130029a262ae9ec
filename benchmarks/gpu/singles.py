"""Sorts, scatters, gathers, running sums, reductions, index maps, and recurrences beside cuDNN's.

Sizes are unknown while compiling, but for those that shape a kernel (k of `topk`, units of a
recurrence). PyTorch's sums are of f64 where results are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import TORCH, Case, Given, Integers, Normal, Uniform


def sorts(torch: Any) -> Iterator[Case]:
    def sort(x: Any) -> Any:
        return torch.sort(x, stable=True)[0]

    for count in (1000, 100_000, 1_000_000, 10_000_000):
        source = "pipeline p(x: f32[N]) -> f32[N]:\n    sort(x)\n"
        yield Case(f"sort {count}", source, {"x": Uniform((count,))}, sort)
    for kind, count in (("f16", 1_000_000), ("i64", 1_000_000)):
        source = f"pipeline p(x: {kind}[N]) -> {kind}[N]:\n    sort(x)\n"
        make = Normal((count,), TORCH[kind]) if kind == "f16" else Integers(1 << 62, (count,))
        yield Case(f"sort {count} {kind}", source, {"x": make}, sort)
    for rows, length in ((4096, 256), (4096, 1024), (64, 100_000)):
        source = "pipeline p(x: f32[R, N]) -> f32[R, N]:\n    sort(x, axis=1)\n"
        yield Case(f"sort {rows} x {length}", source, {"x": Uniform((rows, length))}, sort)
    for rows, length in ((1, 1_000_000), (4, 131_072)):
        source = (
            "pipeline p(x: f32[R, N]) -> f32[R, 50] where N >= 50:\n"
            "    y, at = topk(x, 50)\n    y\n"
        )
        yield Case(
            f"first 50 of {rows} x {length}", source, {"x": Uniform((rows, length))},
            lambda x: torch.topk(x, 50)[0],
        )  # fmt: skip


def places(torch: Any) -> Iterator[Case]:
    """What is read and written where data says."""
    for target, updates, width in (
        (1_000_000, 1_000_000, 1), (256, 1_000_000, 1), (1000, 10_000, 1), (30_000, 8192, 768),
    ):  # fmt: skip
        yield Case(
            f"scatter_add {updates} x {width} into {target}",
            "pipeline p(x: f32[N, D], i: i64[M], u: f32[M, D]) -> f32[N, D]:\n"
            "    scatter_add(x, i, u)\n",
            {
                "x": Uniform((target, width)), "i": Integers(target, (updates,)),
                "u": Uniform((updates, width)),
            },
            lambda x, i, u: x.index_add(0, i, u),
            lambda x, i, u: x.double().index_add(0, i, u.double()),
        )  # fmt: skip
    for target in (100_000, 256):
        yield Case(
            f"scatter_add 1000000 i64 into {target}",
            "pipeline p(x: i64[N], i: i64[M], u: i64[M]) -> i64[N]:\n    scatter_add(x, i, u)\n",
            {
                "x": Integers(9, (target,)), "i": Integers(target, (1_000_000,)),
                "u": Integers(9, (1_000_000,)),
            },
            lambda x, i, u: x.index_add(0, i, u),
        )  # fmt: skip
    for rows, width, count, kind in (
        (100_000, 64, 1_000_000, "f32"), (50_000, 768, 16_384, "f32"), (50_000, 768, 16_384, "f16"),
        (1_000_000, 1, 1_000_000, "f32"),
    ):  # fmt: skip
        yield Case(
            f"gather {count} of {rows} x {width} {kind}",
            f"pipeline p(x: {kind}[N, D], i: i64[M]) -> {kind}[M, D]:\n    x[i]\n",
            {"x": Normal((rows, width), TORCH[kind]), "i": Integers(rows, (count,))},
            lambda x, i: x[i],
        )


def rows(torch: Any) -> Iterator[Case]:
    for count, length in ((1, 10_000_000), (16, 1_000_000), (4096, 4096)):
        make = {"x": Uniform((count, length))}
        for name, result in (("sum", "f32"), ("max", "f32"), ("argmax", "i64")):
            source = (
                f"pipeline p(x: f32[R, N]) -> {result}[R] where N >= 1:\n    {name}(x, axis=1)\n"
            )
            peer = partial(_along, getattr(torch, "amax" if name == "max" else name), 1)
            exact = partial(_exactly, torch.sum, 1) if name == "sum" else None
            yield Case(f"{name} of {count} x {length}", source, make, peer, exact)
    for count, length in (
        (1, 10_000_000), (16, 1_000_000), (32, 65_536), (4096, 4096), (16_384, 4096),
    ):  # fmt: skip
        source = "import nn\npipeline p(x: f32[R, N]) -> f32[R, N]:\n    nn.softmax(x)\n"
        peer, exact = partial(_along, torch.softmax, 1), partial(_exactly, torch.softmax, 1)
        name = f"softmax of {count} x {length}"
        yield Case(name, source, {"x": Uniform((count, length))}, peer, exact)
    for axis, count, length in (
        (1, 1, 10_000_000), (1, 4096, 4096), (0, 4096, 4096), (0, 100_000, 64),
    ):  # fmt: skip
        source = f"pipeline p(x: f32[R, N]) -> f32[R, N]:\n    cumsum(x, axis={axis})\n"
        peer, exact = partial(_along, torch.cumsum, axis), partial(_exactly, torch.cumsum, axis)
        name = f"running sums of {count} x {length} along {axis}"
        yield Case(name, source, {"x": Uniform((count, length))}, peer, exact)
    for axis in (0, 1):
        source = f"pipeline p(x: f32[R, N]) -> f32[{'RN'[1 - axis]}]:\n    sum(x, axis={axis})\n"
        peer, exact = partial(_along, torch.sum, axis), partial(_exactly, torch.sum, axis)
        yield Case(f"sums of 8192 x 8192 along {axis}", source, {"x": Uniform((8192, 8192))}, peer,
                   exact)  # fmt: skip
    for kind in ("f32", "f16"):
        yield Case(
            f"transpose 8192 x 8192 {kind}",
            f"pipeline p(x: {kind}[R, N]) -> {kind}[N, R]:\n    transpose(x, [1, 0])\n",
            {"x": Normal((8192, 8192), TORCH[kind])}, lambda x: x.t().contiguous(),
        )  # fmt: skip


def elements(torch: Any) -> Iterator[Case]:
    """What memory bounds: operations on elements, norms, and kernels of several results."""
    functional = torch.nn.functional
    for size in (4096, 8192):
        yield Case(
            f"x + 1, {size} x {size}", "pipeline p(x: f32[M, N]) -> f32[M, N]:\n    x + 1.0\n",
            {"x": Uniform((size, size))}, lambda x: x + 1.0,
        )  # fmt: skip
    for rows, width in ((4096, 4096), (4096, 11_008)):
        yield Case(
            f"silu(a) * b, {rows} x {width} bf16",
            "import nn\npipeline p(a: bf16[M, N], b: bf16[M, N]) -> bf16[M, N]:\n"
            "    bf16(nn.silu(f32(a)) * f32(b))\n",
            {"a": Normal((rows, width), "bfloat16"), "b": Normal((rows, width), "bfloat16")},
            lambda a, b: functional.silu(a) * b,
            lambda a, b: functional.silu(a.double()) * b.double(),
            tolerance=2**-7,  # PyTorch rounds twice
        )  # fmt: skip
    for rows, width in ((4096, 1024), (4096, 4096), (65_536, 1024)):
        yield Case(
            f"layer norm of {rows} x {width}",
            "pipeline p(x: f32[M, N], g: f32[N], b: f32[N]) -> f32[M, N]:\n"
            "    c = x - mean(x, axis=1, keepdims=True)\n"
            "    c * rsqrt(mean(c * c, axis=1, keepdims=True) + 1e-5) * g + b\n",
            {"x": Uniform((rows, width)), "g": Uniform((width,)), "b": Uniform((width,))},
            partial(_layer_norm, functional),
            partial(_in_doubles, partial(_layer_norm, functional)),
        )  # fmt: skip
    yield Case(
        "rows to i8 and scales, 4096 x 4096 bf16",
        "pipeline p(x: bf16[M, N]) -> (i8[M, N], f32[M, 1]) where N >= 1:\n    y = f32(x)\n"
        "    s = max(abs(y), axis=-1, keepdims=True) / 127.0 + 1e-6\n    i8(round(y / s)), s\n",
        {"x": Normal((4096, 4096), "bfloat16")},
        partial(_quantised, torch),
    )  # fmt: skip
    yield Case(
        "layer norm with mean and scale, 4096 x 4096",
        "pipeline p(x: f32[M, N]) -> (f32[M, N], f32[M], f32[M]):\n"
        "    m = mean(x, axis=1)\n    c = x - m[:, None]\n"
        "    r = 1.0 / sqrt(mean(c * c, axis=1) + 1e-5)\n    (c * r[:, None], m, r)\n",
        {"x": Uniform((4096, 4096))},
        partial(_with_moments, torch), partial(_in_doubles, partial(_with_moments, torch)),
        tolerance=5e-5,
    )  # fmt: skip
    yield Case(
        "softmax with log of sums, 4096 x 4096",
        "pipeline p(x: f32[M, N]) -> (f32[M, N], f32[M]) where N >= 1:\n"
        "    m = max(x, axis=1)\n    e = exp(x - m[:, None])\n    s = sum(e, axis=1)\n"
        "    (e / s[:, None], m + log(s))\n",
        {"x": Uniform((4096, 4096))},
        partial(_with_log, torch), partial(_in_doubles, partial(_with_log, torch)),
    )  # fmt: skip


def images(torch: Any) -> Iterator[Case]:
    """Images of unknown sizes: norms and means over some axes, axes that change places, windows
    that give one number each."""
    yield Case(
        "layer norm over 192 channels, first, 8 x 56 x 56",
        "pipeline p(x: f32[B, 192, H, W]) -> f32[B, 192, H, W]:\n"
        "    c = x - mean(x, axis=1, keepdims=True)\n"
        "    c * rsqrt(mean(c * c, axis=1, keepdims=True) + 1e-6)\n",
        {"x": Uniform((8, 192, 56, 56))},
        partial(_channel_norm, torch), partial(_in_doubles, partial(_channel_norm, torch)),
    )  # fmt: skip
    for dims, shape, axes in (
        ("H, W, 384", (8, 23, 46, 384), (1, 2)), ("512, H, W", (32, 512, 7, 7), (2, 3)),
    ):  # fmt: skip
        channels = dims.replace("H, W", "").strip(", ")
        yield Case(
            f"means of images {' x '.join(map(str, shape))} along {axes}",
            f"pipeline p(x: f32[B, {dims}]) -> f32[B, {channels}]:\n    mean(x, axis={axes})\n",
            {"x": Uniform(shape)},
            partial(_along, torch.mean, axes), partial(_exactly, torch.mean, axes),
        )  # fmt: skip
    yield Case(
        "heads and tokens of 8 x 1024 x 16 x 64 f16 change places",
        "pipeline p(x: f16[B, T, N, 64]) -> f16[B, N, T, 64]:\n    transpose(x, [0, 2, 1, 3])\n",
        {"x": Normal((8, 1024, 16, 64), "float16")}, lambda x: x.transpose(1, 2).contiguous(),
    )  # fmt: skip
    yield Case(
        "one channel of windows of 7 x 3 x 32, 64 images of 178 x 90",
        "pipeline p(x: f32[B, 178, 90, 32], w: f32[7, 3, 32]) -> f32[B, 172, 88]:\n"
        "    y[b, i, j] = sum[c, m, n] (x[b, i + m, j + n, c] * w[m, n, c])\n    y\n",
        {"x": Uniform((64, 178, 90, 32)), "w": Uniform((7, 3, 32))},
        partial(_one_channel, torch), partial(_in_doubles, partial(_one_channel, torch)),
    )  # fmt: skip


def _channel_norm(torch: Any, x: Any) -> Any:
    centred = x - x.mean(1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + 1e-6)


def _one_channel(torch: Any, x: Any, w: Any) -> Any:
    found = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), w.permute(2, 0, 1)[None])
    return found[:, 0]


def _layer_norm(functional: Any, x: Any, g: Any, b: Any) -> Any:
    return functional.layer_norm(x, x.shape[1:], g, b, 1e-5)


def _quantised(torch: Any, x: Any) -> Any:
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127.0 + 1e-6
    return torch.round(x / scale).to(torch.int8), scale


def _with_moments(torch: Any, x: Any) -> Any:
    variance, mean = torch.var_mean(x, 1, correction=0)
    scale = torch.rsqrt(variance + 1e-5)
    return (x - mean[:, None]) * scale[:, None], mean, scale


def _with_log(torch: Any, x: Any) -> Any:
    return torch.softmax(x, 1), torch.logsumexp(x, 1)


def _in_doubles(operation: Any, **inputs: Any) -> Any:
    return operation(**{name: tensor.double() for name, tensor in inputs.items()})


def recurrences(torch: Any) -> Iterator[Case]:
    for units, batch in ((128, 1), (128, 16), (256, 1), (256, 16), (512, 1), (512, 16)):
        layer = torch.nn.LSTM(units, units).cuda()
        names = {"w": "weight_ih_l0", "r": "weight_hh_l0", "b": "bias_ih_l0", "c": "bias_hh_l0"}
        weights = {n: Given(getattr(layer, name).detach()) for n, name in names.items()}
        yield Case(
            f"LSTM of {units} units, 512 steps, {batch}",
            f"import nn\npipeline p(x: f32[T, B, {units}], w: f32[{4 * units}, {units}], "
            f"r: f32[{4 * units}, {units}], b: f32[{4 * units}], c: f32[{4 * units}])"
            f" -> f32[T, B, {units}]:\n"
            "    y, _, _ = nn.lstm_steps(x @ transpose(w, [1, 0]) + b + c, r)\n    y\n",
            {"x": Uniform((512, batch, units)), **weights},
            partial(_first, layer),
        )  # fmt: skip


def _first(layer: Any, x: Any, **weights: Any) -> Any:
    return layer(x)[0]


def _along(operation: Any, axis: Any, x: Any) -> Any:
    return operation(x, axis)


def _exactly(operation: Any, axis: Any, x: Any) -> Any:
    return operation(x.double(), axis)


FAMILIES = {
    "sorts": sorts, "places": places, "rows": rows, "elements": elements,
    "images": images, "recurrences": recurrences,
}  # fmt: skip
