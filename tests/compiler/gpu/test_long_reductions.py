"""Long reductions of few rows, whose parts blocks share: the emulator against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

SOURCE = """pipeline p(x: DTYPE[R, N]) -> (f32[R], f32[R], DTYPE[R], i64[R], i64[R])
where R in 0..=500, N in 1..=100000:
    y = f32(x)
    sum(y, axis=1), sqrt(mean(y * y, axis=1)), max(x, axis=1), argmax(x, axis=1), argmin(x, axis=1)
"""


@pytest.mark.parametrize("arch, dtype", [("sm_80", "f16"), ("sm_89", "f32"), ("sm_90a", "f64")])
def test_few_long_rows(arch: str, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", SOURCE.replace("DTYPE", dtype), (arch,))
    check_legal(plan)
    run = Emulated(plan, arch)
    for shape in ((3, 16384), (1, 33333), (2, 16383), (130, 5), (0, 20000), (1, 1)):
        x = rng.standard_normal(shape).astype(dtype.replace("f", "float"))
        if x.size > 9000:  # ties between parts, of which the first counts
            x[-1, [8000, shape[1] - 1]] = 9
            x[-1, [8001, shape[1] - 2]] = -9
        _check(run, x)
    x = np.zeros((2, 40000), x.dtype)
    x[0, 30001] = x[0, 7] = np.nan
    x[1, [5, 39999]] = -0.0
    _check(run, x)


def test_parts_of_any_rows_are_read_in_vectors(tmp_path: Path, rng: np.random.Generator) -> None:
    """If they are whole vectors at a call, and all of a lane's are under way before it waits."""
    source = "pipeline p(x: f32[R, N]) -> (i64[R], f32[R]) where N >= 1:\n"
    source += "    argmax(x, axis=1), sum(x, axis=1)\n"
    plan = compiled(tmp_path / "p.pipe", source, ("sm_90a",))
    check_legal(plan)
    (parts,) = (x for x in launches(plan) if x.kernel.endswith("_parts_0"))
    assert int(parts.report["bytes ahead"]) >= 128
    run = Emulated(plan, "sm_90a")
    for shape in ((2, 16384 + 4), (1, 16384 + 3)):
        x = np.full(shape, -np.inf, np.float32)
        at, total = run({"x": x}, dict(zip("RN", shape, strict=True)))
        np.testing.assert_array_equal(at, 0)
        np.testing.assert_array_equal(total, -np.inf)


def _check(run: Emulated, x: np.ndarray) -> None:
    total, root, most, at, least = run({"x": x}, dict(zip("RN", x.shape, strict=True)))
    y = x.astype(np.float64)
    eps = np.finfo(np.float32).eps
    close = np.abs(y).sum(1) * eps * 40 + 1e-30  # no element passes 40 additions
    np.testing.assert_allclose(total, y.sum(1), rtol=0, atol=np.nanmax(close, initial=1e-30))
    np.testing.assert_allclose(root, np.sqrt((y * y).mean(1)), rtol=40 * eps)
    np.testing.assert_array_equal(most, x.max(1))
    np.testing.assert_array_equal(at, x.argmax(1))
    np.testing.assert_array_equal(least, x.argmin(1))


ROWS = """import nn

pipeline p(x: DTYPE[R, N], g: f32[N], b: f32[N], keep: bool[N]) -> (
    soft: DTYPE[R, N], norm: DTYPE[R, N], scale: f32[R])
where R in 0..=100, N in 1..=100000:
    y = f32(x)
    m = mean(y, axis=-1, keepdims=True)
    v = mean((y - m) ** 2, axis=-1, keepdims=True)
    r = rsqrt(v + 0.001)
    soft = nn.softmax(select(keep[None, :], y, -1e30))
    DTYPE(soft), DTYPE((y - m) * r * g + b), reshape(r, [R])
"""


@pytest.mark.parametrize("arch, dtype", [("sm_80", "f16"), ("sm_89", "f32"), ("sm_90a", "f32")])
def test_softmax_and_norms_of_few_long_rows(
    arch: str, dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Blocks have parts of rows of more than 32768 elements."""
    plan = compiled(tmp_path / "p.pipe", ROWS.replace("DTYPE", dtype), (arch,))
    check_legal(plan)
    names = [x.kernel for x in launches(plan)]
    assert any("of_parts" in name for name in names), names
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    run, kind = Emulated(plan, arch), np.dtype(dtype.replace("f", "float"))
    for rows, length in ((1, 32769), (3, 36864), (2, 40001), (2, 1000), (0, 40000)):
        x = rng.standard_normal((rows, length)).astype(kind)
        g, b = (rng.standard_normal(length).astype(np.float32) for _ in range(2))
        keep = rng.random(length) < 0.9
        keep[0] = True
        inputs = {"x": x, "g": g, "b": b, "keep": keep}
        soft, norm, scale = run(inputs, {"R": rows, "N": length})
        y, eps = x.astype(np.float64), np.finfo(np.float32).eps
        own = np.finfo(kind).eps
        e = np.exp(y - y.max(1, where=keep, initial=-np.inf, keepdims=True)) * keep
        # exp within 2 ulp of a difference of up to 10, sums of positive terms in at most 40 steps
        wanted, least = e / e.sum(1, keepdims=True), np.finfo(kind).smallest_subnormal
        np.testing.assert_allclose(soft, wanted, rtol=60 * eps + own, atol=least)
        m = y.mean(1, keepdims=True)
        r = 1 / np.sqrt(y.var(1, keepdims=True) + 0.001)
        np.testing.assert_allclose(scale, r[:, 0], rtol=60 * eps)
        far = 60 * eps * (np.abs(y).max(initial=1) + 1) * (np.abs(g) + np.abs(b) + 1)
        wanted = (y - m) * r * g + b
        assert (np.abs(norm - wanted) <= far * r.max(initial=1) + own * np.abs(wanted)).all()


COMPUTED = """pipeline p(x: f32[N], y: f32[N]) -> (f32, f32, i64):
    sum((x - y) * (x - y)), max(abs(x)), argmin(x + y)
"""


def test_what_is_computed_of_many_elements_is_reduced_in_parts(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", COMPUTED, ("sm_80",))
    check_legal(plan)
    assert all("N" in x.grid[0] for x in launches(plan) if x.kernel.count("parts"))
    assert any(x.kernel.count("parts") for x in launches(plan))
    run = Emulated(plan, "sm_80")
    for count in (1, 4096, 9001):
        x, y = rng.standard_normal((2, count)).astype(np.float32)
        total, most, least = run({"x": x, "y": y}, {"N": count})
        wanted = ((x.astype(np.float64) - y) ** 2).sum()
        # the difference and the square are rounded, and no element passes 40 additions
        np.testing.assert_allclose(total, wanted, rtol=44 * np.finfo(np.float32).eps)
        assert most == np.abs(x).max() and least == (x + y).argmin()


SEVERAL = """pipeline p(x: DTYPE[A, B, N], w: f32[N]) -> (f32, f32[A], DTYPE[A], DTYPE, f32[A]):
    y = f32(x)
    sum(y), sum(y * y, axis=(1, 2)), max(x, axis=(1, 2)), min(x), sum(y * w, axis=(1, 2))
"""
KNOWN = [("f32", ("3", "2", "8193")), ("f16", ("1", "70", "300")), ("f32", ("A", "B", "N"))]


@pytest.mark.parametrize("dtype, sizes", KNOWN)
def test_axes_that_follow_each_other_are_cut_as_one(
    dtype: str, sizes: tuple[str, str, str], tmp_path: Path, rng: np.random.Generator
) -> None:
    """In parts of 4096, whichever of them is long, where nothing read changes along some of them
    alone."""
    source = SEVERAL.replace("DTYPE", dtype)
    for name, size in zip("ABN", sizes, strict=True):
        source = source.replace(f"[{name},", f"[{size},").replace(f" {name},", f" {size},")
        source = source.replace(f"{name}]", f"{size}]")
    plan = compiled(tmp_path / "p.pipe", source, ("sm_90a",))
    check_legal(plan)
    run, kind = Emulated(plan, "sm_90a"), np.dtype(dtype.replace("f", "float"))
    given = [[int(s) for s in sizes]] if sizes[0] != "A" else [[5, 9, 401], [1, 3, 6007], [2, 0, 4]]
    for a, b, n in given:
        x = rng.standard_normal((a, b, n)).astype(kind)
        w = rng.standard_normal(n).astype(np.float32)
        total, squares, most, least, weighed = run({"x": x, "w": w}, {"A": a, "B": b, "N": n})
        y, eps = x.astype(np.float64), np.finfo(np.float32).eps
        # no element passes 60 additions, and products are rounded
        assert abs(total - y.sum()) <= 60 * eps * np.abs(y).sum()
        np.testing.assert_allclose(squares, (y * y).sum((1, 2)), rtol=61 * eps)
        off = np.abs(weighed - (y * w).sum((1, 2)))
        assert np.all(off <= 61 * eps * np.abs(y * w).sum((1, 2)))
        low = np.finfo(kind).min if dtype == "f16" else -np.inf
        if y.size:
            assert least == x.min()
            np.testing.assert_array_equal(most, x.max((1, 2), initial=low))


COLUMNS = """pipeline p(x: DTYPE[R, S, C], m: f32[C]) -> (f32[C], DTYPE[C], f32[C])
where R in 0..=4000, S in 1..=100:
    y = f32(x)
    d = y - m
    sum(y, axis=(0, 1)), max(x, axis=(0, 1)), mean(d * d, axis=(0, 1))
"""


@pytest.mark.parametrize("arch, dtype, columns", [("sm_80", "f32", 3), ("sm_90a", "f16", 40)])
def test_few_columns_of_many_rows(
    arch: str, dtype: str, columns: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Blocks have parts of the rows, which several axes may be."""
    text = COLUMNS.replace("DTYPE", dtype).replace("C]", f"{columns}]")
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    assert any("parts" in x.kernel for x in launches(plan))
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    run, kind = Emulated(plan, arch), np.dtype(dtype.replace("f", "float"))
    for r, s in ((2100, 5), (5, 40), (821, 10), (0, 3)):
        x = rng.standard_normal((r, s, columns)).astype(kind)
        m = rng.standard_normal(columns).astype(np.float32)
        total, most, mean = run({"x": x, "m": m}, {"R": r, "S": s})
        y, eps = x.astype(np.float64).reshape(-1, columns), np.finfo(np.float32).eps
        # no element passes 100 additions
        assert np.all(np.abs(total - y.sum(0)) <= 100 * eps * np.abs(y).sum(0))
        if not len(y):
            continue
        np.testing.assert_array_equal(most, x.reshape(-1, columns).max(0))
        far = (np.abs(y) + np.abs(m)) ** 2  # the difference is rounded, and then squared
        assert np.all(np.abs(mean - ((y - m) ** 2).mean(0)) <= 105 * eps * far.mean(0))


@pytest.mark.parametrize("shape, axis", [((9001, 9), 0), ((2, 16500), 1), ((3, 23000), None)])
def test_reductions_that_need_others_are_cut_level_by_level(
    shape: tuple[int, int], axis: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    """No block reduces more than its part of what the others need of it."""
    rows, columns = shape
    along = "" if axis is None else f", axis={axis}"
    result = "f32" if axis is None else f"f32[{shape[1 - axis]}]"
    text = f"""pipeline p(x: f32[{rows}, {columns}]) -> ({result}, {result}):
    m = max(x{along}{"" if axis is None else ", keepdims=True"})
    var(x{along}), log(sum(exp(x - m){along}))
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    check_legal(plan)
    names = [x.kernel for x in launches(plan)]
    assert any("parts_1" in name for name in names), names
    x = (3 * rng.standard_normal(shape)).astype(np.float32)
    found = Emulated(plan, "sm_90a")({"x": x}, {})
    y, eps = x.astype(np.float64), np.finfo(np.float32).eps
    keep = axis is not None
    away = np.exp(y - y.max(axis, keepdims=keep)).sum(axis)
    # no element passes 60 additions; the mean is off by as much of the mean of sizes
    off = 60 * eps * (y.var(axis) + np.abs(y).mean(axis) * np.abs(y).max())
    assert np.all(np.abs(found[0] - y.var(axis)) <= off)
    np.testing.assert_allclose(found[1], np.log(away), atol=100 * eps, rtol=4 * eps)


@pytest.mark.parametrize(("dtype", "columns"), [("f32", 48), ("f16", 130)])
def test_columns_are_cut_where_some_processors_had_more_of_them(
    dtype: str, columns: int, tmp_path: Path, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three blocks on two multiprocessors are four in two parts, of which each has three halves."""
    monkeypatch.setattr("stagefuse.compiler.gpu.reductions.split_reductions.BLOCKS", 2)
    text = (
        f"pipeline p(x: {dtype}[1, 2048], w: {dtype}[2048, {columns}]) -> {dtype}[1, {columns}]:\n"
        "    x @ w\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    assert [x.label for x in launches(plan)] == ["p.matmul parts", "p.matmul"]
    x, w = (rng.integers(-1, 2, s).astype(dtype.replace("f", "float"))
            for s in ((1, 2048), (2048, columns)))  # fmt: skip
    (found,) = Emulated(plan, "sm_80")({"x": x, "w": w}, {})
    assert (found == x.astype(float) @ w.astype(float)).all()  # of at most 2048, which is exact


FINISHED = """
pipeline norm(x: f32[N]) -> f32:
    sqrt(sum(x * x))

pipeline loss(a: f32[M, N], b: f32[M, N]) -> (f32, f32, f32):
    m = mean((a - b) * (a - b))
    m, sqrt(m) * 2.0, max(abs(a - b))

pipeline scaled(a: f32[N], g: f32) -> (f32, f32[N]):
    s = sqrt(sum(a * a)) + g
    s, a / s
"""


def test_what_follows_a_whole_reduction_is_no_kernel_more(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", FINISHED, ("sm_90a",))
    check_legal(plan)
    assert [len(p.gpu[0].launches) for p in plan.pipelines] == [2, 3, 3]  # a - b is stored
    norm, loss, scaled = (Emulated(plan, "sm_90a", n) for n in range(3))
    a, b = rng.standard_normal((2, 3, 23456)).astype(np.float32)
    x, d = a.ravel().astype(float), a.astype(float) - b
    close = {"rtol": 40 * float(np.finfo(np.float32).eps)}
    (found,) = norm({"x": a.ravel()}, {"N": a.size})
    np.testing.assert_allclose(found, np.sqrt((x * x).sum()), **close)
    found = loss({"a": a, "b": b}, {"M": 3, "N": 23456})
    mean = (d * d).mean()
    np.testing.assert_allclose(found, [mean, np.sqrt(mean) * 2, abs(d).max()], **close)
    total, quotients = scaled({"a": a.ravel(), "g": np.float32(3)}, {"N": a.size})
    np.testing.assert_allclose(total, np.sqrt((x * x).sum()) + 3, **close)
    np.testing.assert_allclose(quotients, x / (np.sqrt((x * x).sum()) + 3), **close)


IMAGES = """
pipeline plain(x: f32[B, H, W, 24]) -> f32[B, 24]
where B >= 1, H in 1..=64, W in 1..=64:
    mean(x, axis=(1, 2))

pipeline weighed(x: f32[B, H, W, 24], y: f32[W]) -> (f32[B, 24], f32[H, 24])
where B >= 1, H in 1..=64, W in 1..=64:
    sum(x * y[None, None, :, None], axis=(1, 2)), max(x, axis=(0, 2))

pipeline first(x: f32[B, 24, H, W], r: f32[B, 24, H, W]) -> (f32[B, 24], f32[B, 24, H, W])
where B >= 1, H >= 1, W >= 1:
    m = mean(x + r, axis=(2, 3))
    m, x - m[:, :, None, None]
"""


def test_eight_places_of_an_image_are_under_way(tmp_path: Path, rng: np.random.Generator) -> None:
    """Lanes share all places, in one loop, where all that is read lies in their order, else the
    longest loop."""
    plan = compiled(tmp_path / "p.pipe", IMAGES, ("sm_90a",))
    check_legal(plan)
    assert not any(x.report["spill bytes"] for x in launches(plan))
    assert [x.report["bytes ahead"] for x in launches(plan)][:2] == [8 * 16, 8 * (16 + 4)]
    plain, weighed, first = (Emulated(plan, pipeline=n) for n in range(3))
    for b, h, w in ((2, 7, 13), (1, 1, 1), (1, 40, 3), (1, 9, 8)):
        x = rng.standard_normal((b, h, w, 24)).astype(np.float32)
        y = rng.standard_normal(w).astype(np.float32)
        (mean,) = plain({"x": x}, {"B": b, "H": h, "W": w})
        total, most = weighed({"x": x, "y": y}, {"B": b, "H": h, "W": w})
        np.testing.assert_array_equal(most, x.max((0, 2)))
        wide, off = x.astype(np.float64), h * w * 2.0**-24
        turned = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        means, centred = first({"x": turned, "r": 0 * turned}, {"B": b, "H": h, "W": w})
        assert np.all(np.abs(means - wide.mean((1, 2))) <= off * np.abs(wide).sum((1, 2)))
        np.testing.assert_array_equal(centred, turned - means[:, :, None, None])
        assert np.all(np.abs(mean - wide.mean((1, 2))) <= off * np.abs(wide).sum((1, 2)))
        wide = wide * y[:, None]
        assert np.all(np.abs(total - wide.sum((1, 2))) <= 2 * off * np.abs(wide).sum((1, 2)))
