"""Matrix products of every shape: deep ones in stretches, few rows, edges of tiles and panels."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import driver
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.fusion.join_operands import THIN
from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.lower import Sites, lower
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.patterns.panel_width import width_for
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import run_passes
from stagefuse.compiler.schedule import CPU
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import F32, F64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType
from stagefuse.runtime import native as native_code
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.prepared import Evaluator

from .cpu_run import LEVELS
from .graph_run import both, graph_of, native


def matmul(dtype: DType, alone: bool) -> Graph:
    """maximum(x @ y, 0) for x [M, K] and y [K, N], or x @ y alone."""
    b = Builder(Facts().with_ranges({"M": (0, 4096), "K": (0, 8192), "N": (13, 4096)}))
    m, k, n = sym("M"), sym("K"), sym("N")
    x, y = b.input("x", TensorType(dtype, (m, k))), b.input("y", TensorType(dtype, (k, n)))
    left = b.view(x, [m, n, k], lambda i, j, c: [i, c])
    right = b.view(y, [m, n, k], lambda i, j, c: [c, j])
    total = b.reduce("sum", b.map("mul", left, right), [2])
    after = total if alone else b.map("maximum", total, b.scalar(0.0, dtype, [m, n]))
    return graph_of(b, [after])


PARAMS = ["f32", "f64", "f32 alone", "f64 alone", "f32 for v3", "f64 alone for v3"]


@pytest.fixture(scope="module", params=PARAMS)
def compiled(request: pytest.FixtureRequest) -> tuple[Graph, CpuPipeline]:
    dtype, *words = request.param.split()
    graph = matmul({"f32": F32, "f64": F64}[dtype], "alone" in words)
    levels = ("v3",) if "v3" in words else LEVELS
    return graph, native(graph, ("M", "K", "N"), levels=levels)


@pytest.mark.parametrize("levels, width", [(("v3",), 16), (("v4",), 48), (("v3", "v4"), 48)])
def test_panels_for_avx2_alone_are_as_wide_as_its_tiles(
    levels: tuple[str, ...], width: int
) -> None:
    passes = pipeline_of(lambda *_: np.zeros(0), panel=width_for(levels))
    graph, _ = run_passes(matmul(F32, True), passes)
    panels = [n.primitive.panel for n in graph.nodes.values() if isinstance(n.primitive, Contract)]
    assert panels == [width]


SHAPES = [(m, k, n) for m in (1, 2, 3, 37, 145) for k in (1, 40, 513) for n in (13, 48, 97)]
SHAPES += [(5, 1100, 50), (40, 2048, 50), (205, 2049, 13), (38, 4100, 50)]
SHAPES += [(0, 3, 13), (3, 0, 20), (36, 1024, 96)]


@pytest.mark.parametrize("shape", SHAPES)
def test_product(
    compiled: tuple[Graph, CpuPipeline], shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    graph, pipe = compiled
    m, k, n = shape
    dtype = graph.type(graph.results[0]).dtype
    feeds = {
        "x": rng.standard_normal((m, k)).astype(dtype.numpy),
        "y": rng.standard_normal((k, n)).astype(dtype.numpy),
    }
    ((found, wanted),) = both(graph, feeds, {"M": m, "K": k, "N": n}, pipe)
    scale = np.abs(feeds["x"].astype(float)) @ np.abs(feeds["y"].astype(float))
    # each product is added at most K times, each time rounding once (Higham 2002, section 3.1)
    unit = 2.0 ** (-24 if dtype.bits == 32 else -53)
    exact = 2.0**-50 * (k + 1)  # the reference itself
    assert np.all(np.abs(found - wanted) <= ((k + 1) * unit + exact) * scale)


def test_a_deep_convolution(rng: np.random.Generator) -> None:
    b = Builder(Facts())
    x = b.input("x", TensorType(F32, (const(1), const(70), const(9), const(9))))
    w = b.input("w", TensorType(F32, (const(40), const(70), const(3), const(3))))
    domain = [1, 40, 7, 7, 70, 3, 3]
    left = b.view(x, domain, lambda n, o, i, j, c, u, v: [n, c, i + u, j + v])
    right = b.view(w, domain, lambda n, o, i, j, c, u, v: [o, c, u, v])
    graph = graph_of(b, [b.reduce("sum", b.map("mul", left, right), [4, 5, 6])])
    feeds = {
        "x": rng.standard_normal((1, 70, 9, 9)).astype(np.float32),
        "w": rng.standard_normal((40, 70, 3, 3)).astype(np.float32),
    }
    ((found, wanted),) = both(graph, feeds, {})
    np.testing.assert_allclose(found, wanted, atol=630 * 6 * 630**0.5 * 2**-24)


def test_a_convolution_with_a_kernel_of_one_is_a_product(rng: np.random.Generator) -> None:
    b = Builder(Facts().with_ranges({"B": (0, 8)}))
    x = b.input("x", TensorType(F32, (sym("B"), const(20), const(9), const(9))))
    w = b.input("w", TensorType(F32, (const(30), const(20), const(1), const(1))))
    domain = [sym("B"), 30, 5, 5, 20, 1, 1]
    left = b.view(x, domain, lambda n, o, i, j, c, u, v: [n, c, 2 * i + u, 2 * j + v])
    right = b.view(w, domain, lambda n, o, i, j, c, u, v: [o, c, u, v])
    graph = graph_of(b, [b.reduce("sum", b.map("mul", left, right), [4, 5, 6])])
    optimized, _ = run_passes(graph, pipeline_of(lambda *_: np.zeros(0)), Bounds())
    assert any(isinstance(n.primitive, Contract) for n in optimized.nodes.values())
    feeds = {
        "x": rng.standard_normal((3, 20, 9, 9)).astype(np.float32),
        "w": rng.standard_normal((30, 20, 1, 1)).astype(np.float32),
    }
    ((found, wanted),) = both(graph, feeds, {"B": 3})
    scale = np.einsum(
        "bcij,oc->boij", np.abs(feeds["x"][:, :, ::2, ::2]), np.abs(feeds["w"][..., 0, 0])
    )
    assert np.all(np.abs(found - wanted) <= 21 * (2.0**-24 + 2.0**-50) * scale)


def test_few_rows_of_a_matrix_pack_nothing(
    compiled: tuple[Graph, CpuPipeline], rng: np.random.Generator
) -> None:
    """A product of two inputs has three kernels; of the last two one runs."""
    graph, pipe = compiled
    dtype = graph.type(graph.results[0]).dtype
    unit = 2.0 ** (-24 if dtype.bits == 32 else -53)
    for m in (1, 9, 35, 36, 37, 40, 129, 256, 257):
        for k, n in ((15, 17), (16, 480), (33, 481), (100, 975)):
            feeds = {
                "x": rng.standard_normal((m, k)).astype(dtype.numpy),
                "y": rng.standard_normal((k, n)).astype(dtype.numpy),
            }
            ((found, wanted),) = both(graph, feeds, {"M": m, "K": k, "N": n}, pipe)
            scale = np.abs(feeds["x"].astype(float)) @ np.abs(feeds["y"].astype(float))
            assert np.all(np.abs(found - wanted) <= (k + 1) * (unit + 2.0**-50) * scale)
    optimized, _ = run_passes(graph, pipeline_of(lambda *_: np.zeros(0)), Bounds())
    groups = join(optimized, partition(optimized)).groups
    counts = [lower(optimized, g, Sites(), CPU).count for g in groups]
    sizes = {"K": 100, "N": 97}
    for m in (1, THIN, THIN + 1):
        runs = [m > THIN, m > THIN, m <= THIN]
        assert [c.evaluate({"M": m, **sizes}) > 0 for c in counts] == runs


def test_a_product_that_is_repeated_is_computed_once(rng: np.random.Generator) -> None:
    """Along B, which neither factor has, and which may be 0."""
    b = Builder(Facts({"B": (0, None)}))
    x = b.input("x", TensorType(F32, (const(5), const(40))))
    w = b.input("w", TensorType(F32, (const(40), const(30))))
    like = b.input("like", TensorType(F32, (sym("B"),)))
    domain = [5, sym("B"), 40, 30]
    left = b.view(x, domain, lambda i, n, k, j: [i, k])
    right = b.view(w, domain, lambda i, n, k, j: [k, j])
    product = b.reduce("sum", b.map("mul", left, right), [2])
    added = b.map("add", product, b.view(like, [5, sym("B"), 30], lambda i, n, j: [n]))
    graph = graph_of(b, [product, added])
    optimized, _ = run_passes(graph, pipeline_of(lambda *_: np.zeros(0)), Bounds())
    (found,) = (n for n in optimized.nodes.values() if isinstance(n.primitive, Contract))
    assert found.type.shape == (const(5), const(30))
    pipe = native(graph, ("B",))
    for size in (0, 1, 3):
        feeds = {"x": rng.standard_normal((5, 40)).astype(np.float32),
                 "w": rng.standard_normal((40, 30)).astype(np.float32),
                 "like": np.zeros(size, np.float32)}  # fmt: skip
        scale = np.abs(feeds["x"]).astype(float) @ np.abs(feeds["w"]).astype(float)
        for got, wanted in both(graph, feeds, {"B": size}, pipe):
            assert got.shape == (5, size, 30)
            assert np.all(np.abs(got - wanted) <= 41 * 2.0**-24 * scale[:, None, :])


@pytest.mark.parametrize("most, steps", [(256, 3), (4096, 2)])
def test_threads_share_the_panels_of_one_block(
    rng: np.random.Generator, tmp_path: Path, most: int, steps: int
) -> None:
    weights = rng.standard_normal((3000, 150), np.float32)
    np.savez(tmp_path / "w.npz", w=weights)
    source = tmp_path / "deep.pipe"
    head = 'weights w = "w.npz"\n\npipeline main(x: f32[M, 3000])'
    source.write_text(f"{head}\nwhere M in 1..={most}:\n    x @ w.w\n")
    plan = driver.compile_file(source)
    (step,) = plan.pipelines[0].steps
    assert Evaluator({"M": 5})(step.count) == steps
    x = rng.standard_normal((5, 3000), np.float32)
    found = CpuPipeline(plan, threads=2)(x=x)
    wanted = x.astype(float) @ weights
    scale = np.abs(x).astype(float) @ np.abs(weights)
    assert np.all(np.abs(found - wanted) <= 3001 * 2.0**-24 * scale)


def test_a_transposed_matrix_is_turned_once(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "p.pipe").write_text(
        "pipeline main(x: f32[96, 100], y: f32[130, 100]):\n    x @ transpose(y)\n"
    )
    plan = driver.compile_file(tmp_path / "p.pipe")
    (step,) = plan.pipelines[0].steps
    x = rng.standard_normal((96, 100), np.float32)
    y = rng.standard_normal((130, 100), np.float32)
    expected, parts = x.astype(float) @ y.T, np.abs(x).astype(float) @ np.abs(y).T
    with CpuPipeline(plan, threads=2) as pipe:
        assert np.all(np.abs(pipe(x=x, y=y) - expected) <= 101 * 2.0**-24 * parts)
    assert Evaluator({})(step.scratch_bytes) < y.nbytes  # a panel, not all of it for each block


KNOWN = [
    (97, 131, 61), (64, 17, 100), (70, 3, 50), (33, 40, 192), (100, 23, 240), (5, 7, 16),
    (300, 64, 64), (20, 33, 1000), (64, 600, 96), (1, 200, 1000), (1, 30, 4099),
]  # fmt: skip


ALONE = [(300, 64, 64), (64, 600, 96), (450, 20, 70)]
"""Those of code for AVX2 alone: panels packed where they are used, and by a kernel before."""


@pytest.mark.parametrize("shape, level", [*product(KNOWN, LEVELS), *product(ALONE, ["v3 alone"])])
def test_products_of_known_sizes_with_nothing_after(
    shape: tuple[int, int, int], level: str, tmp_path: Path, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    m, k, n = shape
    (tmp_path / "p.pipe").write_text(
        f"pipeline main(x: f32[2, {m}, {k}], y: f32[2, {k}, {n}], z: f32[{k}, {n}])"
        f" -> (a: f32[2, {m}, {n}], b: f32[2, {m}, {n}], c: f32[{m}, {n}]):\n"
        "    x @ y, x @ z, x[1] @ z\n"
    )
    monkeypatch.setattr(native_code, "detect_level", lambda cpuinfo=None: level[:2])
    levels = LEVELS if level in LEVELS else ("v3",)
    x, y, z = (rng.standard_normal(s, np.float32) for s in ((2, m, k), (2, k, n), (k, n)))
    plan = driver.compile_file(tmp_path / "p.pipe", levels=levels)
    with CpuPipeline(plan, threads=2) as pipe:
        found = pipe(x=x, y=y, z=z)
    for result, left, right in zip(found, (x, x, x[1]), (y, z, z), strict=True):
        wanted, parts = left.astype(float) @ right, np.abs(left).astype(float) @ np.abs(right)
        assert np.all(np.abs(result - wanted) <= (k + 1) * 2.0**-24 * parts)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("known", [True, False])
def test_a_border_that_is_not_zero_is_multiplied(
    level: str, known: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of right operands, whose panels the kernel packs, along the depth and the columns."""
    sizes = {"M": 33, "K": 48, "N": 61}
    m, k, n = (str(size) if known else name for name, size in sizes.items())
    path = tmp_path / "p.pipe"
    path.write_text(
        f"pipeline p(x: f32[{m}, {k}], y: f32[{n}, {k}], c: i32[{m}, {k}])\n"
        f"    -> (f32[{m}, {m}], f32[{m}, {n} + 3], i32[{m}, {m}]):\n"
        "    a = pad(x, [(0, 0), (2, 3)], value=-1.5)\n"
        "    b = pad(y, [(1, 2), (2, 3)], value=0.5)\n"
        "    d = pad(c, [(0, 0), (1, 4)], value=2)\n"
        "    a @ transpose(a, [1, 0]), a @ transpose(b, [1, 0]), d @ transpose(d, [1, 0])\n"
    )
    plan = driver.compile_file(path, levels=(level,))
    x, y = (rng.integers(-4, 5, (sizes[s], 48)).astype(np.float32) for s in "MN")
    c = rng.integers(-9, 10, x.shape).astype(np.int32)
    found = CpuPipeline(plan, threads=1)(x=x, y=y, c=c)
    a, b = (
        np.pad(z.astype(float), pads, constant_values=value)
        for z, pads, value in ((x, [(0, 0), (2, 3)], -1.5), (y, [(1, 2), (2, 3)], 0.5))
    )
    d = np.pad(c, [(0, 0), (1, 4)], constant_values=2)
    for got, wanted in zip(found, (a @ a.T, a @ b.T, d @ d.T), strict=True):
        np.testing.assert_array_equal(got, wanted)  # sums of few halves are exact
