"""Constant codes with scales stay codes in the plan; what is computed of them is what they mean."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.plan import Plan
from stagefuse.runtime.api import host_levels
from stagefuse.runtime.devices import open_plan
from tests.dsl.test_gguf import KINDS, drawn, written

Array = np.ndarray[Any, Any]
SIZES = {"q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q4_k": 4.8,
         "q5_k": 5.8, "q6_k": 6.7, "q2_k": 3.3, "q3_k": 4.7, "iq4_nl": 8.5, "iq4_xs": 8.4,
         "mxfp4": 6.0, "tq1_0": 2.2, "tq2_0": 2.2}  # fmt: skip
"""Bits for a weight in a plan, at most: those of the blocks, but for K-quants' scales in bytes, and
values of another kind than their codes, which are kept as whole numbers."""


def check_product(found: Array, x: Array, matrix: Array, times: int = 1) -> None:
    """A product's error is at most its terms' number times their size in units of f32, and `times`
    that of several products."""
    exact = x.astype(float) @ matrix.T.astype(float)
    size = np.abs(x).astype(float) @ np.abs(matrix).T.astype(float)
    assert np.all(np.abs(found - exact) <= 2 * x.shape[1] * 2.0**-24 * size * times)


def written_blocks(
    kind: str, rows: int, depth: int, rng: np.random.Generator, folder: Path
) -> tuple[Path, Array]:
    """A source with a layer and a table of blocks, and their matrix: f32 [rows, depth]."""
    number, values, _, _, meaning = KINDS[kind]
    blocks = drawn(kind, rows, depth // values, rng)
    written(folder / "m.gguf", [("l.weight", (rows, depth), number, blocks.tobytes())])
    matrix = np.array([[v for b in row for v in meaning(b)] for row in blocks], np.float32)
    source = folder / "m.pipe"
    source.write_text(
        'import gguf\n\nweights w = "m.gguf"\n\n'
        f"pipeline layer(x: f32[B, {depth}]) -> f32[B, {rows}]:\n    gguf.linear(x, w.l)\n\n"
        f"pipeline table(ids: i64[B]) -> f32[B, {depth}]:\n    gguf.matrix(w.l.weight)[ids]\n"
    )
    return source, matrix


@pytest.mark.parametrize("kind, rows", [*zip(KINDS, cycle([144, 137]), strict=False)])
def test_blocks_stay_blocks(kind: str, rows: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """A layer and a table of them, for few and for many rows, whole panels and others."""
    depth = 512
    source, matrix = written_blocks(kind, rows, depth, rng, tmp_path)
    plan = compile_file(source, levels=host_levels()[-1:])
    layer, table = (open_plan(plan, name, "cpu") for name in ("layer", "table"))
    for count in (1, 3, 300):
        x = rng.standard_normal((count, depth)).astype(np.float32)
        check_product(layer(x=x), x, matrix)
        ids = rng.integers(-rows, rows, count)
        np.testing.assert_array_equal(table(ids=ids), matrix[ids])
    with pytest.raises(sf.IndexOutOfRange):
        table(ids=np.array([rows]))
    elements = rows * depth + -(-rows // 16) * 16 * depth  # panels are padded
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= SIZES[kind] * elements


@pytest.mark.parametrize(
    "kind, arch", [*zip(KINDS, cycle(["sm_80", "sm_89", "sm_90a"]), strict=False)]
)
def test_blocks_in_the_emulator(
    kind: str, arch: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """The same in PTX: rows to the last bit, products of few rows and of more than a tile has."""
    source, matrix = written_blocks(kind, 5, 2 * KINDS[kind][1], rng, tmp_path)
    plan = compile_file(source, targets=(arch,))
    with (
        open_plan(plan, "layer", "emulator") as layer,
        open_plan(plan, "table", "emulator") as table,
    ):
        for count in (2, 19):
            x = rng.standard_normal((count, matrix.shape[1])).astype(np.float32)
            check_product(layer(x=x), x, matrix)
        ids = rng.integers(-5, 5, 3)
        np.testing.assert_array_equal(table(ids=ids), matrix[ids])


K, N = 384, 192
ZEROS = "(f32(w.q) - f32(w.zero)[:, None]) * w.scale[:, None]"
FORMS = {
    "zero points": (ZEROS, "x @ transpose(m)", 8.5),
    "as ONNX has them": (
        "f32(i32(w.q) - i32(w.zero)[:, None]) * w.scale[:, None]", "x @ transpose(m)", 8.5),
    "inputs first": (f"transpose({ZEROS})", "x @ m", 8.5),
    "few bits": ("f32(w.few) * w.scale[:, None]", "x @ transpose(m)", 4.5),
    "small floats": ("f32(w.eight) * 0.125", "x @ transpose(m)", 8.5),
    "twice": (ZEROS, "x @ transpose(m) - (2.0 * x) @ transpose(m)", 8.5),
    "blocks along the depth": (
        "reshape(f32(reshape(w.few, [192, 12, 32])) * w.blocks[:, :, None], [192, 384])",
        "x @ transpose(m)", 5.5),
    "a batch": (f"reshape({ZEROS}, [2, 96, 384])",
                "reshape(transpose(x[None] @ transpose(m, [0, 2, 1]), [1, 0, 2]), [B, 192])", 8.5),
    "padded": (f"pad(({ZEROS})[1:], [(1, 0), (0, 0)])", "x @ transpose(m)", 33),
}  # fmt: skip
"""How a matrix is made of codes, its product, and the bits for a weight at most."""


def form_weights(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "q": rng.integers(-128, 128, (N, K)).astype(np.int8),
        "zero": rng.integers(-128, 128, N).astype(np.int8),
        "few": rng.integers(-7, 8, (N, K)).astype(np.int8),
        "eight": rng.standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn),
        "scale": rng.standard_normal(N).astype(np.float32),
        "blocks": rng.standard_normal((N, K // 32)).astype(np.float32),
    }


def form_matrix(name: str, w: dict[str, Array]) -> Array:
    """The matrix of a form, as f32 makes it."""
    if name == "few bits":
        return w["few"].astype(np.float32) * w["scale"][:, None]
    if name == "small floats":
        return w["eight"].astype(np.float32) * np.float32(0.125)
    if name == "blocks along the depth":
        return w["few"].astype(np.float32) * np.repeat(w["blocks"], 32, axis=1)
    whole = w["q"].astype(np.float32) - w["zero"].astype(np.float32)[:, None]
    matrix = whole * w["scale"][:, None]
    if name == "padded":
        matrix[0] = 0
    return -matrix if name == "twice" else matrix


def form_plan(name: str, weights: dict[str, Array], tmp_path: Path, target: str) -> Plan:
    matrix, body, _ = FORMS[name]
    path = tmp_path / "form.pipe"
    path.write_text(
        'weights w = "w.npz"\n\n'
        f"pipeline p(x: f32[B, {K}]) -> f32[B, {N}]:\n    m = {matrix}\n    {body}\n"
    )
    levels = host_levels()[-1:]
    return compile_file(path, weights={"w": weights}, targets=(target,), levels=levels)


@pytest.mark.parametrize("name", FORMS)
def test_other_codes(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Any pointwise function of codes and scales."""
    weights = form_weights(rng)
    plan = form_plan(name, weights, tmp_path, "cpu")
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= FORMS[name][2] * N * K
    pipe = open_plan(plan, None, "cpu")
    for count in (1, 2, 37, 290):
        x = rng.standard_normal((count, K)).astype(np.float32)
        check_product(pipe(x=x), x, form_matrix(name, weights), 3 if name == "twice" else 1)


def test_steps_of_a_recurrence_read_numbers(rng: np.random.Generator, tmp_path: Path) -> None:
    """Small weights are unfolded once, not at each of its steps."""
    few = rng.integers(-7, 8, (288, 288)).astype(np.int8)
    path = tmp_path / "steps.pipe"
    path.write_text(
        'weights w = "w.npz"\n\n'
        "pipeline p(x: f32[T, B, 288]) -> f32[T, B, 288]:\n"
        "    scan t in 0..T with h = zeros([B, 288], f32):\n"
        "        h = tanh(x[t] + h @ (f32(w.few) * 0.01))\n"
        "        y[t] = h\n"
        "    y\n"
    )
    plan = compile_file(path, weights={"w": {"few": few}}, levels=host_levels()[-1:])
    assert sum(a.nbytes for a in plan.arrays.values()) == 4 * few.size
    x = rng.standard_normal((3, 2, 288)).astype(np.float32)
    h, wanted = np.zeros((2, 288)), []
    for t in range(3):
        h = np.tanh(x[t] + h @ (few * 0.01))
        wanted.append(h)
    np.testing.assert_allclose(open_plan(plan, None, "cpu")(x=x), wanted, atol=1e-5)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", ["as ONNX has them", "few bits"])
def test_codes_in_the_emulator(
    name: str, arch: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    weights = form_weights(rng)
    plan = form_plan(name, weights, tmp_path, arch)
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= FORMS[name][2] * N * K
    with open_plan(plan, None, "emulator") as pipe:
        x = rng.standard_normal((3, K)).astype(np.float32)
        check_product(pipe(x=x), x, form_matrix(name, weights))
