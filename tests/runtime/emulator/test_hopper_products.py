"""wgmma: single instructions of every type and layout, a pipelined product, attention."""

import ml_dtypes
import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import HERE, Array, close, fault, launch, product_error
from .test_hopper_copies import swizzled

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
CODES = {0: 0, 128: 1, 64: 2, 32: 3}


def k_major(x: Array, swizzle: int, at: int) -> tuple[Array, int]:
    """An operand [rows][K] of 32 bytes of K, laid out K-major, and its descriptor at byte `at`.

    PTX ISA, asynchronous warpgroup-level matrix shared memory layout: with a swizzle, rows of
    `swizzle` bytes (the K used here is the first 32 of them) in groups of 8; without, matrices of
    8 rows by 16 bytes.
    """
    data = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), 32)
    if swizzle:
        rows = np.zeros((len(x), swizzle), np.uint8)
        rows[:, :32] = data
        image, leading, stride = swizzled(rows, swizzle), 16, 8 * swizzle
    else:
        image = data.reshape(len(x) // 8, 8, 2, 16).transpose(2, 0, 1, 3).reshape(-1)
        leading, stride = len(x) * 16, 128
    descriptor = at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | CODES[swizzle] << 62
    return image, descriptor


def mn_major(x: Array, swizzle: int, at: int) -> tuple[Array, int]:
    """An operand [rows][K] of 2-byte elements, K of 16, laid out with its rows contiguous."""
    data = np.ascontiguousarray(x.T).view(np.uint8)
    data = data.reshape(16, -1)
    if swizzle:
        # panels of `swizzle` bytes along the rows; each 16 lines of K, in two groups of 8
        panels = data.reshape(16, -1, swizzle).transpose(1, 0, 2)
        image, leading, stride = swizzled(panels, swizzle), 16 * swizzle, 8 * swizzle
    else:
        # 8 lines of 16 bytes each; the next along K first, then along the rows
        image = data.reshape(2, 8, -1, 16).transpose(2, 0, 1, 3).reshape(-1)
        leading, stride = 128, 256
    descriptor = at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | CODES[swizzle] << 62
    return image, descriptor


def aligned(image: Array) -> Array:
    return np.pad(image, (0, -image.size % 1024))


def accumulators(out: Array, n: int) -> Array:
    """D[64][n] of what each thread holds: out[128][n / 2] (PTX ISA, fragment D of m64nNk16)."""
    t, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    d = np.zeros((64, n), out.dtype)
    row = 16 * (t // 32) + t % 32 // 4 + 8 * (i >> 1 & 1)
    d[row, 8 * (i >> 2) + 2 * (t % 4) + (i & 1)] = out
    return d


FORMS = {
    # name: A's and B's element types, N, accumulators' type, A and B with K contiguous, sign
    "f16_n64": (np.float16, np.float16, 64, np.float32, True, True, 1),
    "f16_n64_ta": (np.float16, np.float16, 64, np.float32, False, True, 1),
    "f16_n64_tb": (np.float16, np.float16, 64, np.float32, True, False, -1),
    "f16_n64_tab": (np.float16, np.float16, 64, np.float32, False, False, -1),
    "f16_n64_f16": (np.float16, np.float16, 64, np.float16, True, True, 1),
    "bf16_n8": (BF16, BF16, 8, np.float32, True, True, 1),
    "bf16_n128": (BF16, BF16, 128, np.float32, True, True, 1),
    "tf32_n64": (np.float32, np.float32, 64, np.float32, True, True, 1),
    "tf32_n24": (np.float32, np.float32, 24, np.float32, True, True, 1),
    "e4m3_n64": (E4M3, E4M3, 64, np.float32, True, True, 1),
    "e5m2_e4m3_n32_f16": (E5M2, E4M3, 32, np.float16, True, True, 1),
    "s8_n64": (np.int8, np.int8, 64, np.int32, True, True, 1),
    "u8_s8_n16": (np.uint8, np.int8, 16, np.int32, True, True, 1),
}


def operand(rows: int, dtype: type, rng: np.random.Generator) -> Array:
    k = 32 // np.dtype(dtype).itemsize
    if np.dtype(dtype).kind in "iu":
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, (rows, k)).astype(dtype)
    return rng.uniform(-1, 1, (rows, k)).astype(dtype)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("name", FORMS)
def test_one_instruction(
    name: str, swizzle: int, rng: np.random.Generator, is_emulated: bool
) -> None:
    ta, tb, n, td, a_is_k_major, b_is_k_major, sign = FORMS[name]
    pieces, pairs, expected, error = [], [], np.zeros((64, n)), np.zeros((64, n))
    at = 0
    for _ in range(2):
        pair = []
        a, b = operand(64, ta, rng), operand(n, tb, rng)
        for x, is_k_major in ((a, a_is_k_major), (b, b_is_k_major)):
            image, descriptor = (k_major if is_k_major else mn_major)(x, swizzle, at)
            pieces.append(aligned(image))
            at += pieces[-1].size
            pair.append(descriptor)
        pairs.append(pair)
        if ta is np.float32:
            a, b = ((v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (a, b))
        wa, wb = a.astype(np.float64), b.astype(np.float64).T
        expected += sign * (wa @ wb)
        # H100 sums 8-bit floats in fewer bits than f32 has: errors of 2^-13 were seen
        small = np.dtype(ta).itemsize == 1 and not is_emulated
        error += product_error(wa, wb, 2.0**-13 if small else 2.0**-24)
    image = np.concatenate(pieces)
    out = np.zeros((128, n // 2), td)
    args = (np.int32(image.size), np.int32(2), image.view(np.uint32), np.array(pairs, np.uint64))
    launch("wgmma", name, *args, out, grid=1, block=128, shared_bytes=image.size)
    found = accumulators(out, n)
    if td is np.int32:
        assert np.array_equal(found, expected)
    else:
        close(found, expected, error + (3 * 2.0**-11 * 64 if td is np.float16 else 0))


def test_operand_in_registers(rng: np.random.Generator) -> None:
    a, b = operand(64, BF16, rng), operand(64, BF16, rng)
    image, descriptor = k_major(b, 128, 0)
    t, i = np.meshgrid(np.arange(128), np.arange(8), indexing="ij")
    row = 16 * (t // 32) + t % 32 // 4 + 8 * (i >> 1 & 1)
    fragments = a[row, 2 * (t % 4) + (i & 1) + 8 * (i >> 2)].view(np.uint32)
    out = np.zeros((128, 32), np.float32)
    args = (np.int32(image.size), image.view(np.uint32), fragments, np.uint64(descriptor), out)
    launch("wgmma", "bf16_n64_rs", *args, grid=1, block=128, shared_bytes=image.size)
    wide = a.astype(np.float64), b.astype(np.float64).T
    close(accumulators(out, 64), wide[0] @ wide[1], product_error(*wide))


def test_operand_written_without_a_fence(rng: np.random.Generator) -> None:
    image, descriptor = k_major(operand(64, BF16, rng), 128, 0)
    pairs = np.array([[descriptor, descriptor]], np.uint64)
    args = (np.int32(image.size), np.int32(1), image.view(np.uint32), pairs)
    out = np.zeros((128, 4), np.float32)
    sizes = {"grid": 1, "block": 128, "shared_bytes": image.size}
    fault("race", "wgmma.MISSING_FENCE", "bf16_n8", *args, out, **sizes)


@pytest.mark.parametrize("name, pairs", [("bf16_n8", True), ("bf16_n64_rs", False)])
def test_operand_that_other_warps_write(name: str, pairs: bool, rng: np.random.Generator) -> None:
    """Each warp reads all of B, so each must come behind what the others wrote of it."""
    head, body = (HERE / "wgmma.ptx").read_text().split(f".visible .entry {name}(")
    assert "bar.sync" in body.split(".visible")[0]
    text = f"{head}.visible .entry {name}({body.replace('bar.sync', '// bar.sync', 1)}"
    image, descriptor = k_major(operand(64, BF16, rng), 128, 0)
    more = [np.zeros((128, 4), np.uint32), np.uint64(descriptor)]
    if pairs:
        more = [np.array([[descriptor, descriptor]], np.uint64)]
    count = [np.int32(1)] if pairs else []
    args = [np.int32(image.size), *count, image.view(np.uint32), *more, np.zeros((128, 32), "f4")]
    with pytest.raises(emulator.Fault, match="race.*asynchronous copy or product"):
        emulator.load(text).launch(name, grid=1, block=128, shared_bytes=image.size, args=args)


GEMM_SHARED = 3 * (16384 + 8192) + 16384 + 48


def gemm_arguments(
    m: int, n: int, k: int, rng: np.random.Generator
) -> tuple[Array, Array, Array, list[object]]:
    a, b = (rng.uniform(-1, 1, s).astype(BF16) for s in ((m, k), (n, k)))
    c = np.zeros((m, n), BF16)
    rows = (128, 64, 64)
    maps = [
        emulator.TensorMap(x, box=(r, 64), swizzle=128)
        for x, r in zip((a, b, c), rows, strict=True)
    ]
    return a, b, c, [*np.int32([m // 128, n // 64, k // 64]), *maps]


def test_pipelined_product(rng: np.random.Generator) -> None:
    a, b, c, args = gemm_arguments(256, 128, 256, rng)
    launch("gemm_hopper", "gemm", *args, grid=3, block=384, shared_bytes=GEMM_SHARED)
    wide = a.astype(np.float64), b.astype(np.float64).T
    expected = wide[0] @ wide[1]
    close(c, expected, product_error(*wide) + 2.0**-8 * np.abs(expected))


@pytest.mark.parametrize(
    "variant, kind",
    [
        ("EARLY_ACCUMULATOR", "race"),
        ("EARLY_RELEASE", "race"),
        ("MISSING_FENCE", "race"),
        ("WRONG_PARITY", "deadlock"),
        ("WRONG_COUNT", "deadlock"),
        ("WRONG_BYTES", "race"),
        ("NO_WGMMA_WAIT", "race"),
        ("GREEDY", "deadlock"),
        ("UNINITIALISED", "uninitialised"),
    ],
)
def test_pipelined_product_with_a_bug(variant: str, kind: str, rng: np.random.Generator) -> None:
    *_, args = gemm_arguments(128, 64, 320, rng)
    sizes = {"grid": 1, "block": 384, "shared_bytes": GEMM_SHARED}
    fault(kind, f"gemm_hopper.{variant}", "gemm", *args, **sizes)


def test_accumulators_of_code_for_a_debugger(rng: np.random.Generator) -> None:
    """`nvcc -G` stores accumulators at once; `ptxas` serialises such products."""
    text = (HERE / "gemm_hopper.EARLY_ACCUMULATOR.ptx").read_text()
    assert ".target sm_90a\n" in text
    a, b, c, args = gemm_arguments(128, 64, 128, rng)
    module = emulator.load(text.replace(".target sm_90a\n", ".target sm_90a, debug\n"))
    module.launch("gemm", grid=1, block=384, shared_bytes=GEMM_SHARED, args=args)
    wide = a.astype(np.float64), b.astype(np.float64).T
    expected = wide[0] @ wide[1]
    close(c, expected, product_error(*wide) + 2.0**-8 * np.abs(expected))


def test_product_with_multicast(rng: np.random.Generator) -> None:
    m, n, k = 128, 64, 256
    a, b = (rng.uniform(-1, 1, s).astype(BF16) for s in ((k, m), (k, n)))
    c = np.zeros((m, n), np.float32)
    maps = [emulator.TensorMap(x, box=(r, 64), swizzle=128) for x, r in ((a, 64), (b, 32))]
    args = (*np.int32([n, k // 64]), *maps, c)
    launch("gemm_hopper", "gemm_multicast", *args, grid=(2, 1, 1), block=256, shared_bytes=49152)
    wide = a.astype(np.float64).T, b.astype(np.float64)
    close(c, wide[0] @ wide[1], product_error(*wide))


def attention_arguments(
    heads: int, length: int, causal: bool, rng: np.random.Generator
) -> list[Array]:
    return [rng.uniform(-1, 1, (heads * length, 64)).astype(BF16) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool, rng: np.random.Generator) -> None:
    heads, length = 2, 192
    q, k, v = attention_arguments(heads, length, causal, rng)
    o = np.zeros((heads * length, 64), np.float32)
    scale = np.float32(0.125 * np.log2(np.e))
    maps = [emulator.TensorMap(x, box=(64, 64), swizzle=128) for x in (q, k, v)]
    args = (np.int32(length), scale, np.int32(causal), *maps, o)
    launch(
        "attention_hopper", "attention", *args, grid=(3, heads, 1), block=160, shared_bytes=5 * 8192
    )
    q, k, v = (x.astype(np.float64).reshape(heads, length, 64) for x in (q, k, v))
    s = q @ k.transpose(0, 2, 1) * scale
    if causal:
        s = np.where(np.arange(length)[:, None] >= np.arange(length), s, -np.inf)
    p = np.exp2(s - s.max(2, keepdims=True))
    expected = p / p.sum(2, keepdims=True) @ v
    # probabilities are rounded to bf16 (2**-9 of each), the values are at most 1
    close(o.reshape(expected.shape), expected, 2.0**-8)


@pytest.mark.parametrize("variant", ["EARLY_ACCUMULATOR", "OVERWRITE_A", "EARLY_RELEASE"])
def test_attention_with_a_bug(variant: str, rng: np.random.Generator) -> None:
    q, k, v = attention_arguments(1, 256, False, rng)
    o = np.zeros((256, 64), np.float32)
    maps = [emulator.TensorMap(x, box=(64, 64), swizzle=128) for x in (q, k, v)]
    args = (np.int32(256), np.float32(0.1), np.int32(0), *maps, o)
    sizes = {"grid": (1, 1, 1), "block": 160, "shared_bytes": 5 * 8192}
    fault("race", f"attention_hopper.{variant}", "attention", *args, **sizes)
