"""Warps with roles: a convolution with a scheduler, attention over pages; and their bugs."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import HERE, Array, close, launch, product_error

BF16 = ml_dtypes.bfloat16
LENGTH = 280
SIZES: dict[str, dict[str, Any]] = {
    "convolution": {"grid": (1, 1, 1), "block": 192, "shared_bytes": 3 * 16384 + 96},
    "pages": {"grid": (1, 1, 1), "block": 288, "shared_bytes": 7 * 8192 + 552},
}


def convolution(rng: np.random.Generator) -> tuple[Array, Array, Array, list[Any]]:
    """Patches of pixels, weights and the result of a convolution of 3 x 3; its arguments."""
    n, height, width, outputs = 4, 6, 7, 64
    x = rng.uniform(-1, 1, (n, height, width, 64)).astype(BF16)
    w = rng.uniform(-1, 1, (outputs, 9 * 64)).astype(BF16)
    pixels = n * height * width
    y = np.zeros((pixels, outputs), np.float32)
    corner = (-1, -1)
    mx = emulator.Im2colMap(x, lower=corner, upper=corner, channels=64, pixels=64, swizzle=128)
    mw = emulator.TensorMap(w, box=(64, 64), swizzle=128)
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = np.concatenate(taps, axis=3).reshape(pixels, -1)
    numbers = np.int32([height, width, 64, -(-pixels // 64), 1, pixels])
    return patches, w.astype(np.float64).T, y, [*numbers, np.zeros(1, np.int32), mx, mw, y]


def pages(rng: np.random.Generator) -> tuple[Array, Array, list[Any]]:
    """The attention that is expected, the array for it, and the arguments."""
    table = rng.permutation(24)[: -(-LENGTH // 64) * 4].astype(np.int32)
    q, kv = (rng.uniform(-1, 1, (rows, 128)).astype(BF16) for rows in (64, 24 * 16))
    out, factor = np.zeros((64, 128), np.float32), np.float32(128**-0.5 * np.log2(np.e))
    maps = [emulator.TensorMap(x, box=(n, 64), swizzle=128) for x, n in ((q, 64), (kv, 16))]
    keys = kv.astype(np.float64).reshape(24, 16, 128)[table].reshape(-1, 128)[:LENGTH]
    weights = np.exp2(q.astype(np.float64) @ keys.T * factor)
    expected = weights / weights.sum(1, keepdims=True) @ keys
    return expected, out, [np.int32(LENGTH), factor, table, *maps, out]


def test_convolution_with_a_scheduler(rng: np.random.Generator) -> None:
    patches, weights, y, args = convolution(rng)
    launch("roles", "convolution", *args, **SIZES["convolution"])
    close(y, patches @ weights, product_error(patches, weights))


def test_attention_over_pages(rng: np.random.Generator) -> None:
    expected, out, args = pages(rng)
    launch("roles", "pages", *args, **SIZES["pages"])
    # weights are rounded to bf16 (2**-9 of each), the values are at most 1
    close(out, expected, 2.0**-8)


BUGS = {
    # the kernel, a line of its PTX, what it becomes, and words of the text of the fault
    "the tile's number is overwritten": (
        "convolution", r"bar\.warp\.sync\s+-1;", "", "is written here and was read"),
    "the pixels' bytes are not expected": (
        "convolution", r"(expect_tx.*), %r\d+;", r"\1, 8192;", "8192 bytes more came than"),
    "scales are overwritten": (
        "pages", r"bar\.sync 2, 256;", "", "is written here and was read"),
    "weights have no proxy fence": (
        "pages", r"fence\.proxy\.async\.shared::cta;", "", "with no `fence.proxy.async`"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_roles_with_a_bug(bug: str, rng: np.random.Generator) -> None:
    kernel, pattern, new, words = BUGS[bug]
    text = (HERE / "roles.ptx").read_text()
    start = text.index(f".entry {kernel}(")
    changed, times = re.subn(pattern, new, text[start:])
    args = (convolution if kernel == "convolution" else pages)(rng)[-1]
    with pytest.raises(emulator.Fault) as caught:
        emulator.load(text[:start] + changed).launch(kernel, args=args, **SIZES[kernel])
    assert times and words in str(caught.value), str(caught.value)
