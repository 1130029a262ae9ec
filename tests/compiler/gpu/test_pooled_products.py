"""Pooling of a convolution's places, where the tiles of its product are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16}
UNITS = {"f32": 2.0**-24, "f16": 2.0**-11}


def convolved(x: Any, w: Any, stride: int) -> Any:
    """The products of windows of an image with a border of one, and the same of magnitudes."""
    padded = np.pad(x.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(2, 3))
    seen = seen[:, :, ::stride, ::stride]
    parts = ((seen, w.astype(float)), (np.abs(seen), np.abs(w.astype(float))))
    return tuple(np.einsum("bcijmn,ocmn->boij", a, v) for a, v in parts)


CASES = (
    ("f32", "max", (2, 2), (40, 8, 3, 3), 1), ("f16", "max", (2, 2), (24, 8, 3, 3), 1),
    ("f16", "mean", (4, 2), (64, 4, 3, 3), 2), ("f32", "sum", (1, 2), (36, 4, 3, 3), 1),
)  # fmt: skip
COPIED = (
    ("f16", "max", (2, 2), (136, 64, 2, 1), 1), ("f16", "sum", (2, 1), (40, 64, 1, 2), 2),
)  # fmt: skip
"""Dtype, pooling, its window, weights and stride; those by tensor copies on Hopper."""


@pytest.mark.parametrize(
    ("arch", "kind", "pool", "window", "weights", "stride"),
    [(arch, *case) for arch in ARCHES for case in CASES] + [("sm_90a", *case) for case in COPIED],
)
def test_windows_are_pooled_in_their_tiles(
    arch: str, kind: str, pool: str, window: tuple[int, int], weights: tuple[int, ...],
    stride: int, tmp_path: Path, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Places that no window has are left out; what follows the windows is computed after them."""
    (high, wide), (made, taken, *_) = window, weights
    text = (
        f"import nn\npipeline p(x: {kind}[B, {taken}, 13, 11], w: {kind}{list(weights)},"
        f" b: {kind}[{made}], r: {kind}[{made}]):\n"
        "    p = pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])\n"
        f"    y = nn.relu(nn.convolve2d(p, w, {stride}, 1, 1) + b[:, None, None])\n"
        f"    z[i, c, h, w] = {pool}[m in 0..{high}, n in 0..{wide}] "
        f"y[i, c, h * {high} + m, w * {wide} + n]\n"
        "    z * r[:, None, None]\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    assert all(x.report["spill bytes"] == 0 for x in launches(plan) if "registers" in x.report)
    products = [x for x in launches(plan) if x.report.get("structure")]
    assert products and all("pooled" in x.kernel for x in products)
    sizes = {"x": (3, taken, 13, 11), "w": weights, "b": made, "r": made}
    given = {n: rng.standard_normal(s).astype(DTYPES[kind]) for n, s in sizes.items()}
    (found,) = Emulated(plan, arch)(given, {"B": 3})
    x, w, b, r = given.values()
    y, size = convolved(x, w, stride)
    b, r = (v.astype(float)[:, None, None] for v in (b, r))
    y = np.maximum(y + b, 0)
    rows, columns = y.shape[2] // high, y.shape[3] // wide

    def windows(a: Any) -> Any:
        part = a[:, :, : rows * high, : columns * wide]
        return part.reshape(3, made, rows, high, columns, wide)

    z = getattr(windows(y), pool)((3, 5))
    # sums of the product, and roundings of it, of the bias and of what is pooled
    off = 2.0**-24 * (w[0].size + 4) * size + 3 * UNITS[kind] * (np.abs(y) + np.abs(b) + size)
    most = windows(off).max((3, 5)) * (high * wide if pool == "sum" else 1)
    bound = np.abs(r) * (most + 4 * UNITS[kind] * np.abs(z)) + 2.0**-24
    assert (np.abs(found.astype(float) - z * r) <= bound).all()


def test_where_windows_are_pooled(tmp_path: Path) -> None:
    """Not where they share places or have a border, another kernel reads the product, or it is
    deep."""
    image = "f32[8, CHANNELS, 56, 56], w: f32[32, CHANNELS, 3, 3]"
    rules = {
        "pools": (16, "nn.max_pool(y, 2)"), "shares": (16, "nn.max_pool(y, 3, stride=2)"),
        "both": (16, "(nn.avg_pool(y, 2), y)"), "deep": (256, "nn.max_pool(y, 2)"),
        "bordered": (16, "nn.max_pool(y, 2, padding=1)"),
    }  # fmt: skip
    text = "import nn\n"
    for name, (channels, result) in rules.items():
        given = image.replace("CHANNELS", str(channels))
        text += (
            f"pipeline {name}(x: {given}):\n    y = nn.convolve2d(x, w, 1, 1, 1)\n    {result}\n"
        )
    text += (
        text[text.index("pipeline pools") : text.index("pipeline shares")]
        .replace("f32", "f16")
        .replace("pools", "copied")
        .replace(", 16,", ", 64,")
    )
    plan = compiled(tmp_path / "p.pipe", text)
    done = {
        (p.name, gpu.arch)
        for p in plan.pipelines
        for gpu in p.gpu
        if any("pooled" in x.kernel for x in gpu.launches)
    }
    assert done == {(name, a) for name in ("pools", "copied") for a in ARCHES}
    (copied,) = (g for g in plan.pipelines[-1].gpu if g.arch == "sm_90a")
    (pooled,) = (x for x in copied.launches if "pooled" in x.kernel)
    assert "by tensor copies" in pooled.report["structure"]
