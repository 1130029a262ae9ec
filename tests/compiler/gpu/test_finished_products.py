"""Norms and softmax of a product's rows, computed where tiles have whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

DTYPES: dict[str, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
UNITS = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11}
NORM = """
    y = f32(x @ w + b + r)
    d = y - mean(y, axis=-1, keepdims=True)
    KIND(d * rsqrt(mean(d * d, axis=-1, keepdims=True) + 0.1))
"""
SOFTMAX = """
    y = x @ w + b + r
    nn.softmax(y)
"""


def normed(y: Any) -> Any:
    d = y - y.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + 0.1)


def softmax(y: Any) -> Any:
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("kind", "depth", "columns", "text"),
    [("f32", 24, 40, SOFTMAX), ("f16", 136, 128, NORM), ("bf16", 72, 21, SOFTMAX),
     ("f32", 100, 128, NORM), ("f16", 64, 200, SOFTMAX), ("bf16", 40, 256, NORM),
     ("f32", 36, 160, NORM)],
)  # fmt: skip
def test_rows_are_finished_in_their_tiles(
    kind: str, depth: int, columns: int, text: str, arch: str, tmp_path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    shapes = {"x": ("M", depth), "w": (depth, columns), "b": (columns,), "r": ("M", columns)}
    inputs = ", ".join(f"{n}: {kind}[{', '.join(map(str, s))}]" for n, s in shapes.items())
    source = (
        f"import nn\npipeline p({inputs}) -> {kind}[M, {columns}]\nwhere M in 0..=65536:"
        + text.replace("KIND", kind)
    )
    plan = compiled(tmp_path / "p.pipe", source, (arch,))
    check_legal(plan)
    assert all(x.report["spill bytes"] == 0 for x in launches(plan) if "registers" in x.report)
    wide = columns > 128 and kind == "f32" and arch == "sm_90a"
    assert any("finished" in x.kernel for x in launches(plan)) != wide
    run = Emulated(plan, arch)
    for rows in (0, 3, 150):
        given = {
            n: rng.standard_normal([rows if e == "M" else e for e in s]).astype(DTYPES[kind])
            for n, s in shapes.items()
        }
        (found,) = run(given, {"M": rows})
        x, w, b, r = (a.astype(float) for a in given.values())
        y, sizes = x @ w + b + r, np.abs(x) @ np.abs(w) + np.abs(b) + np.abs(r)
        # each element of a row is off by the sums and, in 16 bits, three roundings
        off = (2.0**-24 * (depth + 4) + 3 * UNITS[kind] * (kind != "f32")) * sizes
        most = off.max(-1, keepdims=True) if rows else off
        wanted = (normed if text == NORM else softmax)(y)
        if text == NORM:
            spread = np.sqrt(y.var(-1, keepdims=True) + 0.1)
            bound = 4 * most / spread * (1 + np.abs(wanted))
        else:
            bound = wanted * np.expm1(2 * most)
        bound += (UNITS[kind] * 4 + 2.0**-24 * columns) * (np.abs(wanted) + 2.0**-24)
        assert (np.abs(found.astype(float) - wanted) <= bound + 2.0**-24).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_rows_of_a_convolution_and_of_a_batch(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f16[1, 16, 9, 8], w: f16[24, 16, 3, 3]) -> f16[1, 9, 8, 24]:\n"
        "    y = nn.convolve2d(pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), w, 1, 1, 1)\n"
        "    nn.softmax(transpose(y, [0, 2, 3, 1]))\n"
        "pipeline q(x: f32[5, 40, 36], w: f32[5, 36, 28]) -> f32[5, 40, 28]:\n"
        "    nn.softmax(x @ w)\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    assert sum("finished" in x.kernel for x in launches(plan)) == 2
    x = rng.standard_normal((1, 16, 9, 8)).astype(np.float16)
    w = (rng.standard_normal((24, 16, 3, 3)) / 4).astype(np.float16)
    (found,) = Emulated(plan, arch)({"x": x, "w": w}, {})
    padded = np.pad(x.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    y, sizes = (
        np.einsum("bcijmn,ocmn->bijo", a, v)
        for a, v in ((seen, w.astype(float)), (np.abs(seen), np.abs(w.astype(float))))
    )
    most = (2.0**-11 * np.abs(y) + 150 * 2.0**-24 * sizes).max(-1, keepdims=True)
    wanted = softmax(y)
    bound = wanted * (np.expm1(2 * most) + 4 * 2.0**-11) + 2.0**-24
    assert (np.abs(found.astype(float) - wanted) <= bound).all()
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((5, 40, 36), (5, 36, 28)))
    (found,) = Emulated(plan, arch, 1)({"x": a, "w": b}, {})
    y, sizes = a.astype(float) @ b, np.abs(a.astype(float)) @ np.abs(b)
    most = 40 * 2.0**-24 * sizes.max(-1, keepdims=True)
    bound = softmax(y) * (np.expm1(2 * most) + 40 * 2.0**-24)
    assert (np.abs(found - softmax(y)) <= bound + 2.0**-24).all()


def test_where_rows_are_finished(tmp_path: Path) -> None:
    """Not where a product is split along its depth, others read it, or tiles are too narrow."""
    text = """
pipeline many(x: bf16[32768, 256], w: bf16[256, 128]) -> f32[32768, 128]:
    y = f32(x @ w)
    y * rsqrt(mean(y * y, axis=-1, keepdims=True))

pipeline few(x: bf16[256, 512], w: bf16[512, 128]) -> f32[256, 128]:
    y = f32(x @ w)
    y * rsqrt(mean(y * y, axis=-1, keepdims=True))

pipeline deep(x: bf16[32768, 1024], w: bf16[1024, 128]) -> f32[32768, 128]:
    y = f32(x @ w)
    y * rsqrt(mean(y * y, axis=-1, keepdims=True))

pipeline both(x: f32[32768, 64], w: f32[64, 64]) -> (f32[32768, 64], f32[32768, 64]):
    y = x @ w
    (y * rsqrt(mean(y * y, axis=-1, keepdims=True)), y)

pipeline wide(x: f32[32768, 64], w: f32[64, 384]) -> f32[32768, 384]:
    y = x @ w
    y * rsqrt(mean(y * y, axis=-1, keepdims=True))
"""
    plan = compiled(tmp_path / "p.pipe", text)
    done = {
        (p.name, gpu.arch)
        for p in plan.pipelines
        for gpu in p.gpu
        if any("finished" in x.kernel for x in gpu.launches)
    }
    assert done == {*(("many", a) for a in ARCHES), ("deep", "sm_80"), ("deep", "sm_89")}
    for launch in launches(plan):
        assert launch.report.get("spill bytes", 0) == 0
