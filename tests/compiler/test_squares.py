"""Pointwise kernels that read across the rows they write: by squares, of any sizes."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import stagefuse
from stagefuse.compiler.cpu.turns import turn_of
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import For, Index, Load, Store
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import DTYPES, F16, F32, DType
from stagefuse.runtime import native
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS

SIDES = [(1, 1), (1, 200), (16, 16), (12, 10), (15, 300), (63, 65), (64, 64), (129, 190), (0, 5)]
SOURCE = """
pipeline turned(x: {0}[M, N], y: {0}[N, M]) -> {0}[N, M]:
    maximum(transpose(x, [1, 0]), y)
"""


@pytest.mark.parametrize("name", ["f64", "f32", "f16", "i64", "u8", "bool"])
def test_matrices(rng: np.random.Generator, name: str) -> None:
    pipe = stagefuse.compile(SOURCE.format(name), threads=2)
    for m, n in SIDES:
        x, y = (rng.integers(0, 100, s).astype(DTYPES[name].numpy) for s in ((m, n), (n, m)))
        np.testing.assert_array_equal(pipe(x=x, y=y), np.maximum(x.T, y))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_any_order_of_axes(rng: np.random.Generator, order: tuple[int, ...]) -> None:
    """With what is the same along an axis, or read another way too."""
    x, y = (rng.integers(-99, 99, (70, 33, 20)).astype(np.float32) for _ in range(2))
    b = rng.integers(-99, 99, (33, 1)).astype(np.float32)
    shape = ", ".join(str(x.shape[a]) for a in order)
    source = (
        f"pipeline p(x: f32[70, 33, 20], y: f32[70, 33, 20], b: f32[33, 1]) -> f32[{shape}]:\n"
        f"    transpose(x * b - y, {list(order)}) * 2.0 + transpose(x[:, ::-1], {list(order)})\n"
    )
    wanted = (x * b - y).transpose(order) * np.float32(2) + x[:, ::-1].transpose(order)
    found = stagefuse.compile(source)(x=x, y=y, b=b)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["f64", "f32", "i64", "i32"])
def test_matrices_of_known_sizes_are_turned_in_registers(
    rng: np.random.Generator, name: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "detect_level", lambda cpuinfo=None: level)
    sides = [(16, 16), (33, 70), (129, 66), (15, 200), (250, 17), (9, 14), (47, 29)]
    inputs = ", ".join(f"x{n}: {name}[2, {a}, {b}]" for n, (a, b) in enumerate(sides))
    results = ", ".join(f"y{n}: {name}[2, {b}, {a}]" for n, (a, b) in enumerate(sides))
    values = ", ".join(f"transpose(x{n}, [0, 2, 1])" for n in range(len(sides)))
    pipe = stagefuse.compile(f"pipeline p({inputs}) -> ({results}):\n    {values}\n", threads=2)
    dtype = DTYPES[name].numpy
    given = {f"x{n}": rng.integers(-99, 99, (2, *s)).astype(dtype) for n, s in enumerate(sides)}
    for x, y in zip(given.values(), pipe(**given), strict=True):
        np.testing.assert_array_equal(y, x.swapaxes(1, 2))


def test_what_is_a_turn() -> None:
    def copy(read: tuple[str, str], written: tuple[str, str], dtype: DType) -> For:
        load = Load("x", tuple(Index(sym(i)) for i in read), dtype)
        store = Store("y", tuple(Index(sym(i)) for i in written), load)
        return For("r", const(0), const(9), (For("c", const(0), const(9), (store,), True),))

    shapes = {"x": (const(9), const(9)), "y": (const(9), const(9))}
    assert turn_of(copy(("c", "r"), ("r", "c"), F32), shapes) is not None
    assert turn_of(copy(("r", "c"), ("c", "r"), F32), shapes) is not None
    assert turn_of(copy(("r", "c"), ("r", "c"), F32), shapes) is None
    assert turn_of(copy(("c", "c"), ("r", "c"), F32), shapes) is None
    assert turn_of(copy(("c", "r"), ("r", "c"), F16), shapes) is None


@pytest.mark.parametrize("level", LEVELS)
def test_a_few_elements_of_a_row_are_taken_together(
    rng: np.random.Generator, level: str, tmp_path: Path
) -> None:
    """Two to four elements of a row that are read or written along another axis, with what is the
    same for all."""
    path = tmp_path / "p.pipe"
    path.write_text(
        """
pipeline p(x: f32[B, 3, H, W], b: f32[3], y: u8[2, N], z: f64[4, B, N], s: f64[B, N, 4],
           o: f32[3, N], c: u8[B, H, W, 3], q: f64[N, 4]):
    image = u8(clamp(transpose(x, [0, 2, 3, 1]) * 99.5 + b, 0.0, 255.0))
    pairs = transpose(y, [1, 0])
    sums = transpose(z, [1, 2, 0]) + s
    joined = concat([transpose(o, [1, 0]), f32(transpose(y[:1], [1, 0]))], axis=1)
    planes = f32(transpose(c, [0, 3, 1, 2])) - b[:, None, None]
    image, pairs, sums, joined, planes, transpose(q, [1, 0])
"""
    )
    pipe = CpuPipeline(compile_file(path, levels=(level,)), threads=2)
    for batch, high, wide, many in (
        (1, 1, 1, 1),
        (2, 7, 31, 64),
        (1, 13, 224, 20011),
        (3, 0, 5, 0),
    ):
        x, o = (rng.random(s).astype(np.float32) for s in ((batch, 3, high, wide), (3, many)))
        z, s = rng.random((4, batch, many)), rng.random((batch, many, 4))
        b, y = rng.random(3).astype(np.float32), rng.integers(0, 255, (2, many)).astype(np.uint8)
        c = rng.integers(0, 255, (batch, high, wide, 3)).astype(np.uint8)
        given = {"x": x, "b": b, "y": y, "z": z, "s": s, "o": o, "c": c, "q": rng.random((many, 4))}
        image, pairs, sums, joined, planes, turned = pipe(**given)
        exact = x.transpose(0, 2, 3, 1).astype(np.float64) * 99.5 + b
        assert np.all(abs(image - np.floor(exact)) <= (abs(exact - np.round(exact)) < 1e-4))
        np.testing.assert_array_equal(pairs, y.T)
        np.testing.assert_array_equal(sums, z.transpose(1, 2, 0) + s)
        np.testing.assert_array_equal(joined, np.concatenate([o.T, y[:1].T], axis=1))
        np.testing.assert_array_equal(planes, c.transpose(0, 3, 1, 2) - b[:, None, None])
        np.testing.assert_array_equal(turned, given["q"].T)
