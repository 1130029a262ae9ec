"""Layers that differ in where in a tensor what is theirs lies share their kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.plan import Plan

SOURCE = """
pipeline turn(x: f32[T, 24]) -> f32[T, 24]
where T in 1..=8, S in 8..=64:
    state kept: f32[LAYERS, 2, S, 24] = 0.0
    state length: i64 = 0
    for i in 0..LAYERS:
        kept[i, 0, length:length + T] = x
        kept[i, 1, length:length + T] = 2.0 * x
        scores[t, s] = sum[d] x[t, d] * kept[i, 0, s, d]
        x = tanh(scores @ kept[i, 1] / 64.0) / 2.0 + x / 2.0
    length = length + T
    x
"""
TOLERANCE = 3 * (24 + 9) * 8 * float(np.finfo(np.float32).eps)
"""Of three layers, whose products have sums of 24 and 9 terms that are 8 at most after division."""


def source(folder: Path, layers: int) -> Path:
    path = folder / f"turn{layers}.pipe"
    path.write_text(f"const LAYERS = {layers}\n{SOURCE}")
    return path


def entries(plan: Plan) -> list[set[str]]:
    """The kernels of a plan's pipeline, on the CPU and on each arch."""
    (pipeline,) = plan.pipelines
    return [
        {s.symbol for s in pipeline.steps},
        *({n.kernel for n in g.launches} for g in pipeline.gpu),
    ]


def test_more_layers_are_no_more_kernels(tmp_path: Path) -> None:
    few, many = (compile_file(source(tmp_path, n), targets=("cpu", "a100", "h200")) for n in (3, 7))
    assert list(map(len, entries(few))) == list(map(len, entries(many)))
    assert len(entries(few)[0]) < 12
    (pipeline,) = many.pipelines
    updates = [s for s in pipeline.steps if s.label == "turn.update"]
    numbers = [tuple(d for d in s.dims if d.isdigit()) for s in updates]
    assert numbers == [(str(i), str(n)) for i in range(7) for n in range(2)]
    for gpu in pipeline.gpu:
        assert sum("0" in n.dims for n in gpu.launches) and not gpu.loops


def reference(turns: list[Any], layers: int, size: int) -> np.ndarray[Any, Any]:
    """The result of the last turn, in float64."""
    kept, at = np.zeros((layers, 2, size, 24)), 0
    for turn in turns:
        x, end = turn.astype(np.float64), at + len(turn)
        for layer in kept:
            layer[:, at:end] = x, 2 * x
            x = np.tanh(x @ layer[0].T @ layer[1] / 64) / 2 + x / 2
        at = end
    return x


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_each_layer_keeps_its_own(tmp_path: Path, rng: Any, device: str) -> None:
    turns = [rng.uniform(-1, 1, (t, 24)).astype(np.float32) for t in (1, 3)]
    with sf.compile(source(tmp_path, 3), device=device) as pipe:
        session = pipe.session(S=9)
        for n, turn in enumerate(turns):
            found, expected = session(x=turn), reference(turns[: n + 1], 3, 9)
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_a_kernel_of_many_layers_has_no_numbers(tmp_path: Path, rng: Any) -> None:
    path = tmp_path / "sum.pipe"
    path.write_text("""
pipeline total(x: f32[4]) -> f32[4]:
    state kept: f32[6, 4] = 0.0
    for i in 0..5:
        kept[i] = kept[i + 1]
    kept[5] = x
    kept[0] + kept[1] + kept[2] + kept[3] + kept[4] + kept[5]
""")
    with sf.compile(path, device="cpu") as pipe:
        session, turns = pipe.session(), rng.standard_normal((9, 4)).astype(np.float32)
        for n, turn in enumerate(turns):
            last = turns[max(n - 5, 0) : n + 1]
            np.testing.assert_allclose(session(x=turn), last.sum(0), rtol=0, atol=3e-6)


GIVEN = """
pipeline looked(x: f32[T, 24], given: f32[LAYERS, 2, S, 24]) -> (f32[T, 24], f32[LAYERS, T, 24])
where T in 1..=8, S in 1..=64:
    kept = zeros([LAYERS, T, 24], f32)
    for i in 0..LAYERS:
        scores[t, s] = sum[d] x[t, d] * given[i, 0, s, d]
        x = tanh(scores @ given[i, 1] / 64.0) / 2.0 + x / 2.0
        kept[i] = x * x
    x, kept
"""


def given(folder: Path, layers: int) -> Path:
    path = folder / f"looked{layers}.pipe"
    path.write_text(f"const LAYERS = {layers}\n{GIVEN}")
    return path


def test_layers_of_an_input_and_of_a_result_are_no_more_kernels(tmp_path: Path) -> None:
    few, many = (compile_file(given(tmp_path, n), targets=("cpu", "a100", "h200")) for n in (3, 7))
    assert list(map(len, entries(few))) == list(map(len, entries(many)))
    (pipeline,) = many.pipelines
    numbers = [d for s in pipeline.steps for d in s.dims if d.isdigit()]
    assert set(numbers) == set(map(str, range(7)))


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_each_layer_looks_at_its_own(tmp_path: Path, rng: Any, device: str) -> None:
    x, layers = (rng.uniform(-1, 1, s).astype(np.float32) for s in ((3, 24), (3, 2, 9, 24)))
    with sf.compile(given(tmp_path, 3), device=device) as pipe:
        found, kept = pipe(x=x, given=layers)
    x = x.astype(np.float64)
    for number, (keys, values) in enumerate(layers):
        x = np.tanh(x @ keys.T @ values / 64) / 2 + x / 2
        np.testing.assert_allclose(kept[number], x * x, rtol=0, atol=2 * TOLERANCE)
    np.testing.assert_allclose(found, x, rtol=0, atol=TOLERANCE)


def test_a_kernel_about_several_items_of_an_input_knows_them(tmp_path: Path) -> None:
    path = tmp_path / "corners.pipe"
    path.write_text("""
pipeline sides(corners: f32[B, 3, 2]) -> (f32[B, 2], f32[B, 2])
where B in 1..=9:
    corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
""")
    (pipeline,) = compile_file(path).pipelines
    assert not any(d.isdigit() for step in pipeline.steps for d in step.dims)
