"""A persistent product of clusters, with multicast, stmatrix and tensor stores, and its bugs."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import HERE, Array, close, fault, launch, product_error

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


TURNS: dict[str, Any] = {"grid": 2, "block": 384, "shared_bytes": 4 * 24576 + 2 * 16384 + 64}


def taking_turns(rng: np.random.Generator) -> tuple[Array, Array, Array, list[Any]]:
    m, n, k = 256, 256, 320
    a, b = (rng.uniform(-1, 1, (rows, k)).astype(BF16) for rows in (m, n))
    c = np.zeros((m, n), BF16)
    maps = [emulator.TensorMap(x, box=(64, 64), swizzle=128) for x in (a, b, c)]
    return a, b, c, [*np.int32([m // 128, n // 128, k // 64]), *maps]


def test_warpgroups_that_take_turns(rng: np.random.Generator) -> None:
    """Two tiles for each warpgroup: named barriers order the turns, and the rings come round."""
    a, b, c, args = taking_turns(rng)
    launch("gemm_turns", "gemm", *args, **TURNS)
    wide = a.astype(np.float64), b.astype(np.float64).T
    product = wide[0] @ wide[1]
    close(c, product, 2.0**-8 * np.abs(product) + product_error(*wide) * (1 + 2.0**-8))


@pytest.mark.parametrize("variant, says", [
    ("EARLY_RELEASE", "was read by an asynchronous copy or product (products)"),
    ("ENDS_EARLY", "the block ends and with it shared memory that block (1, 0, 0)"),
])  # fmt: skip
def test_warpgroups_that_take_turns_with_a_bug(
    variant: str, says: str, rng: np.random.Generator
) -> None:
    *_, args = taking_turns(rng)
    with pytest.raises(emulator.Fault) as caught:
        launch(f"gemm_turns.{variant}", "gemm", *args, **TURNS)
    assert caught.value.kind == "race" and says in str(caught.value)


BUGS = {
    # what is wrong: a line of the PTX, how often it is changed from the end, what it becomes; the
    # kind of the fault, and words of its text
    "halves of B go to one block": (
        r"mov\.u16 (.*), 3;", 9, r"mov.u16 \1, 1;", "deadlock",
        "lacks 0 of 1 arrivals and 8192 bytes"),
    "the neighbour's use of B is not waited for": (
        r"mapa.shared::cluster.u32 remote, (.*), .*;", 9, r"mov.b32 remote, \1;", "race",
        "was written by an asynchronous copy"),
    "the first use of barriers is not waited for": (
        r"barrier.cluster.(arrive|wait).aligned;", 4, "", "race", "mbarrier is used with nothing"),
    "barriers are made known to no copies": (
        r"fence.mbarrier_init.release.cluster;", 1, "", "race",
        "copy of another block counts on an mbarrier, with no `fence.mbarrier_init`"),
    "the bytes of B are not expected": (
        r"(arrive.expect_tx.*), %r\d+;", 7, r"\1, 16384;", "race",
        "phase 1, where 8192 bytes more came than are expected"),
    "no barrier after the tile is written": (
        r"bar.sync %r3, 128;", 1, "", "race", "with nothing between"),
    "no proxy fence after the tile is written": (
        r"fence.proxy.async.shared::cta;", 1, "", "race", "no `fence.proxy.async`"),
    "products are not committed": (
        r"wgmma.commit_group.sync.aligned;", 9, "", "race", "asynchronous copy or product"),
    "products are not fenced": (
        r"wgmma.fence.sync.aligned;", 9, "", "race", "no `wgmma.fence`"),
    "nothing waits for the last store": (
        r"cp.async.bulk.wait_group.read 0;", 1, "", "race", "bulk copies may still read"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_told_in_words(bug: str, rng: np.random.Generator) -> None:
    pattern, times, new, kind, words = BUGS[bug]
    text = (HERE / "gemm_cluster.ptx").read_text()
    for found in list(re.finditer(pattern, text))[::-1][:times]:
        text = text[: found.start()] + found.expand(new) + text[found.end() :]
    *_, args = arguments(rng)
    with pytest.raises(emulator.Fault) as caught:
        emulator.load(text).launch("gemm", args=args, **SIZES)
    assert caught.value.kind == kind and words in str(caught.value), str(caught.value)
