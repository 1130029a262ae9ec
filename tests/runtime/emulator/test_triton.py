"""Triton's PTX for sm_80, sm_89 and sm_90a, against NumPy."""

import re

import ml_dtypes
import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import HERE, Array, close, launch, product_error

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SCRATCH = (np.uint64(0), np.uint64(0))


def run(name: str, arch: str, *args: object, grid: int | tuple[int, int, int], shared: int) -> None:
    launch(
        f"triton.{name}.{arch}",
        name.split(".")[0],
        *args,
        *SCRATCH,
        grid=grid,
        block=128,
        shared_bytes=shared,
    )


def test_vector_add(rng: np.random.Generator) -> None:
    x, y = (rng.uniform(-1, 1, 700).astype(np.float32) for _ in range(2))
    z = np.zeros_like(x)
    run("vector_add", "sm_80", x, y, z, np.int32(700), grid=2, shared=0)
    assert np.array_equal(z, x + y)


def test_softmax(rng: np.random.Generator) -> None:
    x = rng.uniform(-5, 5, (3, 300)).astype(np.float32)
    y = np.zeros_like(x)
    run("softmax", "sm_80", x, y, np.int32(300), grid=3, shared=16)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    # the exponent's argument is up to 10 and carries 10 ulp; approximate exp2 and division add 4
    close(y, e / e.sum(1, keepdims=True), 300 * 2.0**-23)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_layer_norm(arch: str, rng: np.random.Generator) -> None:
    x = rng.uniform(-2, 2, (2, 200)).astype(BF16)
    gain, bias = (rng.uniform(-1, 1, 200).astype(np.float32) for _ in range(2))
    y = np.zeros_like(x)
    args = (x, gain, bias, y, np.int32(200), np.float32(1e-5))
    run("layer_norm", arch, *args, grid=2, shared=1024)
    wide = x.astype(np.float64)
    d = wide - wide.mean(1, keepdims=True)
    expected = d / np.sqrt((d * d).mean(1, keepdims=True) + 1e-5) * gain + bias
    close(y, expected, 2.0**-8 * np.abs(expected) + 200 * 4 * 2.0**-24)


def test_sum_of_gelu(rng: np.random.Generator) -> None:
    x = rng.uniform(-3, 3, 400).astype(np.float32)
    out = np.zeros(1, np.float32)
    run("gelu_sum", "sm_80", x, out, np.int32(400), grid=2, shared=16)
    from math import erf

    expected = sum(0.5 * v * (1 + erf(v / 2**0.5)) for v in x.astype(np.float64))
    close(out, np.array([expected]), 400 * 2.0**-24 * 2 * np.abs(x).sum())


def test_scan_and_sort(rng: np.random.Generator) -> None:
    x = rng.integers(-1000, 1000, 128).astype(np.int32)
    y, z = np.zeros_like(x), np.zeros_like(x)
    run("scan_sort", "sm_80", x, y, z, grid=1, shared=512)
    assert np.array_equal(y, np.cumsum(x)) and np.array_equal(z, np.sort(x))


def round_tf32(x: Array) -> Array:
    """The nearest of both ways that an f32 becomes a tf32 may be half a unit of 2**-11 away."""
    bits: Array = x.view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


MATMULS = [
    ("matmul", "sm_80", BF16, 64, 8192 * 3),
    ("matmul", "sm_90a", BF16, 64, 16384 * 2),
    ("matmul_tf32", "sm_80", np.float32, 32, 12288 * 2),
    ("matmul_tf32", "sm_90a", np.float32, 32, 24576 * 2),
    ("matmul_f8", "sm_89", E4M3, 64, 8192 * 2),
    ("matmul_f8", "sm_90a", E4M3, 64, 16384 * 2),
]


@pytest.mark.parametrize("name, arch, dtype, bn, shared", MATMULS)
def test_matmul(
    name: str, arch: str, dtype: type, bn: int, shared: int, rng: np.random.Generator
) -> None:
    m, n, k = 80, 48, 112
    a, b = (rng.uniform(-1, 1, s).astype(dtype) for s in ((m, k), (k, n)))
    c = np.zeros((m, n), np.float32)
    grid = ((m + 63) // 64, (n + bn - 1) // bn, 1)
    args = (a, b, c, *np.int32([m, n, k, k, n, n]), *SCRATCH)
    launch(f"triton.{name}.{arch}", "matmul", *args, grid=grid, block=128, shared_bytes=shared)
    wide = a.astype(np.float64), b.astype(np.float64)
    # tf32 drops up to 2**-10 of each factor; tensor cores keep some 13 bits of sums of f8, which
    # are rounded at each of four steps of the depth
    units = {np.float32: 2.0**-10 / k, E4M3: 4 * 2.0**-13 / k}
    close(c, wide[0] @ wide[1], product_error(*wide, unit=units.get(dtype, 2.0**-24)))


def test_matmul_with_tensor_maps(rng: np.random.Generator) -> None:
    m, n, k = 128, 64, 192
    a, b = (rng.uniform(-1, 1, s).astype(np.float16) for s in ((m, k), (n, k)))
    c = np.zeros((m, n), np.float16)
    args: list[object] = []
    for x in (a, b, c):
        args += [emulator.TensorMap(x, box=(64, 64), swizzle=128), *np.int32(x.shape)]
        args += [np.int64(x.shape[1]), np.int64(1)]
    grid = (m // 64, n // 64, 1)
    run("matmul_tma", "sm_90a", *args, np.int32(k), grid=grid, shared=49176)
    wide = a.astype(np.float64), b.astype(np.float64).T
    expected = wide[0] @ wide[1]
    close(c, expected, product_error(*wide) + 2.0**-11 * np.abs(expected))


@pytest.mark.parametrize("arch, shared", [("sm_80", 16384), ("sm_90a", 24576)])
def test_attention(arch: str, shared: int, rng: np.random.Generator) -> None:
    heads, length = 2, 80
    q, k, v = (rng.uniform(-1, 1, (heads, length, 64)).astype(np.float16) for _ in range(3))
    o = np.zeros_like(q)
    scale = np.float32(0.125 * np.log2(np.e))
    args = (q, k, v, o, np.int32(length), scale)
    run("attention", arch, *args, grid=(2, heads, 1), shared=shared)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    p = np.exp2(wide[0] @ wide[1].transpose(0, 2, 1) * scale)
    expected = p / p.sum(2, keepdims=True) @ wide[2]
    # probabilities are rounded to f16, the values are at most 1, and so is the f16 result
    close(o, expected, 3 * 2.0**-11)


def test_persistent_matmul_that_makes_its_tensor_maps(rng: np.random.Generator) -> None:
    m, n, k = 256, 128, 128
    a, b = (rng.uniform(-1, 1, s).astype(np.float16) for s in ((m, k), (n, k)))
    c = np.zeros((m, n), np.float16)
    scratch = np.zeros((3, 4, 128), np.uint8)
    launch(
        "triton.matmul_own_maps.sm_90a",
        "matmul_own_maps",
        *(a, b, c, *np.int32([m, n, k]), scratch, np.uint64(0)),
        **{"grid": 3, "block": 384, "shared_bytes": 90712},
    )
    wide = a.astype(np.float64), b.astype(np.float64).T
    expected = wide[0] @ wide[1]
    close(c, expected, product_error(*wide) + 2.0**-11 * np.abs(expected))


@pytest.mark.parametrize("which", [0, 2])
def test_a_changed_tensor_map_that_is_not_acquired(which: int) -> None:
    text = (HERE / "triton.matmul_own_maps.sm_90a.ptx").read_text()
    fences = re.findall(r".*fence\.proxy\.tensormap::generic\.acquire.*\n", text)
    a, b = np.ones((128, 64), np.float16), np.ones((64, 64), np.float16)
    args = (a, b, np.zeros((128, 64), np.float16), *np.int32([128, 64, 64]))
    scratch = np.zeros((4, 128), np.uint8), np.uint64(0)
    module = emulator.load(text.replace(fences[which], "\n", 1))
    sizes = {"grid": 1, "block": 384, "shared_bytes": 90712}
    missing = "no `fence.proxy.tensormap::generic.acquire`"
    with pytest.raises(emulator.Fault, match=missing) as found:
        module.launch("matmul_own_maps", args=[*args, *scratch], **sizes)
    assert found.value.kind == "race"


def test_matmul_over_a_cluster(rng: np.random.Generator) -> None:
    m, n, k = 128, 128, 160
    a, b = (rng.uniform(-1, 1, s).astype(BF16) for s in ((m, k), (k, n)))
    c = np.zeros((m, n), np.float32)
    args = (a, b, c, *np.int32([m, n, k, k, n, n]), *SCRATCH)
    sizes = {"grid": 2, "block": 128, "cluster": 2, "shared_bytes": 4 * 24576}
    launch("triton.matmul_cluster.sm_90a", "matmul", *args, **sizes)
    wide = a.astype(np.float64), b.astype(np.float64)
    close(c, wide[0] @ wide[1], product_error(*wide))


def test_attention_of_specialised_warps(rng: np.random.Generator) -> None:
    length = 256
    q, k, v = (rng.uniform(-1, 1, (length, 64)).astype(np.float16) for _ in range(3))
    o = np.zeros_like(q)
    scale = np.float32(0.125 * np.log2(np.e))
    args = (q, k, v, o, np.int32(length), scale, np.zeros((2, 640), np.uint8), np.uint64(0))
    sizes = {"grid": 2, "block": 384, "shared_bytes": 66040}
    launch("triton.attention_specialised.sm_90a", "attention_specialised", *args, **sizes)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    p = np.exp2(wide[0] @ wide[1].T * scale)
    close(o, p / p.sum(1, keepdims=True) @ wide[2], 3 * 2.0**-11)
