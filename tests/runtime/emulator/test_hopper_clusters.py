"""A persistent product of clusters, with multicast, stmatrix and tensor stores, and its bugs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import Array, close, fault, launch, product_error

BF16 = ml_dtypes.bfloat16
SIZES: dict[str, Any] = {"grid": 2, "block": 384, "shared_bytes": 3 * 24576 + 2 * 8192 + 48}
"""One cluster, which does all tiles: buffers and barriers are used again."""


def arguments(rng: np.random.Generator) -> tuple[Array, Array, Array, list[Any]]:
    m, n, k = 256, 128, 256
    a, b = (rng.uniform(-1, 1, (rows, k)).astype(BF16) for rows in (m, n))
    c = rng.uniform(-1, 1, (m, n)).astype(BF16)
    maps = [emulator.TensorMap(x, box=(rows, 64), swizzle=128)
            for x, rows in ((a, 128), (b, 32), (c, 64))]  # fmt: skip
    return a, b, c, [*np.int32([m // 256, n // 64, k // 64]), *maps]


def test_product_of_clusters(rng: np.random.Generator) -> None:
    a, b, c, args = arguments(rng)
    before = c.astype(np.float64)
    launch("gemm_cluster", "gemm", *args, **SIZES)
    wide = a.astype(np.float64), b.astype(np.float64).T
    product = wide[0] @ wide[1]
    # the product is rounded to bf16, and so is its sum with what was there
    rounded = 2.0**-8 * (np.abs(product) + np.abs(product + before)) * (1 + 2.0**-8)
    close(c, product + before, 2 * product_error(*wide) + rounded)


@pytest.mark.parametrize("variant", ["EARLY_EXIT", "MISSING_FENCE", "MISSING_SYNC", "OVERWRITE"])
def test_product_of_clusters_with_a_bug(variant: str, rng: np.random.Generator) -> None:
    *_, args = arguments(rng)
    fault("race", f"gemm_cluster.{variant}", "gemm", *args, **SIZES)
