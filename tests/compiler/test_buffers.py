"""Slots of the arena: what lives at different times shares them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.cpu_pipeline import CpuPipeline

TEXT = """
pipeline p(x: f32[40, {n}]):
    a = sort(x, axis=0)
    b = sort(a[:30], axis=1)
    c = sort(concat([b, b, b, a], axis=0), axis=0)
    d = sort(c[:, :7], axis=0)
    e = sort(concat([d, c[:, 7:]], axis=1), axis=1)
    sort(e[:9], axis=0) + sum(d) * 0.0
"""


def meaning(x: np.ndarray) -> np.ndarray:
    a = np.sort(x, axis=0)
    b = np.sort(a[:30], axis=1)
    c = np.sort(np.concatenate([b, b, b, a]), axis=0)
    d = np.sort(c[:, :7], axis=0)
    e = np.sort(np.concatenate([d, c[:, 7:]], axis=1), axis=1)
    return np.asarray(np.sort(e[:9], axis=0))


def test_buffers_of_other_sizes_share_slots(rng: np.random.Generator, tmp_path: Path) -> None:
    (tmp_path / "p.pipe").write_text(TEXT.format(n=40))
    plan = compile_file(tmp_path / "p.pipe")
    (pipeline,) = plan.pipelines
    arena = [b for b in pipeline.buffers if b.role == "arena"]
    assert len(pipeline.slots) < len(arena)
    for buffer in arena:
        assert buffer.slot is not None
        needed = 4 * int(np.prod([int(s) for s in buffer.shape]))
        assert int(pipeline.slots[buffer.slot]) >= needed * (buffer.dtype == "f32")
    assert len({pipeline.slots[b.slot] for b in arena if b.slot is not None}) < len(
        {b.shape for b in arena}
    )
    x = rng.standard_normal((40, 40)).astype(np.float32)
    assert np.array_equal(CpuPipeline(plan, threads=2)(x=x), meaning(x))


def test_buffers_of_unknown_sizes_share_slots_of_their_size(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    text = TEXT.format(n="N").replace("]):", "])\nwhere N in 8..=100:")
    (tmp_path / "p.pipe").write_text(text)
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe"), threads=2)
    for n in (8, 61, 100):
        x = rng.standard_normal((40, n)).astype(np.float32)
        assert np.array_equal(pipe(x=x), meaning(x))
