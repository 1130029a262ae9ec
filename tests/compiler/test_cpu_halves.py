"""Products of what was bf16 by dot products of pairs: as right as those of vectors of f32."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.plan import UNITS
from stagefuse.dsl.dims import const
from stagefuse.dsl.dtypes import BF16, F32
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.native import detect_level, units

from .graph_run import graph_of, native
from .test_cpu_pieces import UNIT, Array, compiled, matrices, narrow

pytestmark = pytest.mark.skipif(
    detect_level() != "v4" or not units() & UNITS["halves"], reason="needs AVX512-BF16"
)
__all__ = ["narrow"]  # a fixture of every test here
ODD = np.float32(1 + UNIT * 2)
"""What bf16 does not hold."""


def by(pipe: CpuPipeline, unit: str, x: Array, y: Array) -> Array:
    """What the pipeline gives with one unit alone, or none."""
    assert pipe._code is not None
    pipe._code._object.use_units(UNITS.get(unit, 0))
    try:
        return np.asarray(pipe(x=x, y=y))
    finally:
        pipe._code._object.use_units(units())


def halves(rng: np.random.Generator, m: int, k: int, n: int) -> tuple[Array, Array]:
    """Matrices of f32 whose numbers bf16 holds."""
    x, y = (a.astype(BF16.numpy).astype(np.float32) for a in matrices(rng, m, k, n))
    return x, y


def check(found: Array, x: Array, y: Array) -> None:
    """Products are exact, and each is added once, which rounds once."""
    wanted = x.astype(float) @ y.astype(float)
    scale = np.abs(x).astype(float) @ np.abs(y).astype(float)
    assert np.all(np.abs(found - wanted) <= (x.shape[-1] + 1) * UNIT * scale)


@pytest.mark.parametrize("k", [24, 31, 33, 100, 1000])
def test_every_shape_of_a_tile(rng: np.random.Generator, k: int) -> None:
    for m, n in ((64, 16), (65, 17), (81, 100), (95, 64), (79, 1), (112, 33)):
        x, y = halves(rng, m, k, n)
        check(by(compiled(), "halves", x, y), x, y)


def test_dot_products_are_used_and_their_error_is_that_of_vectors(
    rng: np.random.Generator,
) -> None:
    for k in (64, 500, 2000):
        x, y = halves(rng, 128, k, 200)
        found, plain = (by(compiled(), unit, x, y) for unit in ("halves", ""))
        assert not np.array_equal(found, plain)
        wanted = x.astype(float) @ y.astype(float)
        assert np.linalg.norm(found - wanted) <= 1.25 * np.linalg.norm(plain - wanted)


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize(
    "value", [np.inf, -np.inf, np.nan, 2.0**126, 2.0**-140, 2.0**-126, 2.0**-66, 2.0**63, ODD]
)
@np.errstate(all="ignore")
def test_other_numbers_are_multiplied_by_vectors(
    rng: np.random.Generator, value: float, side: str
) -> None:
    """As are those in the same rows of a block, or columns of a panel; wherever it lies."""
    for first in (False, True):
        x, y = halves(rng, 80, 100, 100)
        (x if side == "x" else y)[(0, 0) if first else (37, 41)] = value
        found, plain = (by(compiled(), unit, x, y) for unit in ("halves", ""))
        rows = slice(0, 32) if first else slice(32, 64)
        touched = (rows, slice(None)) if side == "x" else (slice(None), slice(0, 48))
        assert np.array_equal(found[touched], plain[touched], equal_nan=True)
        if np.isfinite(value) and abs(value) < 2:
            check(found, x, y)


def test_numbers_of_f32_are_multiplied_as_without(rng: np.random.Generator) -> None:
    x, y = matrices(rng, 100, 300, 100)
    assert np.array_equal(*(by(compiled(), unit, x, y) for unit in ("halves", "")))
    x[:] = x.astype(BF16.numpy)
    assert np.array_equal(*(by(compiled(), unit, x, y) for unit in ("halves", "")))


def test_products_far_below_one_are_not_lost(rng: np.random.Generator) -> None:
    """Sums that cancel to the smallest that there are, and the smallest products."""
    x, y = halves(rng, 64, 64, 64)
    x *= np.float32(2.0**-57)
    y *= np.float32(2.0**-33)
    x[np.abs(x) < 2.0**-62] = 0
    y[np.abs(y) < 2.0**-40] = 0
    x[:, 1], y[1] = -x[:, 0], y[0]  # the others stay
    found, plain = (by(compiled(), unit, x, y) for unit in ("halves", ""))
    assert not np.array_equal(found, plain)
    check(found, x, y)


@pytest.mark.parametrize("m, k, n", [(16, 100, 200), (41, 1100, 250), (300, 530, 193)])
def test_bf16_of_known_sizes_is_converted_as_it_is_packed(
    rng: np.random.Generator, m: int, k: int, n: int
) -> None:
    """In stretches of a depth too, and with few rows."""
    b = Builder(Facts())
    x = b.input("x", TensorType(BF16, (const(m), const(k))))
    y = b.input("y", TensorType(BF16, (const(k), const(n))))
    left = b.view(b.cast(x, F32), [m, n, k], lambda i, j, d: [i, d])
    right = b.view(b.cast(y, F32), [m, n, k], lambda i, j, d: [d, j])
    pipe = native(graph_of(b, [b.reduce("sum", b.map("mul", left, right), [2])]), ())
    one, other = (a.astype(BF16.numpy) for a in matrices(rng, m, k, n))
    found, plain = (by(pipe, unit, one, other) for unit in ("halves", ""))
    assert not np.array_equal(found, plain)
    for result in (found, plain):
        check(result, one.astype(np.float32), other.astype(np.float32))


def test_bf16_with_any_number_of_threads(rng: np.random.Generator) -> None:
    """The same bits, and right to the rounding of the result."""
    b = Builder(Facts())
    m, k, n = 200, 300, 450
    x = b.input("x", TensorType(BF16, (const(m), const(k))))
    y = b.input("y", TensorType(BF16, (const(k), const(n))))
    left = b.view(x, [m, n, k], lambda i, j, d: [i, d])
    right = b.view(y, [m, n, k], lambda i, j, d: [d, j])
    graph = graph_of(b, [b.reduce("sum", b.map("mul", left, right), [2])])
    one, other = (a.astype(BF16.numpy) for a in matrices(rng, m, k, n))
    results = [native(graph, (), threads)(x=one, y=other) for threads in (1, 3)]
    assert np.array_equal(*(np.asarray(r) for r in results))
    found = np.asarray(results[0]).astype(float)
    wanted = one.astype(float) @ other.astype(float)
    scale = np.abs(one).astype(float) @ np.abs(other).astype(float)
    assert np.all(np.abs(found - wanted) <= 2.0**-8 * np.abs(wanted) + (k + 2) * UNIT * scale)
