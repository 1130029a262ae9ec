"""Random programs on a real GPU equal what NumPy says of them: tests/fuzz, on hardware."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.runtime.cuda import found
from stagefuse.runtime.devices import open_plan
from tests.fuzz.programs import compiled
from tests.fuzz.test_random_programs import SIZES, WAYS, chosen, wrong

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not found.has_driver(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("turn", range(20))
@pytest.mark.parametrize("way", WAYS)
def test_random_programs(way: str, turn: int, program_seed: int, rng: np.random.Generator) -> None:
    program, results, text = chosen(way, program_seed)
    with open_plan(compiled(text, [found.arch_of(0)], ()), None, "cuda:0") as pipe:
        for some in SIZES:
            assert not wrong(pipe, program, results, program.sizes(some), rng)
