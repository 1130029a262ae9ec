"""Sums over windows without the taps that see nothing but zeros around an image."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.front import check_source
from stagefuse.compiler.graph import Graph, Reduce
from stagefuse.compiler.passes import seen_taps
from stagefuse.compiler.passes.align_rows import AlignRows
from stagefuse.compiler.passes.seen_taps import SeenTaps
from stagefuse.compiler.passes.simplify import Simplify
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import run_passes
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A convolution of B images [C, H, W] by [out, C, KH, KW]; `around` it are zeros before and
    behind each of its last axes."""

    image: tuple[int, int, int]
    size: tuple[int, int]
    around: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    out: int = 20
    dtype: str = "f32"

    def write(self, folder: Path, w: Array) -> Path:
        np.savez(folder / "w.npz", k=w)
        path = folder / "p.pipe"
        (c, h, wide), (a, d) = self.image, self.around
        at = ", ".join(
            f"{s} * {n} + {e} * {m}"
            for s, n, e, m in zip(self.stride, "ij", self.dilation, "pq", strict=True)
        )
        path.write_text(f"""
weights w = "w.npz"
pipeline p(x: {self.dtype}[B, {c}, {h}, {wide}]):
    e = pad(x, [(0, 0), (0, 0), {a}, {d}])
    y[b, o, i, j] = sum[c, p in 0..{self.size[0]}, q in 0..{self.size[1]}] (
        e[b, c, {at}] * w.k[o, c, p, q]
    )
    maximum(y, 0.0)
""")
        return path

    def meaning(self, x: Array, w: Array) -> Array:
        """In float64."""
        e = np.pad(x.astype(float), ((0, 0), (0, 0), *self.around))
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.size, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(e, reach, axis=(2, 3))
        (a, b), (c, d) = self.stride, self.dilation
        return np.einsum("bchwpq,ocpq->bohw", windows[:, :, ::a, ::b, ::c, ::d], w.astype(float))


def graph_of(path: Path) -> tuple[Graph, Graph]:
    """The graph before the pass and after it."""
    program, found, load = check_source(path, {})
    assert not found
    bounds = Bounds()
    first, _ = run_passes(build_graph(program.pipelines[0]), (Simplify(), AlignRows()), bounds)
    after, _ = run_passes(first, (Simplify(), SeenTaps(load)), bounds)
    return first, after


def sums(graph: Graph) -> list[list[int | None]]:
    """The sizes of what sums of a graph are over."""
    found = [n for n in graph.nodes.values() if isinstance(n.primitive, Reduce)]
    return [
        [graph.type(n.operands[0]).shape[a].as_int() for a in n.primitive.axes] for n in found
    ]  # fmt: skip


def check(c: Case, level: str, rng: np.random.Generator, folder: Path) -> None:
    unit = 2.0**-24 if c.dtype == "f32" else 2.0**-53
    w = rng.standard_normal((c.out, c.image[0], *c.size)).astype(c.dtype.replace("f", "float"))
    pipe = CpuPipeline(compile_file(c.write(folder, w), levels=(level,)), threads=2)
    for batch in (0, 1, 3):
        x = rng.standard_normal((batch, *c.image)).astype(w.dtype)
        found, want, most = pipe(x=x), c.meaning(x, w), c.meaning(abs(x), abs(w))
        assert found.shape == want.shape
        # Higham 2002, section 3.1
        count = w[0].size + 2
        assert np.all(abs(found - np.maximum(want, 0)) <= count * (unit + 2.0**-50) * most)


FAR = [
    Case((128, 33, 31), (3, 1), ((20, 20), (0, 0)), (20, 1)),
    Case((160, 1, 150), (1, 3), ((0, 0), (100, 0)), (1, 50)),
    Case((48, 30, 29), (2, 2), ((16, 9), (5, 8)), (8, 13), (2, 1), dtype="f64"),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("c", FAR, ids=lambda c: f"{c.image}{c.size}")
def test_windows_that_reach_far_are_a_product_for_each_tap(
    c: Case, level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    check(c, level, rng, tmp_path)
    _, after = graph_of(tmp_path / "p.pipe")
    assert len(sums(after)) > 1 and all(np.prod(n) == c.image[0] for n in sums(after))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("c", [
    Case((5, 17, 17), (3, 3), ((24, 24), (9, 24)), (24, 17)),
    Case((3, 9, 20), (7, 3), ((30, 3), (1, 1)), (5, 1)),
], ids=lambda c: f"{c.image}{c.size}")  # fmt: skip
def test_taps_that_see_nothing_are_left_out(
    c: Case, level: str, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_taps, "GAIN", 0.0)
    check(c, level, rng, tmp_path)
    before, after = (sums(g) for g in graph_of(tmp_path / "p.pipe"))
    assert len(after) == 1 and np.prod(after[0]) < np.prod(before[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("c", [
    Case((7, 1, 1), (4, 3), ((3, 3), (2, 2))),
    Case((5, 1, 9), (3, 3), ((2, 2), (1, 1))),
    Case((6, 1, 1), (5, 2), ((8, 8), (3, 3)), (2, 3), (2, 3)),
], ids=lambda c: f"{c.image}{c.size}")  # fmt: skip
def test_a_single_place_is_seen_by_one_tap_of_each_window(
    c: Case, level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """As in a transposed convolution of it."""
    check(c, level, rng, tmp_path)
    _, after = graph_of(tmp_path / "p.pipe")
    (found,) = sums(after)
    assert found[:2] == [c.image[0], 1]


@pytest.mark.parametrize("level", LEVELS)
def test_any_windows(
    level: str, chance: random.Random, rng: np.random.Generator, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever the times are."""
    monkeypatch.setattr(seen_taps, "GAIN", 1e9)

    def some(low: int, high: int) -> tuple[int, int]:
        return chance.randrange(low, high), chance.randrange(low, high)

    dilation, size = some(2, 9), some(1, 3)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    image = (chance.randrange(1, 9), *(r + chance.randrange(9) for r in reach))
    c = Case(image, size, (some(0, 20), some(0, 20)), dilation, some(1, 4), chance.randrange(4, 30))
    print(c)
    check(c, level, rng, tmp_path)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_zero_times_what_is_not_finite_is_not_left_out(value: float, tmp_path: Path) -> None:
    c = Case((2, 4, 4), (3, 3), ((9, 9), (9, 9)), (9, 9))
    w = np.ones((c.out, 2, 3, 3), np.float32)
    w[0, 1, 0, 0] = value
    path = c.write(tmp_path, w)
    before, after = graph_of(path)
    assert sums(before) == sums(after)
    pipe = CpuPipeline(compile_file(path, levels=LEVELS[:1]), threads=1)
    found = pipe(x=np.ones((1, 2, 4, 4), np.float32))
    assert np.isnan(found[0, 0]).all() and (found[0, 1] == 2).all()


def test_adjacent_taps_and_shallow_windows_stay_together(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """The first may be filtered; adding what each tap gives would take longer than the second."""
    for c in (
        Case((64, 7, 7), (3, 3), ((1, 1), (1, 1))),
        Case((2, 33, 33), (3, 3), ((9, 9), (9, 9)), (9, 9)),
    ):
        w = rng.standard_normal((c.out, c.image[0], *c.size), np.float32)
        before, after = (sums(g) for g in graph_of(c.write(tmp_path, w)))
        assert before == after and len(after) == 1
