"""Random data, new in each run; the seed is printed when a test fails."""

from __future__ import annotations

import random

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return np.random.default_rng(seed)


WAIT_FOR_RACES = (
    *("MISSING_FENCE", "EARLY_READ", "EARLY_WRITE", "MISSING_SYNC", "EARLY_EXIT", "EARLY_RELEASE"),
    *("tensor_stores", "bulk_reductions", "histogram_over", "multicast", "without_a_fence"),
    *("WRONG_BYTES", "test_transpose", "message_between", "nvcc_tensor.py::test_pipelined"),
    *("test_recursion", "structures_passed", "pointers_to", "virtual_f", "printing", "math_in_f64"),
    "assertion_that",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the race detector, and calls, which are on their way, will let pass."""
    for item in items:
        if "test_nvcc" in item.nodeid or "test_hopper" in item.nodeid:
            if any(name in item.nodeid for name in WAIT_FOR_RACES):
                item.add_marker(pytest.mark.xfail(strict=False))
