"""CUDA C++ that works element by element, compiled by nvcc, against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from .fixtures import Array, close, fault, launch

SAXPY = {
    "f": (np.float32, np.float32),
    "d": (np.float64, np.float64),
    "i": (np.int32, np.int32),
    "x": (np.int64, np.int64),
    "a": (np.int8, np.int8),
}


@pytest.mark.parametrize("code", SAXPY)
def test_saxpy(code: str, rng: np.random.Generator) -> None:
    dtype = SAXPY[code][0]
    n = int(rng.integers(1, 300))
    x, y = (rng.uniform(-100, 100, n).astype(dtype) for _ in range(2))
    a = dtype(3)
    expected = a * x.astype(np.float64) + y if np.dtype(dtype).kind == "f" else a * x + y
    launch(
        "elementwise",
        f"_Z5saxpyI{code}EviT_PKS0_PS0_",
        *(np.int32(n), a, x, y),
        grid=(n + 63) // 64,
        block=64,
    )
    if np.dtype(dtype).kind == "f":
        close(y, expected, np.finfo(dtype).eps * 800)
    else:
        assert np.array_equal(y, expected)


@pytest.mark.parametrize(
    "name, dtype", [("6__half", np.float16), ("13__nv_bfloat16", ml_dtypes.bfloat16)]
)
def test_saxpy_16_bits(name: str, dtype: type, rng: np.random.Generator) -> None:
    x, y = (rng.uniform(-4, 4, 70).astype(dtype) for _ in range(2))
    a = np.array(1.5, dtype)
    product = (a.astype(np.float64) * x.astype(np.float64)).astype(dtype).astype(np.float64)
    expected = product + y.astype(np.float64)
    launch(
        "elementwise",
        f"_Z5saxpyI{name}EviT_PKS1_PS1_",
        *(np.int32(70), a.tobytes(), x, y),
        grid=2,
        block=64,
    )
    # one rounding of a value below 10, and whether the product was rounded first (fused or not)
    unit = 2.0**-11 if dtype is np.float16 else 2.0**-8
    close(y, expected, 2 * 10 * unit)


def test_saxpy_reads_past_the_end(rng: np.random.Generator) -> None:
    x, y = (rng.uniform(-1, 1, 63).astype(np.float32) for _ in range(2))
    args = (np.int32(63), np.float32(2), x, y)
    fault(
        "out-of-bounds",
        "elementwise.OFF_BY_ONE",
        "_Z5saxpyIfEviT_PKS0_PS0_",
        *args,
        grid=1,
        block=64,
    )


def test_vectors_of_four(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, 4 * 50).astype(np.float32)
    y = np.zeros_like(x)
    launch("elementwise", "scale_vec4", np.int32(50), np.float32(2.5), x, y, grid=1, block=32)
    assert np.array_equal(y, x * np.float32(2.5))


def test_vector_that_is_not_aligned() -> None:
    x, y = np.ones(4 * 50 + 4, np.float32), np.zeros(4 * 50, np.float32)
    args = (np.int32(50), np.float32(2.5), x, y)
    fault("misaligned", "elementwise.MISALIGNED", "scale_vec4", *args, grid=1, block=32)


def test_structure_by_value(rng: np.random.Generator) -> None:
    x = rng.integers(-300, 300, 100).astype(np.int16)
    y = np.zeros(100, np.float32)
    packed = np.array([2.0, 0.5], np.float32).tobytes() + np.array([-100, 90], np.int16).tobytes()
    launch("elementwise", "affine_struct", np.int32(100), packed, x, y, grid=2, block=64)
    assert np.array_equal(
        y, np.clip(x, -100, 90).astype(np.float32) * np.float32(2) + np.float32(0.5)
    )


def erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.5, summed in float64; for |x| < 6."""
    total = term = x.copy()
    for n in range(1, 160):
        term = -term * x * x / n
        total = total + term / (2 * n + 1)
    return 2 / np.sqrt(np.pi) * total


def math_reference(v: Array) -> list[Array]:
    a = np.abs(v)
    return [
        np.exp(v),
        np.log(a),
        np.sin(v),
        np.cos(v),
        np.tanh(v),
        erf(v),
        np.sqrt(a),
        a**-0.5,
        1 / v,
        a**1.7,
    ]


def test_math_in_f32(rng: np.random.Generator) -> None:
    x = rng.uniform(-4, 4, 96).astype(np.float32)
    y = np.zeros((96, 14), np.float32)
    launch("math", "math_f32", np.int32(96), x, y, grid=1, block=96)
    v = x.astype(np.float64)
    rest = [np.floor(v), np.rint(v), np.fmod(v, 0.75)]
    last = np.exp(v) + v / 3 + np.trunc(v) + np.copysign(2, v) + np.maximum(v, 0.5)
    expected = np.stack([*math_reference(v), *rest, last], axis=1)
    # the CUDA guide's table: at most 4 ulp for these, 8 for pow; the fast exp of the last one more;
    # an ulp is at most 2**-23 of the value, and of 1 where cancellation makes it small
    close(y, expected, 10 * 2.0**-23 * np.maximum(np.abs(expected), 1))


def test_math_in_f64(rng: np.random.Generator) -> None:
    x = rng.uniform(-4, 4, 64)
    y = np.zeros((64, 12))
    launch("math", "math_f64", np.int32(64), x, y, grid=1, block=64)
    expected = np.stack([*math_reference(x), np.cbrt(x), x * x + np.floor(x)], axis=1)
    # 2 ulp by the same table; the alternating series for erf loses up to exp(x * x) < 1e7 ulp
    error = 4 * 2.0**-52 * np.maximum(np.abs(expected), 1)
    error[:, 5] = 1e-9
    close(y, expected, error)


def test_division_of_64_bits(rng: np.random.Generator) -> None:
    a = rng.integers(-(2**63), 2**63 - 1, 80)
    b = rng.integers(-(2**63), 2**63 - 1, 80) >> rng.integers(0, 62, 80)
    b[b == 0] = 7
    q, u = np.zeros((80, 2), np.int64), np.zeros((80, 4), np.uint64)
    launch("math", "divide_64", np.int32(80), a, b, q, u, grid=1, block=96)
    for i in range(80):
        x, y = int(a[i]), int(b[i])
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert [int(v) for v in q[i]] == [quotient, x - quotient * y]
        x, y = x % 2**64, y % 2**64
        low = ((x >> 7) & 0xFFFFFFFF) // 10
        assert [int(v) for v in u[i]] == [
            x // y,
            x % y,
            x * y >> 64,
            (x // 1000000007 + low) % 2**64,
        ]


def dot4(a: int, b: int) -> int:
    def part(x: int, shift: int) -> int:
        byte = x >> shift & 255
        return byte - 256 if byte > 127 else byte

    return sum(part(a, s) * part(b, s) for s in (0, 8, 16, 24))


def bits_reference(v: int, w: int, i: int) -> list[int]:
    sv, sw = (x - 2**32 if x >> 31 else x for x in (v, w))
    joined = v | w << 32
    vec = [v >> s & 255 for s in (0, 8, 16, 24)] + [w >> s & 255 for s in (0, 8, 16, 24)]
    total = joined.bit_count() + (64 - v.bit_length()) + (v << (w & 31))
    return [
        v.bit_count(),
        32 - v.bit_length(),
        int(f"{v:032b}"[::-1], 2),
        (v & -v).bit_length(),
        sum(vec[s] << 8 * k for k, s in enumerate((0, 4, 1, 5))),
        (joined << (v & 31)) >> 32,
        joined >> 7,
        (v & w) | (~v & 0x0F0F0F0F) ^ w,
        v >> 5 & 0x3FF,
        sv >> (w & 31),
        abs(sv - sw) + 3,
        v * w >> 32,
        sv * sw >> 32,
        dot4(v, w) + i,
        sum(min((v >> s & 255) + (w >> s & 255), 255) << s for s in (0, 8, 16, 24)),
        total,
    ]


def test_bit_tricks(rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, 64, dtype=np.uint32)
    x[:3] = 0, 1, 2**32 - 1
    y = np.zeros((64, 16), np.uint32)
    launch("math", "bits", np.int32(64), x, y, grid=1, block=64)
    for i in range(64):
        assert [int(v) for v in y[i]] == [
            v % 2**32 for v in bits_reference(int(x[i]), int(x[63 - i]), i)
        ], i


def test_conversions(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.uniform(-300, 300, 60), [0.5, 1.5, -0.5, 2.5]]).astype(np.float32)
    n = len(x)
    out = [np.zeros(n, d) for d in (np.uint8, np.int16, np.int32, np.int64, np.float64, np.float16)]
    half = np.zeros(n, ml_dtypes.bfloat16)
    launch("math", "convert", np.int32(n), x, *out, half, grid=1, block=64)
    assert np.array_equal(out[0], np.rint(np.clip(x, 0, 255)).astype(np.uint8))
    assert np.array_equal(out[1], np.trunc(x).astype(np.int16))
    assert np.array_equal(out[2], (np.floor(x) + 3 * np.ceil(x)).astype(np.int32))
    assert np.array_equal(out[3], (x * np.float32(2**32)).astype(np.int64))
    assert np.array_equal(out[4], x.astype(np.float64) + np.arange(n))
    assert np.array_equal(out[5], x.astype(np.float16))
    assert np.array_equal(half.view(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_packed_halves(rng: np.random.Generator) -> None:
    a, b = (rng.uniform(-2, 2, 64).astype(np.float16) for _ in range(2))
    # magnitudes within a factor of 16, so that c * d + c is exact in the f32 it is rounded from
    c, d = (
        (rng.uniform(0.25, 2, 64) * rng.choice([-1, 1], 64)).astype(ml_dtypes.bfloat16)
        for _ in range(2)
    )
    z, bz = np.zeros(64, np.float16), np.zeros(64, ml_dtypes.bfloat16)
    launch("math", "half_math", np.int32(32), a, b, z, c, d, bz, grid=1, block=32)
    wide = a.astype(np.float64) * b + (a + b).astype(np.float64)
    assert np.array_equal(z, np.maximum(wide.astype(np.float16), a * np.float16(0.5)))
    c64, d64 = c.astype(np.float64), d.astype(np.float64)
    fused = (c64 * d64 + c64).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.array_equal(bz.astype(np.float64), np.minimum(fused, np.maximum(c64, d64)))
