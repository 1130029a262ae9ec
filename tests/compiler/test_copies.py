"""Results that are the same value: each is written, beside an update of that value too."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse as sf

SOURCE = """\
pipeline p(x: f32[N, 64], i: i64) -> (f32[N, 64], f32[N, 64], f32[N, 64])
where N in 0..=600:
    v = x
    v[i] = 1.0
    x, x, v
"""


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_a_value_given_twice_beside_its_update(device: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 64), np.float32)
    updated = x.copy()
    updated[1] = 1
    out = tuple(np.full(x.shape, np.nan, np.float32) for _ in range(3))
    target = "cpu" if device == "cpu" else "a100"
    with sf.compile(SOURCE, target=target, device=device) as pipe:
        pipe(x=x, i=np.int64(1), out=out)
    for found, wanted in zip(out, (x, x, updated), strict=True):
        np.testing.assert_array_equal(found, wanted)
