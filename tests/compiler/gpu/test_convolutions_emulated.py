"""Convolutions on tensor cores, whose windows are gathered: every border, step, hole and group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save as saved

from .gpu_run import Emulated, check_legal, compiled, launches

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
CASES: list[dict[str, Any]] = [
    dict(kind="f16", image=(2, 3, 15, 13), outer=16, size=7, stride=2, padding=3),
    dict(kind="bf16", image=(1, 17, 11, 7), outer=24, size=3, padding=2, dilation=2),
    dict(kind="f16", image=(2, 64, 5, 7), outer=72, size=3, padding=1),
    dict(kind="bf16", image=(3, 16, 7, 5), outer=20, size=3, padding=1),
    dict(kind="f16", image=(2, 16, 6, 6), outer=32, size=3, padding=1, groups=2),
    dict(kind="f16", image=(1, 1, 13, 13), outer=16, size=5),
    dict(kind="bf16", image=(2, 20, 7, 7), outer=40, size=1, stride=2),
    dict(kind="f32", image=(2, 5, 9, 11), outer=20, size=3, padding=1),
    dict(kind="f16", image=(1, 16, 9, 9), outer=200, size=3, padding=1),
    dict(kind="f32", image=(1, 64, 7, 7), outer=64, size=3, padding=1),
    dict(kind="f16", image=(1, 16, 5, 5), outer=20, size=3),
    dict(kind="f32", image=(3, 12, 15, 10), outer=72, size=3, padding=1, stride=2),
    # one place high or wide, of a border or of all that there is
    dict(kind="f16", image=(2, 16, 1, 40), outer=24, size=3, padding=1),
    dict(kind="f32", image=(3, 8, 21, 1), outer=20, size=3, padding=1),
    dict(kind="bf16", image=(2, 12, 5, 17), outer=72, size=5),
    # channels of a group that are no multiple of 4
    dict(kind="f16", image=(2, 12, 7, 5), outer=20, size=3, padding=1, groups=2),
    dict(kind="f32", image=(2, 6, 9, 6), outer=12, size=3, padding=1, groups=3, stride=2),
    dict(kind="bf16", image=(1, 45, 6, 7), outer=15, size=3, padding=1, groups=5),
    dict(kind="f16", image=(2, 10, 8, 8), outer=30, size=1, groups=2),
]


def convolved(x: Any, w: Any, case: dict[str, Any]) -> Any:
    """The sums in float64."""
    stride, padding = case.get("stride", 1), case.get("padding", 0)
    dilation, groups = case.get("dilation", 1), case.get("groups", 1)
    around = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    x, reach = np.pad(x, around), dilation * (case["size"] - 1) + 1
    seen = np.lib.stride_tricks.sliding_window_view(x, (reach, reach), axis=(2, 3))
    seen = seen[:, :, ::stride, ::stride, ::dilation, ::dilation]
    parts = zip(np.split(seen, groups, 1), np.split(w, groups, 0), strict=True)
    return np.concatenate([np.einsum("bcijmn,ocmn->boij", a, b) for a, b in parts], 1)


def source(case: dict[str, Any], dims: str) -> str:
    kind, (_, inner, high, wide) = case["kind"], case["image"]
    stride, padding = case.get("stride", 1), case.get("padding", 0)
    dilation, groups = case.get("dilation", 1), case.get("groups", 1)
    edges = f"[(0, 0), (0, 0), ({padding}, {padding}), ({padding}, {padding})]"
    weights = f"{kind}[{case['outer']}, {inner // groups}, {case['size']}, {case['size']}]"
    return (
        "import nn\n"
        f"pipeline p(x: {kind}[{dims}, {inner}, {high}, {wide}], w: {weights},"
        f" b: {kind}[{case['outer']}]):\n"
        f"    y = nn.convolve2d(pad(x, {edges}), w, {stride}, {dilation}, {groups})\n"
        "    nn.relu(y + b[:, None, None])\n"
    )


@pytest.mark.parametrize(
    ("case", "arch"),
    [(case, ("sm_90a", "sm_80", "sm_90a")[n % 3]) for n, case in enumerate(CASES)],
    ids=lambda c: c if isinstance(c, str) else f"{c['kind']}{c['image']}{c['size']}",
)
def test_convolution(
    case: dict[str, Any], arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    batch = case["image"][0]
    dims = {"B": batch} if batch == 3 else {}
    plan = compiled(tmp_path / "p.pipe", source(case, "B" if dims else str(batch)), (arch,))
    check_legal(plan)
    assert all(n.report["spill bytes"] == 0 for n in launches(plan) if "spill bytes" in n.report)
    dtype, outer = DTYPES[case["kind"]], case["outer"]
    of_weights = (outer, case["image"][1] // case.get("groups", 1), case["size"], case["size"])
    shapes = {"x": case["image"], "w": of_weights, "b": (outer,)}
    inputs = {n: np.asarray(rng.standard_normal(s)).astype(dtype) for n, s in shapes.items()}
    x, w, b = (inputs[n].astype(float) for n in shapes)
    sums, scale = convolved(x, w, case), convolved(np.abs(x), np.abs(w), case)
    wanted = np.maximum(sums + b[:, None, None], 0)
    depth = int(np.prod(of_weights[1:]))
    # each product is added at most `depth` times; the sum is rounded, and again with the bias
    unit = UNIT[case["kind"]]
    most = (depth + 2) * 2.0**-24 * scale + unit * (2 * np.abs(sums) + np.abs(b[:, None, None]))
    assert "mma" in plan.ptx[arch]
    if case["size"] > 1:
        assert "cp.async.c" in plan.ptx[arch]
        said = [r["because"] for x in launches(plan) for r in x.report["reasons"]]
        assert "its rows are gathered where they are multiplied" in said
    (got,) = Emulated(plan, arch)(inputs, dims)
    assert np.all(np.abs(got.astype(float) - wanted) <= most)


@pytest.mark.parametrize("outer", [16, 40])
def test_infinities_and_nan_lie_where_they_should(
    outer: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    case = dict(kind="f32", image=(1, 4, 6, 7), outer=outer, size=3, padding=1)
    plan = compiled(tmp_path / "p.pipe", source(case, "1"), ("sm_90a",))
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, 4, 6, 7), (outer, 4, 3, 3)))
    x[0, 1, 0, 3], x[0, 3, 5, 6] = np.inf, np.nan
    b = rng.standard_normal(outer).astype(np.float32)
    (got,) = Emulated(plan)({"x": x, "w": w, "b": b}, {})
    with np.errstate(invalid="ignore"):
        wanted = np.maximum(convolved(x.astype(float), w, case) + b[:, None, None], 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_clusters_share_the_depth_of_windows(tmp_path: Path) -> None:
    case = next(c for c in CASES if c["kind"] == "f32" and c["image"] == (1, 64, 7, 7))
    (product,) = [
        x for x in launches(compiled(tmp_path / "p.pipe", source(case, "1"), ("sm_90a",)))
        if "matmul" in x.report["fused"]
    ]  # fmt: skip
    assert product.cluster[0] > 1 and product.report["spill bytes"] == 0


def test_weights_stay_in_16_bits_and_nothing_stores_windows(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        "weights w = 'w.npz'\n"
        "pipeline p(x: f16[1, 16, 9, 9]) -> f16[1, 32, 5, 5]:\n"
        "    edges = [(0, 0), (0, 0), (1, 1), (1, 1)]\n"
        "    h = nn.relu(nn.convolve2d(pad(x, edges), w.a, 1, 1, 1))\n"
        "    s = nn.convolve2d(h, w.d, 2, 1, 1)\n"
        "    nn.relu(nn.convolve2d(pad(h, edges), w.c, 2, 1, 1) + s)\n"
    )
    w = {
        "a": rng.standard_normal((16, 16, 3, 3)).astype(np.float16),
        "c": rng.standard_normal((32, 16, 3, 3)).astype(np.float16),
        "d": rng.standard_normal((32, 16, 1, 1)).astype(np.float16),
    }
    np.savez(tmp_path / "w.npz", **w)
    plan = compiled(tmp_path / "p.pipe", text, ("sm_89",))
    assert {b.dtype for g in plan.pipelines[0].gpu for b in g.buffers} == {"f16"}
    assert len(launches(plan)) == 4  # the image in another order, and three products
    x = rng.standard_normal((1, 16, 9, 9)).astype(np.float16)
    (got,) = Emulated(plan, "sm_89")({"x": x}, {})
    f = {n: a.astype(float) for n, a in w.items()}
    h = np.maximum(convolved(x.astype(float), f["a"], dict(size=3, padding=1)), 0)
    s = convolved(h, f["d"], dict(size=1, stride=2))
    y = convolved(h, f["c"], dict(size=3, stride=2, padding=1)) + s
    np.testing.assert_allclose(got.astype(float), np.maximum(y, 0), rtol=2**-7, atol=0.25)


@pytest.mark.parametrize(("channels", "arch"), [(40, "sm_80"), (21, "sm_90a")])
def test_windows_of_channels_are_written_out(
    channels: int, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        "weights w = 'w.npz'\n"
        f"pipeline p(x: f16[B, 8, 9, 7]) -> f16[B, {channels}]\n"
        "where B in 1..=8:\n"
        "    edges = [(0, 0), (0, 0), (1, 1), (1, 1)]\n"
        "    h = nn.convolve2d(pad(x, edges), w.a, 1, 1, 1)\n"
        f"    h = nn.convolve2d(pad(h, edges), w.d, 1, 1, {channels})\n"
        "    nn.global_avg_pool(nn.max_pool(h, 3, stride=2, padding=1))\n"
    )
    shapes = {"a": (channels, 8, 3, 3), "d": (channels, 1, 3, 3)}
    w = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    np.savez(tmp_path / "w.npz", **w)
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    kernels = plan.ptx[arch].split(".visible .entry")
    vectors = {text.count("ld.global.nc.v4.b32") for text in kernels}
    assert {9, 18} <= vectors if channels == 40 else not vectors & {9, 18}
    x = rng.standard_normal((2, 8, 9, 7)).astype(np.float16)
    (got,) = Emulated(plan, arch)({"x": x}, {"B": 2})
    h = convolved(x.astype(float), w["a"].astype(float), dict(size=3, padding=1))
    deep = dict(size=3, padding=1, groups=channels)
    h = convolved(h.astype(np.float16).astype(float), w["d"].astype(float), deep)
    h = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    seen = np.lib.stride_tricks.sliding_window_view(h, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    wanted = seen.max((-1, -2)).mean((-1, -2))
    np.testing.assert_allclose(got.astype(float), wanted, rtol=2**-8, atol=0.1)


def test_weights_of_one_place_are_multiplied_in_16_bits(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f16[1, 16, 6, 6], a: f16[32, 16, 3, 3], e: f16[48, 32, 1, 1])"
        " -> f16[1, 48, 4, 4]:\n"
        "    nn.convolve2d(nn.relu(nn.convolve2d(x, a, 1, 1, 1)), e, 1, 1, 1)\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    assert {b.dtype for g in plan.pipelines[0].gpu for b in g.buffers} == {"f16"}
    shapes = {"x": (1, 16, 6, 6), "a": (32, 16, 3, 3), "e": (48, 32, 1, 1)}
    inputs = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    (got,) = Emulated(plan, "sm_80")(inputs, {})
    x, a, e = (v.astype(float) for v in inputs.values())
    h = np.maximum(convolved(x, a, dict(size=3)), 0).astype(np.float16).astype(float)
    wanted, scale = convolved(h, e, dict(size=1)), convolved(np.abs(h), np.abs(e), dict(size=1))
    assert np.all(np.abs(got.astype(float) - wanted) <= 2**-10 * scale)


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_single_elements_of_several_images_are_products_where_they_lie(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        f"pipeline p(x: {kind}[2, 16, 7, 7], a: {kind}[48, 16, 1, 1], b: {kind}[40, 48, 1, 1])"
        f" -> {kind}[2, 40, 7, 7]:\n"
        "    nn.convolve2d(nn.relu(nn.convolve2d(x, a, 1, 1, 1)), b, 1, 1, 1)\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert {b.dtype for g in plan.pipelines[0].gpu for b in g.buffers} == {kind}
    made = [x.kernel for x in launches(plan)]  # the image and weights in order, two products
    assert len(made) == 5, made
    shapes = {"x": (2, 16, 7, 7), "a": (48, 16, 1, 1), "b": (40, 48, 1, 1)}
    inputs = {n: rng.standard_normal(s).astype(DTYPES[kind]) for n, s in shapes.items()}
    (got,) = Emulated(plan, "sm_90a")(inputs, {})
    x, a, b = (v.astype(float) for v in inputs.values())
    h = np.maximum(convolved(x, a, dict(size=1)), 0).astype(DTYPES[kind]).astype(float)
    wanted, scale = convolved(h, b, dict(size=1)), convolved(np.abs(h), np.abs(b), dict(size=1))
    assert np.all(np.abs(got.astype(float) - wanted) <= (2 * UNIT[kind] + 2.0**-19) * scale)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_places_of_several_sequences_are_products_in_16_bits(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f16[3, 16, T], a: f16[48, 16, 1], b: f16[40, 48, 1]) -> f16[3, 40, T]\n"
        "where T in 1..=100:\n"
        "    nn.convolve1d(nn.relu(nn.convolve1d(x, a, 1, 1, 1)), b, 1, 1, 1)\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    assert {b.dtype for g in plan.pipelines[0].gpu for b in g.buffers} == {"f16"}
    shapes = {"x": (3, 16, 37), "a": (48, 16, 1), "b": (40, 48, 1)}
    inputs = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    (got,) = Emulated(plan, arch)(inputs, {"T": 37})
    x, a, b = (v.astype(float) for v in inputs.values())
    h = np.maximum(np.einsum("bct,oc->bot", x, a[..., 0]), 0).astype(np.float16).astype(float)
    wanted, scale = (np.einsum("bct,oc->bot", h, v[..., 0]) for v in (b, np.abs(b)))
    assert np.all(np.abs(got.astype(float) - wanted) <= 2**-10 * scale)


@pytest.mark.parametrize(("kind", "arch"), [("f32", "sm_80"), ("f16", "sm_90a"), ("bf16", "sm_89")])
@pytest.mark.parametrize("window", [(7, 7), (1, 31), (1, 4)])
def test_large_windows_of_channels_are_read_in_vectors(
    window: tuple[int, int], kind: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    high, wide = window
    shape = (2, 32, 9, 10) if high > 1 else (2, 32, 45)
    edges = [(0, 0), (0, 0), *((n // 2, n // 2) for n in window[-len(shape) + 2 :])]
    rank, taps = len(shape) - 2, list(window[4 - len(shape) :])
    text = (
        "import nn\nweights w = 'w.npz'\n"
        f"pipeline p(x: {kind}{list(shape)}):\n"
        f"    x = nn.convolve{rank}d(x, w.a, 1, 1, 1)\n"
        f"    x = nn.convolve{rank}d(pad(x, {edges}), w.d, 1, 1, 32)\n"
        f"    nn.convolve{rank}d(x, w.a, 1, 1, 1)\n"
    )
    dtype, single = DTYPES[kind], [1] * rank
    w = {"a": np.eye(32).reshape([32, 32, *single]), "d": rng.standard_normal([32, 1, *taps])}
    (tmp_path / "w.safetensors").write_bytes(saved({n: a.astype(dtype) for n, a in w.items()}))
    text = text.replace("w.npz", "w.safetensors")
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    found = [x for x in launches(plan) if x.report["fused"][:2] == ["mul", "sum"]]
    assert len(found) == 1 and found[0].report["spill bytes"] == 0
    kernel = next(k for k in plan.ptx[arch].split(".visible .entry") if found[0].kernel + "(" in k)
    assert "ld.global.nc.v4" in kernel
    x = rng.standard_normal(shape).astype(dtype)
    (got,) = Emulated(plan, arch)({"x": x}, {})

    def sums(x: Any, d: Any) -> Any:
        axes = tuple(range(2, 2 + rank))
        seen = np.lib.stride_tricks.sliding_window_view(np.pad(x, edges), taps, axis=axes)
        return (seen * d.reshape(32, *single, *taps)).sum(tuple(range(-rank, 0)))

    d = w["d"].astype(dtype).astype(float)
    wanted, scale = sums(x.astype(float), d), sums(np.abs(x.astype(float)), np.abs(d))
    # the identity before and after leaves everything; products are added up at most so many times
    most = (d[0].size + 1) * 2.0**-24 * scale + UNIT[kind] * np.abs(wanted) * 2
    assert np.all(np.abs(got.astype(float) - wanted) <= most)


@pytest.mark.parametrize(("shape", "taps"), [((1, 6, 70), [31]), ((2, 5, 9, 11), [7, 7])])
def test_large_windows_that_move_along_memory_have_a_lane_each(
    shape: tuple[int, ...], taps: list[int], tmp_path: Path, rng: np.random.Generator
) -> None:
    channels, rank = shape[1], len(taps)
    edges = [(0, 0), (0, 0), *((n // 2, n // 2) for n in taps)]
    text = (
        f"import nn\npipeline p(x: f16{list(shape)}, w: f16{[channels, 1, *taps]}):\n"
        f"    nn.convolve{rank}d(pad(x, {edges}), w, 1, 1, {channels})\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    (made,) = launches(plan)
    x = rng.standard_normal(shape).astype(np.float16)
    w = rng.standard_normal((channels, 1, *taps)).astype(np.float16)
    assert int(made.grid[0]) * made.block[0] < x.size + made.block[0]
    (got,) = Emulated(plan)({"x": x, "w": w}, {})
    padded, axes = np.pad(x.astype(float), edges), tuple(range(2, 2 + rank))
    seen = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=axes)
    parts = seen * w.astype(float).reshape(channels, *[1] * rank, *taps)
    wanted, scale = (v.sum(tuple(range(-rank, 0))) for v in (parts, np.abs(parts)))
    most = (w[0].size + 1) * 2.0**-24 * scale + UNIT["f16"] * np.abs(wanted)
    assert np.all(np.abs(got.astype(float) - wanted) <= most)
