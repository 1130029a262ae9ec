"""Fresh random numbers for each test, repeatable by the seed that a failing test prints."""

import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"numpy.random.default_rng({seed})")
    return np.random.default_rng(seed)


# the fixtures wait for the emulator's core
if not hasattr(__import__("stagefuse.runtime.emulator", fromlist=["load"]), "load"):
    collect_ignore_glob = ["test_nvcc_*", "test_triton*", "test_hopper_*"]
