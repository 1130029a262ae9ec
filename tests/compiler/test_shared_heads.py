"""Attention whose heads share their keys, their values, or both."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse as sf

SOURCE = """
import nn

pipeline p(
    q: f32[2, 4, 5, 8], k: f32[2, {keys}, T, 8], v: f32[2, {values}, T, 6]
) -> f32[2, 4, 5, 6]
where T in 1..=64:
    scores = q @ transpose(nn.repeat_heads(k, {each_key}), [0, 1, 3, 2])
    nn.softmax(scores) @ nn.repeat_heads(v, {each_value})
"""


@pytest.mark.parametrize(("keys", "values"), [(1, 4), (4, 1), (2, 1), (1, 2), (1, 1)])
def test_each_product_has_its_own_rows(keys: int, values: int) -> None:
    rng = np.random.default_rng(keys * 10 + values)
    text = SOURCE.format(keys=keys, values=values, each_key=4 // keys, each_value=4 // values)
    pipe = sf.compile(text)
    for length in (1, 7, 33):
        q, k, v = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in ((2, 4, 5, 8), (2, keys, length, 8), (2, values, length, 6))
        )
        wide = [np.repeat(x.astype(np.float64), 4 // x.shape[1], axis=1) for x in (k, v)]
        scores = np.exp(q @ wide[0].transpose(0, 1, 3, 2))
        wanted = scores / scores.sum(-1, keepdims=True) @ wide[1]
        # f32: errors of 8 products near 1 in the exponent, weights that sum to 1
        np.testing.assert_allclose(pipe(q=q, k=k, v=v), wanted, rtol=0, atol=3e-5)
