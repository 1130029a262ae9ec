"""In tests a bound that the verifiers can neither prove nor break is a failure.

Random data is fresh in each run: a failure prints its seed, which STAGEFUSE_SEED sets again.
"""

import os
import secrets
from collections.abc import Iterator

import numpy as np
import pytest

from stagefuse.compiler.bounds import Bounds


@pytest.fixture(autouse=True, scope="session")
def strict_bounds() -> Iterator[None]:
    Bounds.strict = True
    yield
    Bounds.strict = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("STAGEFUSE_SEED") or secrets.randbits(32))
    print(f"STAGEFUSE_SEED={seed}")
    return np.random.default_rng(seed)
