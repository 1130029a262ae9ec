"""CUDA C++ on the tensor cores of sm_80 and sm_89, compiled by nvcc, against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from .fixtures import Array, close, fault, launch, product_error

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def tf32(x: Array) -> Array:
    """`x` with the 13 low bits dropped, as the tensor cores read it."""
    bits: Array = x.view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


@pytest.mark.parametrize(
    "name, ta, tb",
    [
        ("f16", np.float16, np.float16),
        ("bf16", BF16, BF16),
        ("tf32", np.float32, np.float32),
        ("e4m3", E4M3, E4M3),
        ("e5m2", E5M2, E4M3),
    ],
)
def test_mma(name: str, ta: type, tb: type, rng: np.random.Generator) -> None:
    k = 32 // np.dtype(ta).itemsize
    a, b = rng.uniform(-2, 2, (16, k)).astype(ta), rng.uniform(-2, 2, (8, k)).astype(tb)
    c = rng.uniform(-2, 2, (16, 8)).astype(np.float32)
    d = np.zeros_like(c)
    launch("tensor", f"mma_{name}", a, b, c, d, grid=1, block=32)
    wa, wb = (tf32(v) if name == "tf32" else v for v in (a, b))
    wa, wb = wa.astype(np.float64), wb.astype(np.float64).T
    close(d, wa @ wb + c, product_error(wa, wb) + 4 * 2.0**-23)


@pytest.mark.parametrize("name, ta", [("s8", np.int8), ("u8_s8", np.uint8)])
def test_mma_of_integers(name: str, ta: type, rng: np.random.Generator) -> None:
    low, high = np.iinfo(ta).min, np.iinfo(ta).max + 1
    a, b = (
        rng.integers(low, high, (16, 32)).astype(ta),
        rng.integers(-128, 128, (8, 32)).astype(np.int8),
    )
    c = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    d = np.zeros_like(c)
    launch("tensor", f"mma_{name}", a, b, c, d, grid=1, block=32)
    exact = a.astype(np.int64) @ b.astype(np.int64).T + c
    wrapped = exact.astype(np.int32) if name == "s8" else np.clip(exact, -(2**31), 2**31 - 1)
    assert np.array_equal(d, wrapped)


def test_mma_into_f16(rng: np.random.Generator) -> None:
    a, b, c = (rng.uniform(-1, 1, s).astype(np.float16) for s in ((16, 8), (8, 8), (16, 8)))
    d = np.zeros_like(c)
    launch("tensor", "mma_f16_f16", a, b, c, d, grid=1, block=32)
    expected = a.astype(np.float64) @ b.astype(np.float64).T + c
    close(d, expected, 9 * 2.0**-11 * 9)


def test_mma_of_f64(rng: np.random.Generator) -> None:
    a, b, c = (rng.uniform(-1, 1, s) for s in ((8, 4), (8, 4), (8, 8)))
    d = np.zeros_like(c)
    launch("tensor", "mma_f64", a, b, c, d, grid=1, block=32)
    close(d, a @ b.T + c, 10 * 2.0**-53 * 5)


def test_pipelined_product(rng: np.random.Generator) -> None:
    m, n, k = 128, 64, 96
    a, b = (rng.uniform(-1, 1, s).astype(BF16) for s in ((m, k), (k, n)))
    c = np.zeros((m, n), np.float32)
    args = (*np.int32([n, k]), a, b, c)
    launch("gemm_ampere", "gemm_bf16", *args, grid=(n // 64, m // 64, 1), block=128)
    wide = a.astype(np.float64), b.astype(np.float64)
    close(c, wide[0] @ wide[1], product_error(*wide))
    fault("race", "gemm_ampere.MISSING_SYNC", "gemm_bf16", *args, grid=(1, 1, 1), block=128)


@pytest.mark.parametrize("name, dtype", [("f16", np.float16), ("bf16", BF16), ("tf32", np.float32)])
def test_wmma(name: str, dtype: type, rng: np.random.Generator) -> None:
    a, b = (rng.uniform(-1, 1, (16, 32)).astype(dtype) for _ in range(2))
    c = np.zeros((16, 16), np.float32)
    launch("tensor", f"wmma_{name}", np.int32(32), a, b, c, grid=1, block=32)
    wa, wb = (tf32(v) if name == "tf32" else v for v in (a, b))
    wa, wb = wa.astype(np.float64), wb.astype(np.float64).T
    close(c, 2 * (wa @ wb), 2 * product_error(wa, wb))


def test_wmma_of_integers(rng: np.random.Generator) -> None:
    a, b = (rng.integers(-128, 128, (16, 32)).astype(np.int8) for _ in range(2))
    c = np.zeros((16, 16), np.int32)
    launch("tensor", "wmma_s8", np.int32(32), a, b, c, grid=1, block=32)
    assert np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)
