"""What is computed while compiling, and what must not be: values that sizes decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.driver import compile_file
from stagefuse.dsl.dtypes import DTYPES

SOURCE = """
weights w = "w.npz"

pipeline p(x: f32[N, 4]) -> (f32[4], f32[8], i64[3], f32[4])
where N in 3..=8:
    at = iota(3) - 2
    w.table[N - 1], w.row[N - 3 : N + 5], select(at < 0, at + N, at), w.table[2] * 2.0
"""


def test_parts_of_weights_at_places_that_a_size_decides() -> None:
    rng = np.random.default_rng(1)
    table, row = rng.standard_normal((8, 4)), rng.standard_normal(13)
    weights = {"table": table.astype(np.float32), "row": row.astype(np.float32)}
    pipe = sf.compile(SOURCE, weights={"w": weights})
    for n in (3, 5, 8):
        last, part, at, twice = pipe(x=np.zeros((n, 4), np.float32))
        np.testing.assert_array_equal(last, weights["table"][n - 1])
        np.testing.assert_array_equal(part, weights["row"][n - 3 : n + 5])
        np.testing.assert_array_equal(at, [n - 2, n - 1, 0])
        np.testing.assert_array_equal(twice, 2 * weights["table"][2])


def test_constants_of_equal_bytes_are_told_apart_by_their_dtype() -> None:
    """Zeros of f32 and of i32, of which neither is written in the source."""
    text = """
weights w = "w.npz"

pipeline p(x: f32[N, 4], n: i32[N, 4]) -> (f32[N, 4], i32[N, 4])
where N >= 1:
    x + f32(w.zero), n - i32(w.zero)
"""
    pipe = sf.compile(text, weights={"w": {"zero": np.zeros(4, np.uint8)}})
    x, n = np.ones((2, 4), np.float32), np.full((2, 4), 5, np.int32)
    found, whole = pipe(x=x, n=n)
    np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(whole, n)


def test_a_table_that_is_a_matrix_too_is_stored_once(tmp_path: Path) -> None:
    """Tied embeddings: rows of tokens, and the scores of every token."""
    path = tmp_path / "tied.pipe"
    path.write_text("""
weights w = "tied.npz"

pipeline p(ids: i64[T]) -> f32[1, 300]
where T in 1..=8:
    x = w.table[ids]
    x[T - 1:] @ transpose(w.table)
""")
    table = np.random.default_rng(1).standard_normal((300, 16), np.float32)
    np.savez(tmp_path / "tied.npz", table=table)
    plan = compile_file(path, targets=("cpu", "h200"))
    assert list(plan.arrays) == ["w/table"]
    exact = table.astype(np.float64)
    for device in ("cpu", "emulator"):
        with sf.compile(path, device=device) as pipe:
            found = pipe(ids=np.array([3, 299]))
        largest = 16 * np.abs(exact).max() ** 2  # of a sum of 16 terms, each rounded
        tolerance = 16 * largest * np.finfo(np.float32).eps
        np.testing.assert_allclose(found[0], exact @ exact[299], rtol=0, atol=tolerance)


def test_what_is_repeated_is_stored_once(tmp_path: Path, rng: np.random.Generator) -> None:
    """A bias and a scale of channels, at each of their places; and sums of weights before them."""
    path = tmp_path / "repeated.pipe"
    path.write_text("""
weights w = "repeated.npz"

pipeline p(x: f32[1, 32, 5, 7]) -> f32[1, 32, 5, 7]:
    scale = w.scale[:, None, None] * (w.gain / 2.0)
    x * scale + w.bias[:, None, None] + sum(f32(w.codes), axis=1)[:, None, None]
""")
    arrays = {
        "scale": rng.standard_normal(32, np.float32),
        "gain": np.float32(1.5),
        "bias": rng.standard_normal(32, np.float32),
        "codes": rng.integers(-9, 9, (32, 700)).astype(np.int8),
    }
    np.savez(tmp_path / "repeated.npz", **arrays)
    plan = compile_file(path, targets=("cpu", "h200"))
    assert sum(array.size for array in plan.arrays.values()) <= 3 * 32
    x = rng.standard_normal((1, 32, 5, 7), np.float32)
    scale = arrays["scale"] * np.float32(0.75)  # exact, but for one rounding
    parts = [arrays["bias"].astype(float), arrays["codes"].sum(1, dtype=np.int64)]
    terms = [x.astype(float) * scale[:, None, None], *(p[:, None, None] for p in parts)]
    exact, size = sum(terms), sum(np.abs(t) for t in terms)
    for device in ("cpu", "emulator"):
        with sf.compile(path, device=device) as pipe:
            assert np.all(np.abs(pipe(x=x) - exact) <= 4 * 2.0**-24 * size)


@pytest.mark.parametrize("name", ["bool", "f8e4m3", "f8e5m2", "bf16", "f16", "f32", "i64", "u16"])
def test_views_of_weights_of_every_width(name: str, rng: np.random.Generator) -> None:
    text = f"""
weights w = "w.npz"

pipeline p(n: i64) -> ({name}[6, 4], {name}[8, 4]):
    transpose(w.a[::2, ::-1]), broadcast_to(w.a[3, 1:5], [8, 4])
"""
    a = rng.integers(0, 2 if name == "bool" else 9, (8, 6)).astype(DTYPES[name].numpy)
    whole, row = sf.compile(text, weights={"w": {"a": a}})(n=np.int64(0))
    np.testing.assert_array_equal(whole.view(np.uint8), a[::2, ::-1].T.copy().view(np.uint8))
    wanted = np.tile(a[3, 1:5], (8, 1))
    np.testing.assert_array_equal(row.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_sums_of_constant_products_round_once(dtype: str, rng: np.random.Generator) -> None:
    """As kernels sum them: a product that is rounded first would lose as much as the sum is."""
    stored = DTYPES[dtype].numpy
    w, v = (rng.standard_normal((7, 64)).astype(stored) for _ in range(2))
    text = f"""
weights w = "w.npz"

pipeline p(x: {dtype}[1]) -> {dtype}[7]:
    sum(w.w * w.v, axis=1) + x
"""
    pipe = sf.compile(text, weights={"w": {"w": w, "v": v}})
    found = pipe(x=np.zeros(1, stored)).astype(np.float64)
    products = w.astype(np.float64) * v.astype(np.float64)
    lost = float(np.finfo(np.float32).eps) * 64 * np.abs(products).sum(1)
    unit = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24}[dtype]
    wanted = products.sum(1)
    assert np.all(np.abs(found - wanted) <= lost + unit * np.abs(wanted))


def test_an_item_of_a_weight_that_is_not_there_is_reported_by_a_call() -> None:
    text = """
weights w = "w.npz"

pipeline p(x: f32[N, 3]) -> (f32[N, 3], f32[3])
where N in 1..=4:
    x + (w.table[w.at] * 2)[1], w.table[w.well[0]] * 2
"""
    weights = {
        "table": np.ones((4, 3), np.float32), "at": np.array([1, 9]), "well": np.array([3]),
    }  # fmt: skip
    pipe = sf.compile(text, weights={"w": weights})
    with pytest.raises(sf.IndexOutOfRange, match="it is 9, the axis has size 4"):
        pipe(x=np.zeros((2, 3), np.float32))
