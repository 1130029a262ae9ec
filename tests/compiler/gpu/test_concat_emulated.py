"""Concatenations on GPUs: loops for some parts each, and vectors where parts are whole ones."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches


@pytest.mark.parametrize("axis", [0, 1])
def test_many_parts_need_no_spills(
    axis: int, chance: random.Random, tmp_path: Path, rng: np.random.Generator
) -> None:
    """An element is chosen among a few parts, not among all of them."""
    count, other = chance.randrange(40, 50), chance.choice([3, 12, 40])
    sizes = [f"N{n}" if n % 4 == 1 else str(chance.randrange(1, 9)) for n in range(count)]
    shapes = [["A", str(other)] for _ in sizes]
    for shape, size in zip(shapes, sizes, strict=True):
        shape[axis] = size
    inputs = ", ".join(f"x{n}: f32[{', '.join(shape)}]" for n, shape in enumerate(shapes))
    parts = ", ".join(f"x{n} * 2.0" if n % 3 else f"x{n}" for n in range(count))
    text = f"pipeline p({inputs}):\n    concat([{parts}], axis={axis})\n"
    plan = compiled(tmp_path / "p.pipe", text)
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    dims = {"A": 3} | {size: int(rng.integers(0, 6)) for size in sizes if size[0] == "N"}
    arrays = [
        rng.standard_normal([dims[s] if s in dims else int(s) for s in shape], np.float32)
        for shape in shapes
    ]
    wanted = np.concatenate([x * 2 if n % 3 else x for n, x in enumerate(arrays)], axis)
    given = {f"x{n}": x for n, x in enumerate(arrays)}
    used = {n: d for n, d in dims.items() if n != "A" or axis}
    for arch in ("sm_80", "sm_90a"):
        np.testing.assert_array_equal(Emulated(plan, arch)(given, used)[0], wanted)


LOADS = [("f32", "v4.f32"), ("f16", "v4.b32"), ("f64", "v2.f64")]


@pytest.mark.parametrize(("dtype", "load"), LOADS)
def test_parts_and_borders_of_whole_vectors_are_read_as_vectors(
    dtype: str, load: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A condition that is the same for all elements of a vector keeps none of them apart."""
    text = f"""
pipeline parts(x: {dtype}[A, 64], y: {dtype}[A, 40], z: {dtype}[A, 24]):
    concat([x, y + 1.0, z], axis=1)

pipeline turned(x: {dtype}[A, 64], c: {dtype}[64]):
    x * c + concat([-x[:, 32:], x[:, :32]], axis=1)

pipeline bordered(x: {dtype}[A, 64]):
    pad(x, [(0, 0), (8, 16)], value=3)
"""
    plan = compiled(tmp_path / "p.pipe", text)
    check_legal(plan)
    for arch in ARCHES:
        loads = [line for line in plan.ptx[arch].splitlines() if "ld.global" in line]
        assert loads and all(f"ld.global.nc.{load}" in line for line in loads)
    kind = dtype.replace("f", "float")
    x, y, z = (rng.integers(-9, 9, (5, n)).astype(kind) for n in (64, 40, 24))
    c = x[0]
    turned = x * c + np.concatenate([-x[:, 32:], x[:, :32]], 1)
    bordered = np.pad(x, [(0, 0), (8, 16)], constant_values=3)
    found = Emulated(plan, "sm_80", 0)({"x": x, "y": y, "z": z}, {"A": 5})[0]
    np.testing.assert_array_equal(found, np.concatenate([x, y + 1, z], 1))
    np.testing.assert_array_equal(Emulated(plan, "sm_80", 1)({"x": x, "c": c}, {"A": 5})[0], turned)
    np.testing.assert_array_equal(Emulated(plan, "sm_80", 2)({"x": x}, {"A": 5})[0], bordered)


def test_parts_are_computed_where_they_are_joined(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Halves that turn, and parts with much to compute, which have loops of their own."""
    text = """
pipeline turned(x: f32[B, T, 64], c: f32[T, 32], s: f32[T, 32]):
    a = x[:, :, :32]
    b = x[:, :, 32:]
    concat([a * c - b * s, b * c + a * s], axis=-1)

pipeline heavy(x: f32[A, N], y: f32[A, 7], z: f32[A, M]):
    concat([tanh(x) * sigmoid(x), y, exp(z) / (1.0 + z * z)], axis=1) + 1.0
"""
    plan = compiled(tmp_path / "p.pipe", text)
    check_legal(plan)
    assert all(len(gpu.launches) == 1 for p in plan.pipelines for gpu in p.gpu)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    q, c, s = (rng.standard_normal(n, np.float32) for n in ((2, 5, 64), (5, 32), (5, 32)))
    a, b = (half.astype(float) for half in np.split(q, 2, axis=2))
    x, y, z = (rng.standard_normal((3, n), np.float32) for n in (9, 7, 40))
    wide = [part.astype(float) for part in (x, y, z)]
    parts = [
        np.tanh(wide[0]) / (1 + np.exp(-wide[0])), wide[1], np.exp(wide[2]) / (1 + wide[2] ** 2)
    ]  # fmt: skip
    for arch in ("sm_80", "sm_90a"):
        found = Emulated(plan, arch, 0)({"x": q, "c": c, "s": s}, {"B": 2, "T": 5})[0]
        wanted, size = (
            np.concatenate([a * c - b * s, b * c + a * s], 2),
            np.concatenate([abs(a * c) + abs(b * s), abs(b * c) + abs(a * s)], 2),
        )
        assert np.all(abs(found - wanted) <= 2**-23 * size)  # two roundings of half an ulp
        found = Emulated(plan, arch, 1)({"x": x, "y": y, "z": z}, {"A": 3, "N": 9, "M": 40})[0]
        np.testing.assert_allclose(found, np.concatenate(parts, 1) + 1, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("count", [9, 40])
def test_sums_of_many_parts_need_no_spills(
    count: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """An element that takes many loads leaves no registers for those of others."""
    inputs = ", ".join(f"x{n}: f32[8, A, {8 if n else 'N'}]" for n in range(count))
    parts = ", ".join(f"x{n}" for n in range(count))
    text = f"pipeline p({inputs}):\n    sum(concat([{parts}], axis=2), axis=2)\n"
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80", "sm_90a"))
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    given = {f"x{n}": rng.standard_normal((8, 3, 8 if n else 5), np.float32) for n in range(count)}
    whole = np.concatenate([x.astype(float) for x in given.values()], 2)
    (found,) = Emulated(plan, "sm_90a")(given, {"A": 3, "N": 5})
    lost = np.abs(whole).sum(axis=2) * whole.shape[2] * 2.0**-24
    assert np.all(abs(found - whole.sum(axis=2)) <= lost)
