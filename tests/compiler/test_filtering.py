"""Convolutions by minimal filtering, beside their meaning in float64 and without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.kernel_text import parse_kernel, print_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.lower import Sites, lower
from stagefuse.compiler.passes import minimal_filters, pipeline_of
from stagefuse.compiler.patterns import filtering
from stagefuse.compiler.patterns.filtering import OF_ELEMENTS, OF_PRODUCTS, OF_TAPS
from stagefuse.compiler.plan import Plan
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import run_passes
from stagefuse.compiler.schedule import CPU
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS
from .test_convolutions import of as convolution_of

Array = np.ndarray[Any, Any]
UNIT = 2.0**-24


@pytest.fixture
def filtered(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Has whatever can be filtered be so; gives the weights that were transformed."""
    found: list[Array] = []
    transformed = minimal_filters.MinimalFilters._transformed

    def kept(self: Any, *args: Any) -> Array | None:
        made = transformed(self, *args)
        found.extend([] if made is None else [made])
        return made

    monkeypatch.setattr(filtering, "GAIN", float("inf"))
    monkeypatch.setattr(filtering, "LEAST_DEPTH", 1)
    monkeypatch.setattr(filtering, "LEAST_ROWS", 1)
    monkeypatch.setattr(minimal_filters.MinimalFilters, "_transformed", kept)
    return found


class Case:
    """y = relu(conv(x) + bias + x2) with groups and padding, and its NumPy meaning."""

    def __init__(
        self, size: Sequence[int], kernel: Sequence[int], padding: Sequence[int],
        channels: int, out: int, groups: int = 1,
    ) -> None:  # fmt: skip
        self.size, self.kernel, self.padding = tuple(size), tuple(kernel), tuple(padding)
        self.channels, self.out, self.groups = channels * groups, out * groups, groups
        self.results = tuple(
            s + 2 * p - k + 1 for s, p, k in zip(size, padding, kernel, strict=True)
        )

    def plan(self, level: str, weights: dict[str, Array], folder: Path) -> Plan:
        np.savez(folder / "w.npz", **{"k": weights["k"], "b": weights["b"]})
        edges = ", ".join(f"({p}, {p})" for p in self.padding)
        shape, result = (", ".join(map(str, s)) for s in (self.size, self.results))
        space = len(self.size)
        (folder / "p.pipe").write_text(f"""
import nn
weights w = "w.npz"
pipeline p(x: f32[B, {self.channels}, {shape}], z: f32[B, {self.out}, {result}]):
    y = nn.convolve{space}d(pad(x, [(0, 0), (0, 0), {edges}]), w.k, 1, 1, {self.groups})
    nn.relu(y + w.b[:{", None" * space}] + z)
""")
        return compile_file(folder / "p.pipe", levels=(level,))

    def pipe(self, level: str, weights: dict[str, Array], folder: Path) -> CpuPipeline:
        return CpuPipeline(self.plan(level, weights, folder), threads=2)

    def weights(self, rng: np.random.Generator) -> dict[str, Array]:
        shape = (self.out, self.channels // self.groups, *self.kernel)
        return {"k": rng.standard_normal(shape, np.float32),
                "b": rng.standard_normal(self.out, np.float32)}  # fmt: skip

    def tiles(self, x: Array, width: Sequence[int], step: Sequence[int]) -> Array:
        """Windows of x [B, groups, C, space...] with its padding, and zeros up to whole ones."""
        more = [
            (0, -(-r // s) * s + w - s - (e + 2 * p)) if s > 1 else (0, 0)
            for r, s, w, e, p in zip(self.results, step, width, self.size, self.padding,
                                     strict=True)
        ]  # fmt: skip
        edges = [(p, p + m) for p, (_, m) in zip(self.padding, more, strict=True)]
        x = x.reshape(x.shape[0], self.groups, self.channels // self.groups, *self.size)
        padded = np.pad(x.astype(np.float64), [(0, 0)] * 3 + edges)
        axes = tuple(range(3, 3 + len(width)))
        found = np.lib.stride_tricks.sliding_window_view(padded, tuple(width), axis=axes)
        return found[(slice(None),) * 3 + tuple(slice(None, None, s) for s in step)]

    def meaning(self, x: Array, kernel: Array) -> Array:
        ones = [1] * len(self.size)
        seen = self.tiles(x, self.kernel, ones)
        k = kernel.reshape(self.groups, -1, *kernel.shape[1:]).astype(np.float64)
        space, taps = "yx"[: len(self.size)], "ij"[: len(self.size)]
        found = np.einsum(f"bgc{space}{taps},gkc{taps}->bgk{space}", seen, k)
        return found.reshape(x.shape[0], self.out, *self.results)

    def bound(self, x: Array, kernel: Array) -> Array:
        """The sums of absolute values in place of those of numbers, of tiles of results."""
        k = abs(kernel.reshape(self.groups, -1, *kernel.shape[1:]).astype(np.float64))
        wide = [4 if n == 3 else n for n in self.kernel]
        step = [2 if n == 3 else 1 for n in self.kernel]
        seen = self.tiles(abs(x), wide, step)
        space = len(self.size)
        for axis in (a for a, n in enumerate(self.kernel) if n == 3):
            at = 3 + space + axis
            seen = np.moveaxis(np.tensordot(seen, abs(np.array(OF_ELEMENTS)), (at, 1)), -1, at)
            k = np.moveaxis(np.tensordot(k, abs(np.array(OF_TAPS)), (3 + axis, 1)), -1, 3 + axis)
        names, taps = "yx"[:space], "ij"[:space]
        found = np.einsum(f"bgc{names}{taps},gkc{taps}->bgk{names}{taps}", seen, k)
        for axis in (a for a, n in enumerate(self.kernel) if n == 3):
            at = 3 + space + axis
            found = np.moveaxis(np.tensordot(found, abs(np.array(OF_PRODUCTS)), (at, 1)), -1, at)
        for axis in (a for a, n in enumerate(self.kernel) if n != 3):
            found = found.sum(3 + space + axis, keepdims=True)
        order = [0, 1, 2] + [a for n in range(space) for a in (3 + n, 3 + space + n)]
        found = found.transpose(order)
        tall = [found.shape[3 + 2 * n] * found.shape[4 + 2 * n] for n in range(space)]
        found = found.reshape(x.shape[0], self.out, *tall)
        return found[(slice(None),) * 2 + tuple(slice(0, r) for r in self.results)]

    def check(
        self, pipe: CpuPipeline, weights: dict[str, Array], x: Array, z: Array, depth: int = 0
    ) -> None:
        """`depth`: of sums that are filtered, if all are."""
        bias = weights["b"].reshape(-1, *(1,) * len(self.size))
        with np.errstate(invalid="ignore"):
            want = np.maximum(self.meaning(x, weights["k"]) + bias + z, 0)
        seen = np.where(np.isfinite(x), x, 0)  # of finite results
        kernel = np.where(np.isfinite(weights["k"]), weights["k"], 0)
        most = self.bound(seen, kernel) + abs(bias) + abs(z)
        found = pipe(x=x, z=z)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(want))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
        inside = np.isfinite(want)
        depth = depth or weights["k"][0].size
        unit = UNIT * (1 + 2.0**-8)  # terms of the second order
        off = abs(np.where(inside, found, 0) - np.where(inside, want, 0))
        assert np.all(off <= np.where(inside, (depth + 9) * unit * most, 0))

    def inputs(self, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
        x = rng.standard_normal((batch, self.channels, *self.size), np.float32)
        return x, rng.standard_normal((batch, self.out, *self.results), np.float32)


CONVOLUTIONS: list[dict[str, Any]] = [
    dict(source=("B", 5, 9, 11), outer=33, kernel=(3, 3), padding=(1, 1)),
    dict(source=(1, 4, 60, 5), outer=100, kernel=(3, 3), padding=(0, 2), relu=True),
    dict(source=(1, 7, 6, 19), outer=20, kernel=(1, 3)),
    dict(source=(2, 40, 1201), outer=20, kernel=(3,), padding=(1,)),
]  # fmt: skip

CASES = [
    Case((9, 11), (3, 3), (1, 1), 5, 33),
    Case((24, 7), (3, 3), (0, 0), 3, 17, 2),
    Case((5, 70), (3, 3), (2, 1), 2, 40),
    Case((6, 19), (1, 3), (0, 1), 7, 20),
    Case((19, 6), (3, 1), (1, 0), 7, 20),
    Case((101,), (3,), (1,), 6, 35),
    Case((7, 7), (3, 3), (1, 1), 24, 40),
    Case((11, 17), (3, 5), (1, 2), 4, 33),
    Case((1201,), (3,), (0,), 40, 3, 2),
    Case((3, 400), (3, 3), (1, 1), 129, 4),
]


@pytest.mark.parametrize(
    ("case", "level"),
    [(c, level) for level in LEVELS for c in (CASES if level == LEVELS[-1] else CASES[::3])],
    ids=lambda c: c if isinstance(c, str) else f"{c.size}{c.kernel}",
)
def test_filtered(
    case: Case, level: str, filtered: list[Array], rng: np.random.Generator, tmp_path: Path
) -> None:
    weights = case.weights(rng)
    pipe = case.pipe(level, weights, tmp_path)
    assert len(filtered) == 1
    for batch in (0, 1, 3):
        case.check(pipe, weights, *case.inputs(batch, rng), filtered[0].shape[-1])


@pytest.mark.parametrize("level", LEVELS)
def test_any_size(
    level: str, filtered: list[Array], chance: random.Random, rng: np.random.Generator,
    tmp_path: Path,
) -> None:  # fmt: skip
    size = [chance.randrange(1, 30) for _ in range(2)]
    kernel = chance.choice([(3, 3), (3, 2), (4, 3)])
    padding = [chance.randrange(2, 4) for _ in range(2)]
    groups, channels, out = (chance.randrange(1, n) for n in (4, 12, 70))
    case = Case(size, kernel, padding, channels, out, groups)
    weights = case.weights(rng)
    pipe = case.pipe(level, weights, tmp_path)
    depth = filtered[0].shape[-1] if filtered else 0
    case.check(pipe, weights, *case.inputs(2, rng), depth)


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_window_does_not_see_does_not_matter(
    level: str, filtered: list[Array], chance: random.Random, rng: np.random.Generator,
    tmp_path: Path,
) -> None:  # fmt: skip
    case = Case((13, 9), (3, 3), (1, 1), 4, 21)
    weights = case.weights(rng)
    pipe = case.pipe(level, weights, tmp_path)
    for odd in (np.inf, -np.inf, np.nan, 1e37, 1e30, 1e-40):
        x, z = case.inputs(2, rng)
        x[chance.randrange(2), chance.randrange(4), chance.randrange(13), chance.randrange(9)] = odd
        case.check(pipe, weights, x, z)
    assert len(filtered) == 1


@pytest.mark.parametrize("odd", [np.inf, np.nan, 1e30])
def test_weights_that_are_too_large_are_not_transformed(
    odd: float, filtered: list[Array], rng: np.random.Generator, tmp_path: Path
) -> None:
    case = Case((6, 7), (3, 3), (1, 1), 4, 21)
    weights = case.weights(rng)
    weights["k"][3, 2, 1, 0] = odd
    case.check(case.pipe(LEVELS[-1], weights, tmp_path), weights, *case.inputs(1, rng))
    assert not filtered


def test_only_where_it_is_quicker(rng: np.random.Generator, tmp_path: Path) -> None:
    """64 channels of 56 x 56 places are filtered, and one is not."""
    for channels, arrays in ((64, 3), (1, 2)):
        case = Case((56, 56), (3, 3), (1, 1), channels, 64)
        assert len(case.plan(LEVELS[-1], case.weights(rng), tmp_path).arrays) == arrays


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: f"{c['source']}{c['kernel']}")
def test_every_access_is_proved_to_be_inside(
    case: dict[str, Any], filtered: list[Array], rng: np.random.Generator
) -> None:
    weights = rng.standard_normal((case["outer"], case["source"][1], *case["kernel"]), np.float32)
    built = convolution_of(case, weights)
    graph, _ = run_passes(built, pipeline_of(lambda *_: np.zeros(0)), Bounds())
    assert len(filtered) == 1
    for group in join(graph, partition(graph)).groups:
        kernel = lower(graph, group, Sites(), CPU).kernel
        assert verify_kernel(kernel, graph.facts).open == []
        assert parse_kernel(print_kernel(kernel)) == kernel
