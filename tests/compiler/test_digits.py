"""Elements whose innermost position is taken apart by a number, as CPU code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import stages
from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.cpu_pipeline import CpuPipeline

LEVELS = ("v3", "v4")
CASES = {
    "twice, side by side": ("x[b, j // 2] * 2.0", 34, lambda x, j: x[:, j // 2] * 2),
    "three of each, and a constant of one": ("x[b, j // 3] + t[j % 3]", 51, None),
    "one after the other": ("x[b, j % 17] + x[b, 0]", 51, lambda x, j: x[:, j % 17] + x[:, :1]),
    "backwards": ("x[b, 16 - j % 17] - x[b, j // 17]", 51,
                  lambda x, j: x[:, 16 - j % 17] - x[:, j // 17]),
    "taken apart twice": ("x[b, j // 9 + (j // 3) % 3 + 4 * (j % 3)]", 27,
                          lambda x, j: x[:, j // 9 + (j // 3) % 3 + 4 * (j % 3)]),
    "taken apart twice, the last one many times": (
        "x[b, (j // 33) % 2 + (j // 3) % 11] + x[b, j % 3]", 99,
        lambda x, j: x[:, (j // 33) % 2 + (j // 3) % 11] + x[:, j % 3]),
    "by numbers that do not divide": ("x[b, j // 10 + j % 4]", 40,
                                      lambda x, j: x[:, j // 10 + j % 4]),
    "of a size that the number does not divide": ("x[b, j // 8]", 60, lambda x, j: x[:, j // 8]),
    "its position, too": ("x[b, j // 16] * f32(j % 16)", 64, lambda x, j: x[:, j // 16] * (j % 16)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_elements_are_those_at_quotients_and_remainders(
    rng: np.random.Generator, tmp_path: Path, case: str
) -> None:
    text, size, wanted = CASES[case]
    path = tmp_path / "p.pipe"
    path.write_text(f"""
pipeline p(x: f32[B, 17], t: f32[3]) -> f32[B, {size}]:
    y[b in 0..B, j in 0..{size}] = {text} + t[1] * 0.0
    y
""")
    x, t = rng.standard_normal((5, 17), np.float32), rng.standard_normal(3, np.float32)
    j = np.arange(size)
    want = x[:, j // 3] + t[j % 3] if wanted is None else wanted(x, j)
    for level in LEVELS:
        pipe = CpuPipeline(compile_file(path, levels=(level,)), threads=2)
        for b in (0, 1, 5):
            found = np.asarray(pipe(x=x[:b], t=t))
            np.testing.assert_array_equal(found, want[:b].astype(np.float32))
    ((_, kernels),) = stages.text_after(path, "kernels", {})
    divides = "not divide" in case or "many times" in case
    assert bool(re.search(r"d1\w* (//|%)", kernels)) == divides
