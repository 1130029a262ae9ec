"""f32 products on AMX: as right as those of vectors, and the same whatever came before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from stagefuse.compiler import driver
from stagefuse.compiler.cpu import pieces
from stagefuse.compiler.graph import Graph
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.plan import CUT_ROWS, Plan
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import BF16, F32
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.native import detect_level, units
from stagefuse.runtime.pieces import Pieces

from .graph_run import graph_of, native

pytestmark = pytest.mark.skipif(detect_level() != "v4", reason="needs AVX-512")
UNIT = 2.0**-24
Array = np.ndarray


@pytest.fixture(autouse=True, scope="module")
def narrow(tiles: None) -> Iterator[None]:
    """Pieces for matrices of any width."""
    before, pieces.LEAST_COLUMNS = pieces.LEAST_COLUMNS, 0
    yield
    pieces.LEAST_COLUMNS = before


def product(depth: int | None, batch: bool = False) -> Graph:
    """x @ y for x [M, K] and y [K, N], K known or not; of a batch, the kernel packs y."""
    b = Builder(Facts().with_ranges({"B": (0, 8), "M": (0, 4096), "K": (0, 8192), "N": (0, 4096)}))
    m, n = sym("M"), sym("N")
    k = sym("K") if depth is None else const(depth)
    lead = [sym("B")] if batch else []
    x = b.input("x", TensorType(F32, (*lead, m, k)))
    y = b.input("y", TensorType(F32, (*lead, k, n)))
    left = b.view(x, [*lead, m, n, k], lambda *i: [*i[:-3], i[-3], i[-1]])
    right = b.view(y, [*lead, m, n, k], lambda *i: [*i[:-3], i[-1], i[-2]])
    return graph_of(b, [b.reduce("sum", b.map("mul", left, right), [len(lead) + 2])])


@cache
def compiled(depth: int | None = None, batch: bool = False, threads: int = 1) -> CpuPipeline:
    dims = (*(["B"] if batch else []), "M", *(["K"] if depth is None else []), "N")
    return native(product(depth, batch), dims, threads)


def vectors(pipe: CpuPipeline, x: Array, y: Array) -> Array:
    """What the pipeline gives without tiles."""
    assert pipe._code is not None
    pipe._code._object.use_units(0)
    try:
        return np.asarray(pipe(x=x, y=y))
    finally:
        pipe._code._object.use_units(units())


def matrices(rng: np.random.Generator, m: int, k: int, n: int) -> tuple[Array, Array]:
    return rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)


def check(found: Array, x: Array, y: Array) -> None:
    """Each of the six products of pieces is added once, and each addition rounds once; what is left
    out of a product is below 2^-26 of it."""
    wanted = x.astype(float) @ y.astype(float)
    scale = np.abs(x).astype(float) @ np.abs(y).astype(float)
    bound = (6 * x.shape[-1] + 1) * UNIT * scale
    assert np.all(np.abs(found - wanted) <= bound)


SIZES = [(m, n) for m in (16, 17, 31, 32, 33, 64, 143) for n in (16, 1, 47, 48, 49, 200)]


@pytest.mark.parametrize("depth", [24, 31, 32, 33, 100, 513])
def test_every_shape_of_a_tile(rng: np.random.Generator, depth: int) -> None:
    for m, n in SIZES:
        x, y = matrices(rng, m, depth, n)
        check(compiled(depth)(x=x, y=y), x, y)


@pytest.mark.parametrize("shape", [(40, 23, 50), (150, 520, 97), (300, 1030, 50), (1100, 60, 49)])
def test_a_depth_that_is_not_known(rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    x, y = matrices(rng, *shape)
    check(compiled()(x=x, y=y), x, y)


def test_a_known_depth_in_stretches(rng: np.random.Generator) -> None:
    for m, n in ((40, 30), (300, 250)):
        x, y = matrices(rng, m, 2100, n)
        check(compiled(2100)(x=x, y=y), x, y)


def test_panels_that_the_kernel_packs(rng: np.random.Generator) -> None:
    """A panel's scratch holds another one at every step."""
    for m, k, n in ((70, 64, 100), (16, 33, 200), (300, 700, 49)):
        x = rng.standard_normal((3, m, k), np.float32)
        y = rng.standard_normal((3, k, n), np.float32)
        check(compiled(batch=True)(x=x, y=y), x, y)


def test_the_error_is_that_of_vectors(rng: np.random.Generator) -> None:
    for depth in (64, 384, 1024):
        x, y = matrices(rng, 128, depth, 96)
        wanted = x.astype(float) @ y.astype(float)
        pieces, plain = compiled(depth)(x=x, y=y), vectors(compiled(depth), x, y)
        assert not np.array_equal(pieces, plain)  # tiles were used
        assert np.linalg.norm(pieces - wanted) <= 1.25 * np.linalg.norm(plain - wanted)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_side_of_high_pieces_alone(rng: np.random.Generator, side: str) -> None:
    """What comes of bf16, in all tiles, or in all but one, of which an element is not."""
    for m, k, n in ((16, 24, 16), (100, 70, 200), (300, 600, 97)):
        x, y = matrices(rng, m, k, n)
        short = [a for a, name in ((x, "left"), (y, "right")) if side in (name, "both")]
        for a in short:
            a[:] = a.astype(BF16.numpy)
        check(compiled()(x=x, y=y), x, y)
        for a in short:
            a[-1, -1] = 1 + UNIT * 2
        check(compiled()(x=x, y=y), x, y)


def test_the_same_bits_from_any_number_of_threads(rng: np.random.Generator) -> None:
    x, y = matrices(rng, 200, 384, 300)
    results = [compiled(384, threads=threads)(x=x, y=y) for threads in (1, 2, 3) for _ in range(3)]
    assert all(np.array_equal(r, results[0]) for r in results)


def test_memory_that_has_changed_since_the_last_call(rng: np.random.Generator) -> None:
    for threads in (1, 2):
        pipe = compiled(384, threads=threads)
        x, y = matrices(rng, 96, 384, 96)
        for _ in range(3):
            x[:] = rng.standard_normal(x.shape)
            y[:] = rng.standard_normal(y.shape)
            check(pipe(x=x, y=y), x, y)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(40, 7, 19), (64, 16, 30), (16, 3, 5), (70, 5, 64)])
def test_convolutions(rng: np.random.Generator, shape: tuple[int, int, int], stride: int) -> None:
    """Of images of some channels and size to some channels."""
    outer, inner, size = shape
    b = Builder(Facts())
    x = b.input("x", TensorType(F32, tuple(map(const, (2, inner, size, size)))))
    y = b.input("y", TensorType(F32, tuple(map(const, (outer, inner, 3, 3)))))
    across = (size - 3) // stride + 1
    domain = [2, outer, across, across, inner, 3, 3]
    left = b.view(x, domain, lambda n, o, i, j, c, u, v: [n, c, stride * i + u, stride * j + v])
    right = b.view(y, domain, lambda n, o, i, j, c, u, v: [o, c, u, v])
    pipe = native(graph_of(b, [b.reduce("sum", b.map("mul", left, right), [4, 5, 6])]), (), 2)
    image = rng.standard_normal((2, inner, size, size), np.float32)
    kernel = rng.standard_normal((outer, inner, 3, 3), np.float32)
    for _ in range(2):
        windows = sliding_window_view(image.astype(float), (3, 3), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        found, plain = np.asarray(pipe(x=image, y=kernel)), vectors(pipe, image, kernel)
        wanted = np.einsum("bcijuv,ocuv->boij", windows, kernel.astype(float))
        scale = np.einsum("bcijuv,ocuv->boij", np.abs(windows), np.abs(kernel).astype(float))
        assert np.all(np.abs(found - wanted) <= 6 * (9 * inner + 1) * UNIT * scale)
        assert np.linalg.norm(found - wanted) <= 1.5 * np.linalg.norm(plain - wanted)
        image[:] = rng.standard_normal(image.shape)


SPECIAL = [np.inf, -np.inf, np.nan, 3.4e38, -(2.0**126), 1e-45, -1e-39, 2.0**-126, 1e-20, 2.0**63]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("side", ["x", "y"])
@np.errstate(all="ignore")
def test_what_has_no_pieces(rng: np.random.Generator, value: float, side: str) -> None:
    """A row of a block or a column of a panel that is out of range is multiplied by vectors."""
    depth = 100
    x, y = matrices(rng, 80, depth, 100)
    (x if side == "x" else y)[37, 41] = value
    found, plain = compiled(depth)(x=x, y=y), vectors(compiled(depth), x, y)
    touched = (slice(32, 64), slice(None)) if side == "x" else (slice(None), slice(0, 48))
    assert np.array_equal(found[touched], plain[touched], equal_nan=True)
    others = np.ones(found.shape, bool)
    others[touched] = False
    assert np.isfinite(found[others]).all()
    if np.isfinite(value) and abs(value) < 1:
        check(found, x, y)


def test_products_below_the_normal_range() -> None:
    """They are kept, as f32 keeps them."""
    pipe = compiled(64)
    x, y = np.zeros((32, 64), np.float32), np.zeros((64, 48), np.float32)
    x[:, 3], y[3] = 3e-20, 7e-21
    assert np.array_equal(pipe(x=x, y=y), vectors(pipe, x, y))


def test_magnitudes_far_apart(rng: np.random.Generator) -> None:
    """Each element's error is small beside its own row and column."""
    x, y = matrices(rng, 64, 200, 64)
    x *= (2.0 ** rng.integers(-30, 30, (64, 1))).astype(np.float32)
    y *= (2.0 ** rng.integers(-8, 30, (1, 64))).astype(np.float32)
    check(compiled(200)(x=x, y=y), x, y)


def test_zeros_are_not_out_of_range(rng: np.random.Generator) -> None:
    x, y = matrices(rng, 64, 384, 96)
    x[x < 0] = 0
    pieces = compiled(384)(x=x, y=y)
    assert not np.array_equal(pieces, vectors(compiled(384), x, y))
    check(pieces, x, y)


@pytest.fixture(scope="module", params=[100, 2100])
def linear(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Array]:
    """x @ w for K x 150 weights, one of which is infinite."""
    k = request.param
    folder = tmp_path_factory.mktemp("linear")
    weights = np.random.default_rng(3).standard_normal((k, 150), np.float32)
    weights[7, 60] = np.inf
    np.savez(folder / "w.npz", w=weights)
    source = folder / "linear.pipe"
    source.write_text(f'weights w = "w.npz"\n\npipeline main(x: f32[M, {k}]):\n    x @ w.w\n')
    return driver.compile_file(source), weights


@pytest.mark.parametrize("rows", [0, 1, 33, 63, 64, 200])
@np.errstate(invalid="ignore")
def test_weights_are_cut_once(
    rng: np.random.Generator, linear: tuple[Plan, Array], rows: int
) -> None:
    plan, weights = linear
    pipe = CpuPipeline(plan)
    x = rng.standard_normal((rows, len(weights)), np.float32)
    found = np.asarray(pipe(x=x))
    finite = [c for c in range(150) if c != 60]
    check(found[:, finite], x, weights[:, finite])
    assert np.array_equal(found[:, 60], np.float32(np.inf) * np.sign(x[:, 7]))
    made = pipe._preparer._pieces
    assert made is not None and len(made.made) == (rows >= CUT_ROWS)


def test_weights_that_are_too_large_are_cut_in_each_call(
    rng: np.random.Generator,
    linear: tuple[Plan, Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rng.standard_normal((64, len(linear[1])), np.float32)
    found = np.asarray(CpuPipeline(linear[0])(x=x))
    monkeypatch.setattr(Pieces, "LARGEST", 0)
    other = CpuPipeline(linear[0], threads=2)
    # of the panel with the infinity (of 32 or 48 columns) more or less is multiplied by vectors
    plain = np.r_[0:32, 96:150]
    assert np.array_equal(np.asarray(other(x=x))[:, plain], found[:, plain])
    assert other._preparer._pieces is not None and not other._preparer._pieces.made


@pytest.mark.parametrize("columns", [16, 32, 48, 64])
def test_instructions_of_tiles_stand_apart(columns: int) -> None:
    text = pieces.tile_text(columns, False, "vectors")
    blocks = [part for part in text.split("\nr") if ".pair" in part.splitlines()[0]]
    assert len(blocks) == 7 * 2 * (1 if columns % 32 == 0 or columns < 32 else 2)
    for block in blocks:
        calls = re.findall(r"@llvm\.(x86\.t\w+|prefetch)", block)
        between = "".join("p" if c == "prefetch" else "t" for c in calls)
        assert re.fullmatch(f"(tp{{{pieces.APART}}})+", between)
