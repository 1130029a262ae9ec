"""Products by warps with roles: tiles that a block takes in turn, tails, batches, what follows."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.gpu.assemble import AssemblerMissing, ptxas
from stagefuse.compiler.gpu.matmul import persistent, tile_widths
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.facts import Facts

from .gpu_run import Emulated, check_legal, compiled, launches

BF16 = ml_dtypes.bfloat16


@pytest.fixture()
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each has many tiles."""
    monkeypatch.setattr(persistent, "BLOCKS", 2)
    monkeypatch.setattr(persistent, "TOGETHER", 2)


def run(folder: Path, text: str, dims: dict[str, int], **inputs: Any) -> list[Any]:
    plan = compiled(folder / "p.pipe", text, ("sm_90a",))
    check_legal(plan)
    assert "cp.async.bulk.tensor" in plan.ptx["sm_90a"]
    return Emulated(plan)(inputs, dims)


def drawn(rng: np.random.Generator, *shape: int, kind: Any = BF16) -> Any:
    return np.asarray(rng.standard_normal(shape)).astype(kind)


def agree(found: Any, wanted: Any, scale: float = 1.0) -> None:
    """Within the rounding of bf16, and of sums in f32 of factors up to about `scale`."""
    np.testing.assert_allclose(
        np.asarray(found).astype(float), wanted, rtol=2**-8, atol=1e-5 * scale
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [(1, 8, 256), (128, 64, 64), (300, 136, 256), (129, 1000, 128), (300, 72, 64)],
)
def test_tails(
    transposed: bool, rows: int, depth: int, width: int, tmp_path: Path, rng: np.random.Generator,
    few_blocks: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tile_widths, "few_widths", lambda _: (width,))
    right, given = ("w", "K, 520") if not transposed else ("transpose(w, [1, 0])", "520, K")
    text = (
        f"pipeline p(x: bf16[N, K], w: bf16[{given}]) -> f32[N, 520]\n"
        f"where N in 0..=4096, K in 0..=4096, K % 8 == 0:\n    f32(x @ {right})\n"
    )
    x, w = drawn(rng, rows, depth), drawn(rng, depth, 520)
    (y,) = run(tmp_path, text, {"N": rows, "K": depth}, x=x, w=w.T.copy() if transposed else w)
    agree(y, x.astype(float) @ w.astype(float), depth)


@pytest.mark.parametrize(("depth", "blocks"), [(128, 1), (136, 2)])
def test_blocks_bring_operands_together_where_lines_limit(
    depth: int, blocks: int, tmp_path: Path, rng: np.random.Generator, few_blocks: None
) -> None:
    text = (
        f"pipeline p(x: bf16[N, {depth}], w: bf16[{depth}, 320], v: bf16[320, {depth}])"
        " -> (bf16[N, 320], bf16[N, 320])\nwhere N in 1..=4096:\n"
        "    x @ w, x @ transpose(v, [1, 0])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    found = {n.cluster for n in launches(plan) if n.maps}
    assert found == {(blocks, 1, 1)}
    x, w, v = drawn(rng, 300, depth), drawn(rng, depth, 320), drawn(rng, 320, depth)
    y, z = Emulated(plan)({"x": x, "w": w, "v": v}, {"N": 300})
    for got, right in ((y, w), (z, v.T)):
        np.testing.assert_allclose(
            got.astype(float), x.astype(float) @ right.astype(float), rtol=2**-8, atol=1e-3
        )


def test_a_sum_of_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "pipeline p(x: bf16[N, K], w: bf16[K, 64], b: bf16[64]) -> bf16[N, 64]\n"
        "where K in 0..=64, K % 8 == 0:\n    x @ w + b\n"
    )
    b = drawn(rng, 64)
    inputs = {"x": np.zeros((3, 0), BF16), "w": np.zeros((0, 64), BF16), "b": b}
    (y,) = run(tmp_path, text, {"N": 3, "K": 0}, **inputs)
    np.testing.assert_array_equal(y, np.broadcast_to(b, (3, 64)))


def test_what_follows(tmp_path: Path, rng: np.random.Generator, few_blocks: None) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: bf16[B, T, 96], w: bf16[200, 96], b: f32[200], r: bf16[B, T, 200],"
        " s: f32[T]) -> (y: bf16[B, T, 200], z: f32[B, T, 200])\n"
        "where B in 1..=64, T in 1..=512:\n"
        "    h = x @ transpose(w, [1, 0])\n"
        "    a = f32(h) + b\n"
        "    y = bf16(nn.gelu(a)) + r\n"
        "    (y, a * s[:, None])\n"
    )
    b, t = 3, 50
    x, w = drawn(rng, b, t, 96), drawn(rng, 200, 96)
    bias, r = drawn(rng, 200, kind=np.float32), drawn(rng, b, t, 200)
    s = drawn(rng, t, kind=np.float32)
    y, z = run(tmp_path, text, {"B": b, "T": t}, x=x, w=w, b=bias, r=r, s=s)
    a = (x.astype(float) @ w.T.astype(float)).astype(BF16).astype(float) + bias
    np.testing.assert_allclose(z, a * s[:, None], rtol=2**-7, atol=2**-7)
    gelu = a * 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
    np.testing.assert_allclose(y.astype(float), gelu + r.astype(float), rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_batches_in_any_order(
    kind: str, tmp_path: Path, rng: np.random.Generator, few_blocks: None
) -> None:
    text = (
        f"pipeline p(q: {kind}[B, T, 3, 72], k: {kind}[B, S, 3, 72], v: {kind}[3, 72, 136])"
        f" -> ({kind}[B, 3, T, S], {kind}[B, T, 3, 136])\n"
        "where B in 1..=8, T in 1..=512, S in 8..=512, S % 8 == 0:\n"
        "    s = sum_of(q, k)\n"
        "    u = sum_with(q, v)\n"
        "    (s, u)\n"
        f"fn sum_of(q: {kind}[B, T, H, D], k: {kind}[B, S, H, D]) -> {kind}[B, H, T, S]:\n"
        "    y[b, h, i, j] = sum[d] q[b, i, h, d] * k[b, j, h, d]\n"
        f"fn sum_with(q: {kind}[B, T, H, D], v: {kind}[H, D, E]) -> {kind}[B, T, H, E]:\n"
        "    y[b, i, h, e] = sum[d] q[b, i, h, d] * v[h, d, e]\n"
    )
    dtype = DTYPES[kind].numpy
    q, k = drawn(rng, 2, 70, 3, 72, kind=dtype), drawn(rng, 2, 40, 3, 72, kind=dtype)
    v = drawn(rng, 3, 72, 136, kind=dtype)
    s, u = run(tmp_path, text, {"B": 2, "T": 70, "S": 40}, q=q, k=k, v=v)
    wide = [a.astype(float) for a in (q, k, v)]
    np.testing.assert_allclose(
        s.astype(float), np.einsum("bihd,bjhd->bhij", *wide[:2]), rtol=2**-7, atol=2**-6
    )
    np.testing.assert_allclose(
        u.astype(float), np.einsum("bihd,hde->bihe", wide[0], wide[2]), rtol=2**-7, atol=2**-6
    )


def test_registers_are_handed_over(tmp_path: Path) -> None:
    """What ptxas says where it can't keep the kernel as it is written: narrow tiles with much to
    compute behind them take few registers, and hand theirs over too."""
    text = """
pipeline wide(x: bf16[N, 512], w: bf16[512, 512]) -> bf16[N, 512]:
    x @ w

pipeline narrow(x: bf16[N, 512], w: bf16[512, 64], b: bf16[64]) -> bf16[N, 64]
where N in 8192..=65536:
    y = x @ w + b
    y * erf(y) + tanh(y)
"""
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


def test_one_width_is_the_best_for_every_size() -> None:
    for columns, wide in ((const(4096), 256), (const(768), 192), (sym("M"), 256)):
        found = tile_widths.widths(sym("N"), columns, [], 1, Facts({}, {}))
        assert [w for w, _ in found] == [wide, 64]
        for n in (1, 128, 129, 700, 1024, 2048, 4096, 10000):
            for m in (8, 300, 1024, 5000):
                assert sum(best.evaluate({"N": n, "M": m}) for _, best in found) == 1
    assert [w for w, _ in tile_widths.widths(sym("N"), const(40), [], 1, Facts({}, {}))] == [48]
    for size, width in ((1024, 64), (3072, 192), (4096, 256), (8192, 256)):
        (only,) = tile_widths.widths(const(size), const(size), [], 1, Facts({}, {}))
        assert only == (width, const(1))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_what_one_product_makes_in_16_bits_the_next_one_takes(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: bf16[N, 64], a: bf16[136, 64], b: bf16[64, 136], g: f32[64],"
        " c: bf16[64, 72])"
        " -> (bf16[N, 64], bf16[N, 72])\nwhere N in 1..=4096:\n"
        "    h = nn.gelu(x @ transpose(a, [1, 0]))\n"
        "    y = h @ transpose(b, [1, 0]) + x\n"
        "    f = f32(y)\n"
        "    n = f * rsqrt(mean(f * f, axis=-1, keepdims=True) + 1e-6) * g\n"
        "    z = bf16(n) @ c\n"
        "    y, z\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    assert "tf32" not in plan.ptx[arch]
    x, a, b = drawn(rng, 130, 64), drawn(rng, 136, 64), drawn(rng, 64, 136)
    a, b = (np.asarray(m.astype(float) / 8).astype(BF16) for m in (a, b))
    g = drawn(rng, 64, kind=np.float32)
    c = drawn(rng, 64, 72)
    y, z = Emulated(plan, arch)({"x": x, "a": a, "b": b, "g": g, "c": c}, {"N": 130})
    wx, wa, wb, wc = (m.astype(float) for m in (x, a, b, c))
    h = wx @ wa.T
    plain = (h / 2 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))) @ wb.T + wx
    np.testing.assert_allclose(y.astype(float), plain, rtol=2**-6, atol=2**-5)
    norm = plain / np.sqrt((plain**2).mean(1, keepdims=True) + 1e-6) * g
    np.testing.assert_allclose(z.astype(float), norm @ wc, rtol=2**-5, atol=2**-3)
