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
