"""Convolutions whose windows come as columns of pixels, by tensor copies of im2col."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.plan_check import check

from .gpu_run import Emulated, check_legal, compiled, launches
from .test_convolutions_emulated import DTYPES, UNIT, convolved

CASES: list[dict[str, Any]] = [
    dict(kind="f16", image=(2, 64, 25, 27), outer=80, size=3, padding=1),
    dict(kind="bf16", image=(2, 64, 41, 37), outer=136, size=3, padding=2, stride=2, dilation=2),
    dict(kind="f16", image=(3, 128, 15, 9), outer=64, size=3, padding=1, stride=2),
    dict(kind="bf16", image=(2, 64, 37, 33), outer=72, size=1, stride=1, crop=2),
]


def source(case: dict[str, Any]) -> str:
    kind, (batch, inner, high, wide), size = case["kind"], case["image"], case["size"]
    edges = [(0, 0), (0, 0), *[(case.get("padding", 0),) * 2] * 2]
    way = f"{case.get('stride', 1)}, {case.get('dilation', 1)}, 1"
    cut = case.get("crop", 0)
    seen = f"x[:, :, {cut}:, {cut}:]" if cut else "x"
    count = "B" if batch == 3 else batch
    return (
        "import nn\n"
        f"pipeline p(x: {kind}[{count}, {inner}, {high}, {wide}],"
        f" w: {kind}[{case['outer']}, {inner}, {size}, {size}]):\n"
        f"    y = nn.relu(nn.convolve2d(pad({seen}, {edges}), w, {way}))\n"
        "    transpose(y, [0, 2, 3, 1])\n"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}{c['image']}{c['size']}")
def test_windows_by_tensor_copies(
    case: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    dims = {"B": 3} if case["image"][0] == 3 else {}
    plan = compiled(tmp_path / "p.pipe", source(case), ("sm_90a",))
    check_legal(plan)
    check(plan)
    assert ".global.im2col." in plan.ptx["sm_90a"]
    assert all(n.report.get("spill bytes", 0) == 0 for n in launches(plan))
    shapes = {"x": case["image"], "w": (case["outer"], case["image"][1], *[case["size"]] * 2)}
    inputs = {n: rng.standard_normal(s).astype(DTYPES[case["kind"]]) for n, s in shapes.items()}
    (got,) = Emulated(plan)(inputs, dims)
    x, w = (v.astype(float) for v in inputs.values())
    x = x[:, :, case.get("crop", 0) :, case.get("crop", 0) :]
    sums, scale = convolved(x, w, case), convolved(np.abs(x), np.abs(w), case)
    most = (w[0].size + 1) * 2.0**-24 * scale + UNIT[case["kind"]] * np.abs(sums)
    wanted, most = (v.transpose(0, 2, 3, 1) for v in (np.maximum(sums, 0), most))
    assert np.all(np.abs(got.astype(float) - wanted) <= most)


def test_windows_of_sequences_by_tensor_copies(tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f16[2, 64, 700], w: f16[72, 64, 3]):\n"
        "    y = nn.convolve1d(pad(x, [(0, 0), (0, 0), (1, 1)]), w, 1, 1, 1)\n"
        "    transpose(y, [0, 2, 1])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert "3d.shared::cluster.global.im2col." in plan.ptx["sm_90a"]
    shapes = {"x": (2, 64, 700), "w": (72, 64, 3)}
    inputs = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    (got,) = Emulated(plan)(inputs, {})
    x, w = (v.astype(float) for v in inputs.values())
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=2)
    wanted, scale = (np.einsum("bctk,ock->bto", f(seen), f(w)) for f in (np.asarray, np.abs))
    most = 194 * 2.0**-24 * scale + UNIT["f16"] * np.abs(wanted)
    assert np.all(np.abs(got.astype(float) - wanted) <= most)


@pytest.mark.parametrize("channels", [32, 96])
def test_other_channels_are_gathered(channels: int, tmp_path: Path) -> None:
    case = dict(kind="f16", image=(2, channels, 25, 27), outer=80, size=3, padding=1)
    plan = compiled(tmp_path / "p.pipe", source(case), ("sm_90a",))
    assert ".im2col." not in plan.ptx["sm_90a"]


def test_windows_of_codes_by_tensor_copies(tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: u8[2, 128, 33, 25], w: i8[72, 128, 3, 3]):\n"
        "    x = pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])\n"
        "    y = nn.convolve2d(f32(x), f32(w), 1, 1, 1)\n"
        "    transpose(i32(y), [0, 2, 3, 1])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert ".global.im2col." in plan.ptx["sm_90a"]
    x = rng.integers(0, 256, (2, 128, 33, 25), np.uint8)
    w = rng.integers(-128, 128, (72, 128, 3, 3), np.int8)
    (got,) = Emulated(plan)({"x": x, "w": w}, {})
    wanted = convolved(x.astype(float), w.astype(float), dict(size=3, padding=1))
    # below 2**24 all sums of codes are exact in f32 too; others are rounded once
    wanted = wanted.astype(np.float32).astype(np.int32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("channels", "stride"), [(64, 2), (64, 1), (12, 2)])
def test_windows_of_three_axes(
    channels: int, stride: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    places = ", ".join(f"{stride} * {i} + {m}" for i, m in ("im", "jn", "lk"))
    text = (
        f"pipeline p(x: f16[2, {channels}, 6, 9, 25], w: f16[72, {channels}, 3, 3, 3]):\n"
        "    x = pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1)])\n"
        f"    y[b, o, i, j, l] = sum[c, m, n, k] x[b, c, {places}] * w[o, c, m, n, k]\n"
        "    transpose(y, [0, 2, 3, 4, 1])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert ("5d.shared::cluster.global.im2col." in plan.ptx["sm_90a"]) == (channels == 64)
    said = [r["because"] for x in launches(plan) for r in x.report["reasons"]]
    assert "its rows are gathered where they are multiplied" in said
    shapes = {"x": (2, channels, 6, 9, 25), "w": (72, channels, 3, 3, 3)}
    inputs = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    (got,) = Emulated(plan)(inputs, {})
    x, w = (v.astype(float) for v in inputs.values())

    def sums(x: Any, w: Any) -> Any:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1)))
        seen = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), axis=(2, 3, 4))
        seen = seen[:, :, ::stride, ::stride, ::stride]
        return np.einsum("bcijlmnk,ocmnk->bijlo", seen, w, optimize=True)

    wanted, scale = sums(x, w), sums(np.abs(x), np.abs(w))
    most = (w[0].size + 1) * 2.0**-24 * scale + UNIT["f16"] * np.abs(wanted)
    assert np.all(np.abs(got.astype(float) - wanted) <= most)
