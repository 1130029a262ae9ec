"""Long and deep programs, and those that use values twice, compile in a time that grows as they."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf

X = np.array([0.5, -1.0, 2.0], np.float32)
LIMIT_S = 60.0
"""Of processor time: far above what these take, far below what an exponential would."""


def compiled(tmp_path: Path, signature: str, lines: list[str]) -> Any:
    path = tmp_path / "p.pipe"
    path.write_text(f"pipeline p({signature}):\n" + "".join(f"    {line}\n" for line in lines))
    start = time.process_time()
    pipe = sf.compile(path)
    assert time.process_time() - start < LIMIT_S
    return pipe


def test_a_chain_of_a_thousand_operations(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "x: f32[N]", ["for i in 0..1000:", "    x = x + 1.0", "x"])
    want = X
    for _ in range(1000):
        want = want + np.float32(1)
    np.testing.assert_array_equal(pipe(x=X), want)


def test_a_chain_in_which_every_value_is_used_twice(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "x: f32[N]", ["for i in 0..60:", "    x = x * sigmoid(x) + 0.1", "x"])
    want = X.astype(np.float64)
    for _ in range(60):
        want = want / (1 + np.exp(-want)) + 0.1
    np.testing.assert_allclose(pipe(x=X), want, rtol=1e-5)


def test_a_part_of_a_concatenation_in_which_every_value_is_used_twice(tmp_path: Path) -> None:
    lines = ["y = x", "for i in 0..25:", "    y = y * sigmoid(y) + 0.1", "concat([y, x])"]
    pipe = compiled(tmp_path, "x: f32[N]", lines)
    want = X.astype(np.float64)
    for _ in range(25):
        want = want / (1 + np.exp(-want)) + 0.1
    np.testing.assert_allclose(pipe(x=X), np.concatenate([want, X]), rtol=1e-5)


def test_positions_that_are_read_at_themselves(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "i: i64[N]", ["for n in 0..30:", "    i = i[i]", "i"])
    start = want = np.random.default_rng().permutation(7)
    for _ in range(30):
        want = want[want]
    np.testing.assert_array_equal(pipe(i=start), want, err_msg=str(start))


@pytest.mark.parametrize("parts", ["x, x", "x, x * 2.0"])
def test_concatenations_of_themselves(tmp_path: Path, parts: str) -> None:
    pipe = compiled(tmp_path, "x: f32[N]", ["for n in 0..12:", f"    x = concat([{parts}])", "x"])
    want = X
    for _ in range(12):
        want = np.concatenate([want, want * np.float32(2.0 if "*" in parts else 1.0)])
    np.testing.assert_array_equal(pipe(x=X), want)


def test_a_concatenation_of_many(tmp_path: Path) -> None:
    parts = ", ".join(f"x[{n % 3} :]" for n in range(200))
    pipe = compiled(tmp_path, "x: f32[3]", [f"concat([{parts}])"])
    want = np.concatenate([X[n % 3 :] for n in range(200)])
    np.testing.assert_array_equal(pipe(x=X), want)


def test_a_concatenation_of_a_hundred_of_any_size(tmp_path: Path) -> None:
    """They begin at sums of up to a hundred sizes, the last of which is the size of the result."""
    count, rng = 100, np.random.default_rng()
    names = [f"x{i}" for i in range(count)]
    signature = ", ".join(f"{name}: f32[N{i}]" for i, name in enumerate(names))
    total = " + ".join(f"N{i}" for i in range(count))
    ranges = ", ".join(f"N{i} in 0..=40" for i in range(count))
    path = tmp_path / "p.pipe"
    path.write_text(
        f"pipeline p({signature}) -> f32[{total}]\nwhere {ranges}:\n"
        f"    concat([{', '.join(names)}], axis=0)\n"
    )
    pipe = sf.compile(path)
    for most in (1, 41):
        given = {n: rng.normal(size=rng.integers(most)).astype(np.float32) for n in names}
        np.testing.assert_array_equal(pipe(**given), np.concatenate(list(given.values())))


def test_a_sum_of_a_thousand_operands_in_one_expression(tmp_path: Path) -> None:
    for op, want in (("+", 1001 * X), ("-", -999 * X)):
        pipe = compiled(tmp_path, "x: f32[N]", [f" {op} ".join(["x"] * 1001)])
        np.testing.assert_array_equal(pipe(x=X), want)
    text = " + ".join(["x[i]"] * 500)
    pipe = compiled(tmp_path, "x: f32[N]", [f"y[i] = {text}", "y"])
    np.testing.assert_array_equal(pipe(x=X), 500 * X)


def test_reshapes_of_transposes_of_reshapes(tmp_path: Path) -> None:
    lines = ["for n in 0..8:", "    x = reshape(transpose(x, [2, 0, 1]), [A, B, C])", "x"]
    pipe = compiled(tmp_path, "x: f32[A, B, C]", lines)
    x = want = np.random.default_rng().standard_normal((2, 3, 4), np.float32)
    for _ in range(8):
        want = want.transpose(2, 0, 1).reshape(2, 3, 4)
    np.testing.assert_array_equal(pipe(x=x), want)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_differences_of_neighbours_of_any_number(tmp_path: Path, n: int) -> None:
    pipe = compiled(tmp_path, "x: f32[N]", ["x[1:] - x[:-1], x[1:][1:]"])
    x = np.random.default_rng().standard_normal(n, np.float32)
    found = pipe(x=x)
    np.testing.assert_array_equal(found[0], x[1:] - x[:-1])
    np.testing.assert_array_equal(found[1], x[2:])


@pytest.mark.parametrize(
    ("shape", "of", "result", "product"),
    [
        ((40, 64), (64,), "[40]", "v @ x"),
        ((40, 3, 3, 3), (2, 3, 4, 4), "[2, 40, 2, 2]", "nn.convolve2d(x, v, 1, 1, 1)"),
    ],
)
def test_weights_of_weights_that_are_read_twice(
    tmp_path: Path, shape: tuple[int, ...], of: tuple[int, ...], result: str, product: str
) -> None:
    np.savez(tmp_path / "w.npz", w=np.ones(shape, np.float32))
    path = tmp_path / "p.pipe"
    path.write_text(f"""import nn
weights w = "w.npz"
pipeline p(x: f32{list(of)}) -> f32{result}:
    v = w.w
    for n in 0..40:
        v = v * 0.5 + v * v * 0.5
    {product}
""")
    found = sf.compile(path)(x=np.ones(of, np.float32))
    np.testing.assert_allclose(found, np.prod(shape[1:]), rtol=1e-5)
