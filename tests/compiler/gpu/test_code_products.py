"""Products by quantised weights: kernels read codes and scales, and no panel of them is stored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.plan import Plan
from stagefuse.dsl.dims import const, sym
from stagefuse.runtime.devices import open_plan

Array = np.ndarray[Any, Any]
UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Half the distance of numbers from 1 on."""


def check(found: Array, x: Array, matrix: Array, dtype: str = "f32") -> None:
    """A product's error is at most its terms' number times their size in units of f32. Weights
    that are rounded to 16 bits, and a result that is, add a rounding of each."""
    exact = x.astype(float) @ matrix
    size = np.abs(x).astype(float) @ np.abs(matrix)
    rounded = 0.0 if dtype == "f32" else 2.01 * UNIT[dtype]
    assert found.shape == exact.shape
    assert np.all(np.abs(found - exact) <= (2 * x.shape[1] * 2.0**-24 + rounded) * size)


def compiled(source: str, weights: dict[str, Array], folder: Path, arch: str) -> Plan:
    path = folder / "p.pipe"
    path.write_text('weights w = "w.npz"\n\n' + source)
    return compile_file(path, weights={"w": weights}, targets=(arch,))


def check_plan(plan: Plan, bits: float) -> None:
    """No kernel spills, or stores panels but those that unfold codes for many rows: weights take so
    many bits at most."""
    (pipeline,) = plan.pipelines
    (gpu,) = pipeline.gpu
    for launch in gpu.launches:
        assert not launch.report.get("spill bytes", 0)
        if "_unfolded_" in launch.kernel:
            continue
        assert "matmul" in launch.report["fused"] or launch.report["fused"] == ["exp"]
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= bits


N = 176  # three panels of 64, of which the last is not whole
FORMS = {
    "a tensor's scale": ("(f32(w.q) - 3.0) * 0.125", 8.1),
    "a channel's": ("(f32(w.q) - f32(w.zero)[:, None]) * w.scale[:, None]", 8.6),
    "four bits": ("f32(w.few) * w.scale[:, None]", 4.6),
    "small floats": ("f32(w.eight) * w.scale[:, None]", 8.6),
    "groups": (
        "reshape((f32(reshape(w.few, [N, K // G, G])) - w.zeros[:, :, None])"
        " * w.scales[:, :, None], [N, K])",
        9.1,
    ),
}  # fmt: skip
"""How matrices are made of codes, of which kinds of scales and zeros, and the bits for an element
at most."""


def weights_of(
    depth: int, group: int, rng: np.random.Generator, columns: int = N
) -> dict[str, Array]:
    groups = depth // group
    return {
        "q": rng.integers(-128, 128, (columns, depth)).astype(np.int8),
        "few": rng.integers(-7, 8, (columns, depth)).astype(np.int8),
        "eight": rng.standard_normal((columns, depth)).astype(ml_dtypes.float8_e4m3fn),
        "zero": rng.integers(-128, 128, columns).astype(np.int8),
        "scale": rng.standard_normal(columns).astype(np.float32),
        "zeros": rng.integers(-8, 8, (columns, groups)).astype(np.float32),
        "scales": rng.standard_normal((columns, groups)).astype(np.float32),
    }


def matrix_of(form: str, w: dict[str, Array]) -> Array:
    """The matrix of a form, in f64, transposed."""
    f = {name: a.astype(np.float64) for name, a in w.items()}
    if form == "a tensor's scale":
        return ((f["q"] - 3) * 0.125).T
    if form == "a channel's":
        return ((f["q"] - f["zero"][:, None]) * f["scale"][:, None]).T
    if form == "groups":
        each = f["few"].shape[1] // f["scales"].shape[1]
        zeros, scales = (np.repeat(f[name], each, axis=1) for name in ("zeros", "scales"))
        return ((f["few"] - zeros) * scales).T
    return (f["few" if form == "four bits" else "eight"] * f["scale"][:, None]).T


CASES = [
    ("a tensor's scale", N, 384, 384, "f32", "sm_80"),
    ("a channel's", N, 389, 389, "f32", "sm_90a"),  # a prime
    ("four bits", N, 387, 387, "f32", "sm_89"),  # half a byte is left
    ("four bits", N, 512, 512, "bf16", "sm_89"),
    ("groups", 360, 184, 23, "bf16", "sm_90a"),  # too shallow to be split
    ("small floats", N, 400, 400, "f32", "sm_80"),
    ("groups", N, 416, 32, "f32", "sm_90a"),
    ("groups", 169, 390, 13, "f32", "sm_80"),
    ("groups", N, 512, 128, "f16", "sm_80"),
]  # fmt: skip
"""Forms with columns, depth, the depth of a group, the dtype of rows."""


@pytest.mark.parametrize("form, columns, depth, group, dtype, arch", CASES)
def test_forms(
    form: str, columns: int, depth: int, group: int, dtype: str, arch: str,
    rng: np.random.Generator, tmp_path: Path,
) -> None:  # fmt: skip
    """One row, a few, a tile of few rows, several tiles; whatever K and the groups are."""
    made, bits = FORMS[form]
    made = re.sub("K // G", str(depth // group), made)
    for name, size in (("N", columns), ("K", depth), ("G", group)):
        made = re.sub(rf"\b{name}\b", str(size), made)
    weights = weights_of(depth, group, rng, columns)
    right = "m" if dtype == "f32" else f"{dtype}(m)"
    plan = compiled(
        f"pipeline p(x: {dtype}[B, {depth}]) -> {dtype}[B, {columns}]\nwhere B in 0..=8192:\n"
        f"    m = {made}\n    x @ transpose({right})\n",
        weights, tmp_path, arch,
    )  # fmt: skip
    check_plan(plan, bits * depth * -(-columns // 48) * 48)
    if dtype == "bf16" and arch == "sm_90a":
        assert "wgmma" in plan.ptx[arch]
    matrix = matrix_of(form, weights)
    kind = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    with open_plan(plan, None, "emulator") as pipe:
        for count in (0, 1, 3, 11, 77):
            x = rng.standard_normal((count, depth)).astype(kind)
            check(np.asarray(pipe(x=x)).astype(np.float64), x, matrix, dtype)


@pytest.mark.parametrize("target, shape", [("sm_90a", "1, 384"), ("sm_80", "384"), ("cpu", "384")])
def test_single_rows(target: str, shape: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """A product of one row reads codes too, though there is no axis of rows."""
    weights = weights_of(384, 32, rng)
    x = "x" if "," in shape else "x[None]"
    plan = compiled(
        f"pipeline p(x: f32[{shape}]) -> f32[1, {N}]:\n"
        f"    {x} @ transpose(f32(w.few) * w.scale[:, None])\n",
        weights, tmp_path, target,
    )  # fmt: skip
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= 4.6 * 384 * 192
    given = rng.standard_normal((1, 384)).astype(np.float32)
    with open_plan(plan, None, "cpu" if target == "cpu" else "emulator") as pipe:
        found = np.asarray(pipe(x=given if "," in shape else given[0]))
    check(found, given, matrix_of("four bits", weights))


def test_products_of_one_matrix(rng: np.random.Generator, tmp_path: Path) -> None:
    """Each of two products reads codes; a matrix that is a result too is stored, once."""
    weights = weights_of(384, 32, rng)
    made = "m = f32(w.few) * w.scale[:, None]"
    plan = compiled(
        f"pipeline p(x: f32[B, 384]) -> f32[B, {N}]:\n    {made}\n"
        "    x @ transpose(m) - exp(x) @ transpose(m)\n",
        weights, tmp_path, "sm_80",
    )  # fmt: skip
    check_plan(plan, 4.6 * 384 * 192)
    x = rng.standard_normal((2, 384)).astype(np.float32)
    with open_plan(plan, None, "emulator") as pipe:
        found = np.asarray(pipe(x=x))
    matrix = matrix_of("four bits", weights)
    both = np.concatenate([x, np.exp(x)], axis=1)
    check(found, both, np.concatenate([matrix, -matrix]))


def test_steps_of_a_recurrence(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step reads codes."""
    monkeypatch.setattr("stagefuse.compiler.patterns.codes.LEAST_IN_STEPS", 1 << 12)
    few = rng.integers(-7, 8, (96, 96)).astype(np.int8)
    plan = compiled(
        "pipeline p(x: f32[T, B, 96]) -> f32[T, B, 96]:\n"
        "    scan t in 0..T with h = zeros([B, 96], f32):\n"
        "        h = tanh(x[t] + h @ (f32(w.few) * 0.01))\n"
        "        y[t] = h\n"
        "    y\n",
        {"few": few}, tmp_path, "sm_90a",
    )  # fmt: skip
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= 4.1 * 96 * 96
    names = [b.name for b in plan.pipelines[0].gpu[0].buffers]
    assert not any("panels" in name for name in names)
    x = rng.standard_normal((2, 2, 96)).astype(np.float32)
    h, wanted = np.zeros((2, 96)), []
    for t in range(2):
        h = np.tanh(x[t] + h @ (few * 0.01))
        wanted.append(h)
    with open_plan(plan, None, "emulator") as pipe:
        np.testing.assert_allclose(np.asarray(pipe(x=x)), wanted, atol=1e-5)


def test_layers_of_one_shape(rng: np.random.Generator, tmp_path: Path) -> None:
    """What layers have in common, such as where bits lie in bytes, is computed in each of them."""
    weights = {f"few{n}": rng.integers(-7, 8, (N, 384)).astype(np.int8) for n in range(2)}
    plan = compiled(
        f"pipeline p(x: f32[B, 384]) -> f32[B, {N}]:\n"
        "    (x @ transpose(f32(w.few0) * 0.5)) * (x @ transpose(f32(w.few1) * 0.25))\n",
        weights, tmp_path, "sm_80",
    )  # fmt: skip
    check_plan(plan, 2 * 4.1 * 384 * 192)
    x = rng.standard_normal((2, 384)).astype(np.float32)
    with open_plan(plan, None, "emulator") as pipe:
        found = np.asarray(pipe(x=x))
    a, b = (x.astype(float) @ weights[f"few{n}"].T for n in range(2))
    sizes = (np.abs(x) @ np.abs(weights[f"few{n}"]).T for n in range(2))
    first, second = sizes
    assert np.all(np.abs(found - a * b / 8) <= 4 * 384 * 2.0**-24 * first * second / 8)


AHEAD = [
    ("groups", N, 704, 32, "bf16", "sm_80"),
    ("a tensor's scale", 128, 768, 768, "f16", "sm_89"),
    ("a channel's", 96, 712, 712, "bf16", "sm_90a"),
]


@pytest.mark.parametrize("form, columns, depth, group, dtype, arch", AHEAD)
def test_codes_are_read_a_stage_before(
    form: str, columns: int, depth: int, group: int, dtype: str, arch: str,
    rng: np.random.Generator, tmp_path: Path,
) -> None:  # fmt: skip
    """Where tensor cores multiply 16 bits: in the loop over a part's depth codes are read behind
    all products of the stage, and what was read is in registers before."""
    made, _ = FORMS[form]
    for name, size in (("N", columns), ("K // G", depth // group), ("K", depth), ("G", group)):
        made = re.sub(rf"\b{name}\b", str(size), made)
    weights = weights_of(depth, group, rng, columns)
    plan = compiled(
        f"pipeline p(x: {dtype}[B, {depth}]) -> {dtype}[B, {columns}]\nwhere B in 17..=64:\n"
        f"    m = {made}\n    x @ transpose({dtype}(m))\n",
        weights, tmp_path, arch,
    )  # fmt: skip
    check_plan(plan, 16 * depth * -(-columns // 48) * 48)
    parts = [x for x in plan.ptx[arch].split(".visible .entry ") if "mma.sync" in x]
    assert len(parts) == 2  # tiles of 32 rows and of 64
    for text in parts:
        loop = text[text.index("$depth1:") : text.index("bra $depth1;")]
        assert loop.rindex("mma.sync") < loop.index("ld.global")
    kind = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    with open_plan(plan, None, "emulator") as pipe:
        for count in (17, 64):
            x = rng.standard_normal((count, depth)).astype(kind)
            check(np.asarray(pipe(x=x)).astype(np.float64), x, matrix_of(form, weights), dtype)


UNFOLDED = [
    ("a tensor's scale", N, 384, 384, "bf16"),
    ("a channel's", N, 392, 392, "f16"),
    ("four bits", 168, 408, 408, "bf16"),
    ("small floats", N, 400, 400, "f16"),
    ("groups", N, 416, 32, "bf16"),
    ("groups", 360, 184, 23, "f16"),
    ("four bits", 168, 408, 408, "f32"),
]


@pytest.mark.parametrize("form, columns, depth, group, dtype", UNFOLDED)
def test_many_rows_unfold_the_matrix(
    form: str, columns: int, depth: int, group: int, dtype: str,
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once for all rows, in their dtype: what the product rounds to is the same."""
    monkeypatch.setattr("stagefuse.compiler.gpu.matmul.decoded_first._least_rows", lambda *_: 70)
    made, bits = FORMS[form]
    for name, size in (("N", columns), ("K // G", depth // group), ("K", depth), ("G", group)):
        made = re.sub(rf"\b{name}\b", str(size), made)
    weights = weights_of(depth, group, rng, columns)
    right = "m" if dtype == "f32" else f"{dtype}(m)"
    plan = compiled(
        f"pipeline p(x: {dtype}[B, {depth}]) -> {dtype}[B, {columns}]\nwhere B in 0..=8192:\n"
        f"    m = {made}\n    x @ transpose({right})\n",
        weights, tmp_path, "sm_90a",
    )  # fmt: skip
    check_plan(plan, bits * depth * -(-columns // 48) * 48)
    (gpu,) = plan.pipelines[0].gpu
    unfolds = [x for x in gpu.launches if "_unfolded_" in x.kernel]
    assert len(unfolds) == 1
    assert any("stored once" in r["because"] for r in unfolds[0].report["reasons"])
    kind = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    exact = matrix_of(form, weights)
    with open_plan(plan, None, "emulator") as pipe:
        for count in (69, 70, 133):
            x = rng.standard_normal((count, depth)).astype(kind)
            check(np.asarray(pipe(x=x)).astype(np.float64), x, exact, dtype)


@pytest.mark.parametrize(
    "arch, dtype, depth",
    [("sm_80", "bf16", 376), ("sm_90a", "f16", 376), ("sm_89", "f16", 40)],
)  # fmt: skip
def test_a_written_conversion_of_codes_rounds_for_any_number_of_rows(
    arch: str, dtype: str, depth: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    """What lanes multiply by themselves too, which is one row, and where few codes are stored as
    what they are rounded to."""
    made, _ = FORMS["a channel's"]
    weights = weights_of(depth, 8, rng)
    plan = compiled(
        f"pipeline p(x: {dtype}[B, {depth}]) -> f32[B, {N}]\nwhere B in 0..=64:\n"
        f"    f32(x @ transpose({dtype}({made})))\n", weights, tmp_path, arch,
    )  # fmt: skip
    kind = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    matrix = matrix_of("a channel's", weights).astype(np.float32).astype(kind).astype(float)
    with open_plan(plan, None, "emulator") as pipe:
        for count in (1, 3, 5):
            x = rng.standard_normal((count, depth)).astype(kind)
            exact, size = x.astype(float) @ matrix, np.abs(x.astype(float)) @ np.abs(matrix)
            bound = 2 * depth * 2.0**-24 * size + UNIT[dtype] * np.abs(exact)
            assert np.all(np.abs(np.asarray(pipe(x=x)) - exact) <= bound)


@pytest.mark.parametrize("arch, dtype", [("sm_80", "f16"), ("sm_89", "bf16"), ("sm_90a", "f16")])
def test_rows_of_f32_by_weights_of_16_bits(
    arch: str, dtype: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Weights stay in 16 bits, and lanes convert them."""
    kind = np.float16 if dtype == "f16" else ml_dtypes.bfloat16
    matrix = rng.standard_normal((N, 389)).astype(kind)
    plan = compiled(
        f"pipeline p(x: f32[B, 389]) -> f32[B, {N}]\nwhere B in 0..=8192:\n"
        "    x @ transpose(f32(w.m))\n",
        {"m": matrix}, tmp_path, arch,
    )  # fmt: skip
    check_plan(plan, 16.1 * 389 * 192)
    with open_plan(plan, None, "emulator") as pipe:
        for count in (1, 3, 20, 70):
            x = rng.standard_normal((count, 389)).astype(np.float32)
            check(np.asarray(pipe(x=x)), x, matrix.astype(np.float64).T)


def test_layers_unfold_alike(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer has its own matrix unfolded, by the same kernels; of a known number of rows no
    other way is in the plan."""
    monkeypatch.setattr("stagefuse.compiler.gpu.matmul.decoded_first._least_rows", lambda *_: 1)
    weights = {f"few{n}": rng.integers(-7, 8, (256, 256)).astype(np.int8) for n in range(2)}
    plan = compiled(
        "pipeline p(x: bf16[20, 256]) -> bf16[20, 256]:\n"
        "    y = x @ transpose(bf16(f32(w.few0) * 0.125))\n"
        "    y @ transpose(bf16(f32(w.few1) * 0.125))\n",
        weights, tmp_path, "sm_90a",
    )  # fmt: skip
    (gpu,) = plan.pipelines[0].gpu
    unfolds = [x for x in gpu.launches if "_unfolded_" in x.kernel]
    assert len(unfolds) == 2 and unfolds[0].kernel == unfolds[1].kernel
    assert unfolds[0].report["fused"] == unfolds[1].report["fused"]
    x = rng.standard_normal((20, 256)).astype(ml_dtypes.bfloat16)
    with open_plan(plan, None, "emulator") as pipe:
        found = np.asarray(pipe(x=x)).astype(np.float64)
    a, b = (weights[f"few{n}"].T / 8 for n in range(2))
    y = x.astype(np.float64) @ a
    between = np.abs(y.astype(ml_dtypes.bfloat16).astype(np.float64) - y)
    size = np.abs(y) @ np.abs(b)
    lost = (between + 256 * 2.0**-24 * (np.abs(x.astype(float)) @ np.abs(a))) @ np.abs(b)
    wanted = y @ b
    assert np.all(np.abs(found - wanted) <= 2 * lost + (256 * 2.0**-24 + 2.0**-8) * size)


def test_when_codes_are_unfolded() -> None:
    """From the rows on where a kernel more and the matrix in 16 bits are predicted to take less; of
    wide matrices, which have tiles enough, and small ones later."""
    from stagefuse.compiler.gpu.matmul.decoded_first import _least_rows

    rows = sym("M")
    assert 128 < (_least_rows(rows, (4096, 4096, 64)) or 0) <= 192
    assert 128 < (_least_rows(rows, (14336, 4096, 64)) or 0) <= 512
    assert _least_rows(const(4096), (4096, 4096, 64)) == 1
    assert _least_rows(const(16), (4096, 4096, 64)) is None
    assert 512 < (_least_rows(rows, (4096, 4096, 64), 4) or 0) <= 4096
