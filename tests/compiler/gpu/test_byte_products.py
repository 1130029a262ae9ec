"""Products of 8-bit operands: tails, orders, batches, zeros and scales, what follows, constants."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.gpu.assemble import AssemblerMissing, ptxas
from stagefuse.compiler.gpu.matmul import mma_tiles, persistent, tile_widths
from stagefuse.compiler.plan import Plan
from stagefuse.dsl.dtypes import DTYPES

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

Array = Any


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each has many tiles."""
    monkeypatch.setattr(persistent, "BLOCKS", 2)
    monkeypatch.setattr(persistent, "TOGETHER", 2)


def drawn(rng: np.random.Generator, kind: str, *shape: int) -> Array:
    dtype = DTYPES[kind].numpy
    if kind.startswith("f8"):
        return rng.standard_normal(shape).astype(dtype)
    ends = np.iinfo(dtype)
    return rng.integers(ends.min, ends.max + 1, shape).astype(dtype)


def product(x: Array, w: Array) -> Array:
    return x.astype(float) @ w.astype(float)


def agree(found: Array, x: Array, w: Array) -> None:
    """Integers exactly; sums of f8 in f32, whose products are exact: one rounding for each of the
    depth at most, of a sum that is no greater than that of all magnitudes."""
    if x.dtype.kind in "iu":
        np.testing.assert_array_equal(found, product(x, w))
        return
    most = np.abs(x.astype(float)) @ np.abs(w.astype(float))
    assert (np.abs(found - product(x, w)) <= x.shape[-1] * 2.0**-24 * most).all()


def healthy(plan: Plan) -> Plan:
    """A plan of legal instructions whose kernels keep their registers."""
    check_legal(plan)
    assert not any(launch.report.get("spill bytes") for launch in launches(plan))
    return plan


def fused(plan: Plan, arch: str) -> list[set[str]]:
    """What each launch of an arch computes, of those with a product."""
    (gpu,) = [g for g in plan.pipelines[0].gpu if g.arch == arch]
    found = [set(launch.report["fused"]) for launch in gpu.launches]
    return [names for names in found if "matmul" in names]


KINDS = {
    "sm_80": ("m16n8k32.row.col.s32.s8.s8.s32", "m16n8k16.row.col.f32.f16.f16.f32"),
    "sm_89": ("m16n8k32.row.col.s32.s8.s8.s32", "m16n8k32.row.col.f32.e4m3.e4m3.f32"),
    "sm_90a": ("k32.s32.s8.s8", "k32.f32.e4m3.e4m3"),
}
"""What products of i8 and of f8 are made of."""


@pytest.mark.parametrize(
    ("left", "right"),
    [("i8", "i8"), ("u8", "i8"), ("f8e4m3", "f8e4m3"), ("f8e5m2", "f8e4m3")],
)
def test_orders_and_tails(left: str, right: str, tmp_path: Path, rng: np.random.Generator) -> None:
    to = "f32" if left.startswith("f8") else "i32"
    text = (
        f"pipeline p(x: {left}[N, 208], w: {right}[72, 208], y: {left}[N, 37], v: {right}[37, 51])"
        f" -> ({to}[N, 72], {to}[N, 51])\nwhere N in 0..=4096:\n"
        f"    {to}(x) @ {to}(transpose(w, [1, 0])), {to}(y) @ {to}(v)\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text))
    x, w = drawn(rng, left, 130, 208), drawn(rng, right, 72, 208)
    y, v = drawn(rng, left, 130, 37), drawn(rng, right, 37, 51)
    for arch, kinds in KINDS.items():
        if left == right:
            assert kinds[to == "f32"] in plan.ptx[arch]
        run = Emulated(plan, arch)
        for n in (130, 1):
            found = run({"x": x[:n], "w": w, "y": y[:n], "v": v}, {"N": n})
            agree(found[0], x[:n], w.T)
            agree(found[1], y[:n], v)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("kind", ["f8e4m3", "f8e5m2"])
def test_every_f8(kind: str, arch: str, tmp_path: Path) -> None:
    text = (
        f"pipeline p(x: {kind}[N, 16], w: {kind}[16, 16]) -> f32[N, 16]:\n"
        "    f32(x) @ f32(transpose(w, [1, 0]))\n"
    )
    dtype = DTYPES[kind].numpy
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    x = np.zeros((256, 16), dtype)
    x[np.arange(256), np.arange(256) % 16] = codes
    (y,) = Emulated(compiled(tmp_path / "p.pipe", text, (arch,)), arch)(
        {"x": x, "w": np.eye(16).astype(dtype)}, {"N": 256}
    )
    wide = codes.astype(np.float32)
    own = y[np.arange(256), np.arange(256) % 16]
    np.testing.assert_array_equal(own, wide + 0.0)
    finite = np.isfinite(wide)
    y[np.arange(256), np.arange(256) % 16] = 0
    assert not y[finite].any() and np.isnan(y[~finite]).sum() == 15 * (~finite).sum()


@pytest.mark.parametrize(("kind", "width"), [("i8", 256), ("f8e4m3", 192), ("f8e4m3", 128)])
def test_stages_of_tiles_that_follow_each_other(
    kind: str, width: int, tmp_path: Path, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tile_widths, "few_widths", lambda _: (width,))
    to = "f32" if kind.startswith("f8") else "i32"
    text = (
        f"pipeline p(x: {kind}[N, K], w: {kind}[272, K]) -> {to}[N, 272]\n"
        "where N in 0..=4096, K in 0..=8192, K % 16 == 0:\n"
        f"    {to}(x) @ {to}(transpose(w, [1, 0]))\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, ("sm_90a",)))
    assert f"n{width}k32" in plan.ptx["sm_90a"] and "cp.async.bulk.tensor" in plan.ptx["sm_90a"]
    run = Emulated(plan)
    for n, k in ((140, 1040), (5, 16), (3, 0)):
        x, w = drawn(rng, kind, n, k), drawn(rng, kind, 272, k)
        agree(run({"x": x, "w": w}, {"N": n, "K": k})[0], x, w.T)


def test_batches(tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "pipeline p(x: i8[B, T, 3, 48], w: i8[B, S, 3, 48]) -> i64[B, 3, T, S]\n"
        "where B in 1..=8, T in 1..=512, S in 1..=512:\n"
        "    y[b, h, i, j] = sum[k] i32(x[b, i, h, k]) * i32(w[b, j, h, k])\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text))
    x, w = drawn(rng, "i8", 2, 70, 3, 48), drawn(rng, "i8", 2, 35, 3, 48)
    wanted = np.einsum("bihk,bjhk->bhij", x.astype(int), w.astype(int))
    for arch in ARCHES:
        assert len([n for n in launches(plan) if "matmul" in n.report["fused"]]) == 4
        (y,) = Emulated(plan, arch)({"x": x, "w": w}, {"B": 2, "T": 70, "S": 35})
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_zeros_of_both_sides(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "pipeline p(x: u8[N, 70], w: i8[70, 65], z: u8, u: i8[65]) -> i32[N, 65]\n"
        "where N in 1..=4096:\n"
        "    (i32(x) - i32(z)) @ (i32(w) - i32(u))\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, (arch,)))
    assert all({"matmul", "sub", "add"} <= names for names in fused(plan, arch))
    x, w, u = drawn(rng, "u8", 37, 70), drawn(rng, "i8", 70, 65), drawn(rng, "i8", 65)
    (y,) = Emulated(plan, arch)({"x": x, "w": w, "z": np.uint8(131), "u": u}, {"N": 37})
    np.testing.assert_array_equal(y, (x.astype(int) - 131) @ (w.astype(int) - u))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_quantised_layers_are_a_kernel_each(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Weights of a model: repacked while compiling, as their sums are computed."""
    w, v = drawn(rng, "i8", 70, 65), drawn(rng, "i8", 65, 96)
    scales = (rng.random(65) * 0.01 + 0.01).astype(np.float32)
    np.savez(tmp_path / "w.npz", w=w, v=v, s=scales, z=np.uint8(131))
    text = (
        'weights m = "w.npz"\n'
        "fn layer[E: int](x: u8[N, K], z: u8, w: i8[K, M], s: f32[*S], b: f32) -> f32[N, M]:\n"
        "    f32(i32(x) - i32(z)) * 0.02 @ (f32(w) * s) + b\n"
        "pipeline p(x: u8[N, 70]) -> f32[N, 96]\nwhere N in 1..=4096:\n"
        "    h = maximum(layer(x, m.z, m.w, m.s, 0.5), 0.0)\n"
        "    q = u8(clamp(round(h / 0.05) + 3.0, 0.0, 255.0))\n"
        "    f32(i32(q) - 3) * 0.05 @ (f32(m.v) * 0.03)\n"
    ).replace("[E: int]", "")
    (tmp_path / "p.pipe").write_text(text)
    plan = healthy(compile_file(tmp_path / "p.pipe", targets=[ARCHES[arch]]))
    assert all(a.dtype != np.float32 or a.size <= 96 for a in plan.arrays.values())
    (gpu,) = plan.pipelines[0].gpu
    assert all("matmul" in n.report["fused"] or n.report["fused"] == [] for n in gpu.launches)
    x = drawn(rng, "u8", 37, 70)
    (y,) = Emulated(plan, arch)({"x": x}, {"N": 37})
    h = np.maximum(((x.astype(float) - 131) * 0.02) @ (w.astype(float) * scales) + 0.5, 0)
    q = np.clip(np.round(h / 0.05), -3, 252)
    # where the first layer's rounding goes the other way one code differs by one
    most = np.abs(v.astype(float)).max() * 0.05 * 0.03
    wanted = (q * 0.05) @ (v.astype(float) * 0.03)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=most + 1e-3)


def test_codes_made_for_each_call(tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "pipeline p(x: f32[N, 96], w: i8[64, 96], t: f32[64]) -> f32[N, 64]\n"
        "where N in 1..=4096:\n"
        "    s = max(abs(x), axis=-1, keepdims=True) / 127.0\n"
        "    q = i8(clamp(round(x / s), -127.0, 127.0))\n"
        "    f32(q @ transpose(w, [1, 0])) * s * t\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, ("sm_90a",)))
    assert len(launches(plan)) == 2  # the scale is stored by the kernel of the codes
    x, w = rng.standard_normal((37, 96)).astype(np.float32), drawn(rng, "i8", 64, 96)
    t = rng.random(64).astype(np.float32)
    (y,) = Emulated(plan)({"x": x, "w": w, "t": t}, {"N": 37})
    s = np.abs(x).max(1, keepdims=True) / np.float32(127)
    q = np.clip(np.round(x / s), -127, 127)
    np.testing.assert_allclose(y, product(q, w.T) * s * t, rtol=1e-6, atol=1e-6)


def test_convolutions_with_padding(tmp_path: Path, rng: np.random.Generator) -> None:
    """What is padded is the zero, of which the sums of codes know nothing."""
    text = (
        "pipeline p(x: u8[N, 5, 9, 9], w: i8[19, 5, 3, 3], z: u8) -> i64[N, 19, 9, 9]:\n"
        "    x0 = pad(i32(x) - i32(z), [(0, 0), (0, 0), (1, 1), (1, 1)])\n"
        "    y[n, o, i, j] = sum[c, p, q] x0[n, c, i + p, j + q] * i32(w[o, c, p, q])\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, ("sm_80", "sm_90a")))
    x, w = drawn(rng, "u8", 3, 5, 9, 9), drawn(rng, "i8", 19, 5, 3, 3)
    wide = np.pad(x.astype(int) - 100, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))
    wanted = np.einsum("ncijpq,ocpq->noij", windows, w.astype(int))
    for arch in ("sm_80", "sm_90a"):
        assert len(fused(plan, arch)) in (1, 2)
        (y,) = Emulated(plan, arch)({"x": x, "w": w, "z": np.uint8(100)}, {"N": 3})
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("kind", ["i8", "f8e4m3"])
def test_few_rows_are_split_along_the_depth(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    to = "f32" if kind.startswith("f8") else "i32"
    text = (
        f"pipeline p(x: {kind}[N, 509], w: {kind}[67, 509], b: {to}[67]) -> {to}[N, 67]\n"
        "where N in 1..=4096:\n"
        f"    {to}(x) @ {to}(transpose(w, [1, 0])) + b\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text))
    x, w = drawn(rng, kind, 5, 509), drawn(rng, kind, 67, 509)
    for arch in ARCHES:
        (gpu,) = [g for g in plan.pipelines[0].gpu if g.arch == arch]
        assert any("parts" in launch.label for launch in gpu.launches)
        b = np.zeros(67, DTYPES[to].numpy)
        (y,) = Emulated(plan, arch)({"x": x, "w": w, "b": b}, {"N": 5})
        agree(y, x, w.T)


@pytest.mark.parametrize("by_lanes", [False, True])
def test_few_columns_in_parts_of_the_depth_are_summed_as_i32(
    by_lanes: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tensor cores whatever the columns are, and by lanes: in i8 products would wrap."""
    if by_lanes:
        monkeypatch.setattr(mma_tiles.TensorWriter, "_tile_of", lambda *_: None)
    text = (
        "pipeline p(x: u8[M, 256], w: i8[N, 256]) -> i64[M, N]\nwhere M in 1..=8, N in 1..=1:\n"
        "    y[i, j] = sum[k] i32(x[i, k]) * i32(w[j, k])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    assert [x.kernel for x in launches(plan)] == ["p_sum_parts_0", "p_sum_sum_1"]
    assert ("mma.sync" in plan.ptx["sm_80"]) != by_lanes
    x, w = drawn(rng, "u8", 5, 256), drawn(rng, "i8", 1, 256)
    (y,) = Emulated(plan, "sm_80")({"x": x, "w": w}, {"M": 5, "N": 1})
    agree(y, x, w.T)


def test_sums_that_might_not_fit_are_no_products(tmp_path: Path) -> None:
    text = (
        "pipeline p(x: u8[N, 40000], w: u8[40000, 64]) -> i64[N, 64]:\n"
        "    y[n, m] = sum[k] i32(x[n, k]) * i32(w[k, m])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    assert not fused(plan, "sm_80")
    narrow = text.replace("40000", "30000")
    assert fused(compiled(tmp_path / "q.pipe", narrow, ("sm_80",)), "sm_80")


def test_products_that_have_wrapped_stay_as_they_are(tmp_path: Path) -> None:
    text = (
        "pipeline p(x: i8[N, 64], w: i8[64, 64]) -> i64[N, 64]:\n"
        "    y[n, m] = sum[k] x[n, k] * w[k, m]\n"
    )
    assert not fused(compiled(tmp_path / "p.pipe", text, ("sm_80",)), "sm_80")


def test_ptxas_has_nothing_to_say(tmp_path: Path) -> None:
    text = (
        "pipeline p(x: f8e4m3[N, 512], w: f8e4m3[512, 512], y: i8[N, 512], v: i8[512, 512])"
        " -> (bf16[N, 512], i32[N, 512]):\n"
        "    bf16(f32(x) @ f32(transpose(w, [1, 0]))), y @ transpose(v, [1, 0])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    source = tmp_path / "p.ptx"
    source.write_text(plan.ptx["sm_90a"])
    try:
        tool = ptxas()
    except AssemblerMissing:
        pytest.skip("needs ptxas")
    command = [str(tool), "-arch=sm_90a", "-o", str(tmp_path / "p.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    said = done.stdout + done.stderr
    assert "setmaxnreg" not in said and "wgmma" not in said and "spill" not in said, said


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_quantised_convolutions_after_each_other(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """3 x 3 with steps, then 1 x 1: no window is stored, nor is the image between them again."""
    text = (
        "pipeline p(x: u8[N, 8, 9, 9], w: i8[16, 8, 3, 3], v: i8[32, 16]) -> i64[N, 32, 4, 4]\n"
        "where N in 1..=64:\n"
        "    a[n, o, i, j] = sum[c, p, q] (i32(x[n, c, 2*i + p, 2*j + q]) - 7)"
        " * i32(w[o, c, p, q])\n"
        "    h = u8(clamp(round(f32(a) * 0.001) + 128.0, 0.0, 255.0))\n"
        "    y[n, o, i, j] = sum[c] i32(h[n, c, i, j]) * i32(v[o, c])\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, (arch,)))
    assert len(fused(plan, arch)) >= 2
    x, w, v = drawn(rng, "u8", 5, 8, 9, 9), drawn(rng, "i8", 16, 8, 3, 3), drawn(rng, "i8", 32, 16)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(int) - 7, (3, 3), (2, 3))
    a = np.einsum("ncijpq,ocpq->noij", windows[:, :, ::2, ::2], w.astype(int))
    h = np.clip(np.round(a.astype(np.float32) * np.float32(0.001)) + 128, 0, 255).astype(int)
    (y,) = Emulated(plan, arch)({"x": x, "w": w, "v": v}, {"N": 5})
    np.testing.assert_array_equal(y, np.einsum("ncij,oc->noij", h, v.astype(int)))


@pytest.mark.parametrize("arch", ARCHES)
def test_convolutions_of_f8(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f8e4m3[N, 5, 7, 7], w: f8e4m3[19, 5, 3, 3]) -> f32[N, 19, 7, 7]\n"
        "where N in 1..=64:\n"
        "    nn.convolve2d(pad(f32(x), [(0, 0), (0, 0), (1, 1), (1, 1)]), f32(w), stride=1,"
        " dilation=1, groups=1)\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, (arch,)))
    x, w = drawn(rng, "f8e4m3", 5, 5, 7, 7), drawn(rng, "f8e4m3", 19, 5, 3, 3)
    wide = np.pad(x.astype(float), [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))
    (y,) = Emulated(plan, arch)({"x": x, "w": w}, {"N": 5})
    found = y.transpose(0, 2, 3, 1).reshape(-1, 19)
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 45)
    agree(found, rows, w.astype(float).reshape(19, 45).T)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_one_tensor_on_both_sides(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "pipeline p(x: i8[N, 64], w: i8[48, 64]) -> (i32[N, N], i32[N, 48])\n"
        "where N in 1..=512:\n"
        "    x @ transpose(x, [1, 0]), x @ transpose(w, [1, 0])\n"
    )
    plan = healthy(compiled(tmp_path / "p.pipe", text, (arch,)))
    assert all("matmul" in launch.report["fused"] for launch in launches(plan))
    assert all(launch.report["arithmetic"] == "eights" for launch in launches(plan))
    x, w = drawn(rng, "i8", 40, 64), drawn(rng, "i8", 48, 64)
    y, z = Emulated(plan, arch)({"x": x, "w": w}, {"N": 40})
    agree(y, x, x.T)
    agree(z, x, w.T)
