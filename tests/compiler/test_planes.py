"""Reductions over windows of an image: their kernels read a stripe, whatever the window is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.build import improved
from stagefuse.compiler.cpu.emit import module_text
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import Alloc, Kernel
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS
from .ir_cases import lowered

Array = np.ndarray[Any, Any]
SIZES = {"B": 2, "H": 37, "W": 300}
FILLS = {"max": ("-1e30", -1e30), "top": ("-math.INF", -np.inf)}


@dataclass(frozen=True)
class Case:
    """Windows of x [B, C, W], [B, C, H, W] or [B, C, D, H, W]: `size`, `step` and so on along its
    last axes."""

    source: tuple[int | str, ...]
    size: tuple[int, ...]
    step: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    kind: str = "sum"  # with weights for each channel; or plain, without; or max; or top of all

    def text(self) -> str:
        axes, (names, shifts) = len(self.size), ("ijk", "pqr")
        x = "x" + str(list(self.source)).replace("'", "")
        ranges = ", ".join(f"{n} in 0..{s}" for n, s in zip(shifts, self.size, strict=False))
        at = ", ".join(
            f"{self.step[a]} * {names[a]} + {self.dilation[a]} * {shifts[a]}" for a in range(axes)
        )
        around = ", ".join(map(str, ((0, 0), (0, 0), *self.padding)))
        fill, kind = FILLS.get(self.kind, ("0.0", 0.0))[0], "max" if self.kind in FILLS else "sum"
        weight = f" * w[c, {', '.join(shifts[:axes])}]" if self.kind == "sum" else ""
        kernel = str([self.source[1], *self.size])
        return f"""
import math

pipeline p(x: f32{x[1:]}, w: f32{kernel}, bias: f32[{self.source[1]}]):
    e = pad(x, [{around}], value={fill})
    y[b, c, {", ".join(names[:axes])}] = {kind}[{ranges}] e[b, c, {at}]{weight}
    maximum(y + bias[:, {", ".join(["None"] * axes)}], 0.0)
"""

    def meaning(self, x: Array, w: Array, bias: Array) -> Array:
        """In float64."""
        axes = tuple(range(2, x.ndim))
        fill = FILLS.get(self.kind, ("0.0", 0.0))[1]
        e = np.pad(x.astype(float), ((0, 0), (0, 0), *self.padding), constant_values=fill)
        reach = [d * (s - 1) + 1 for d, s in zip(self.dilation, self.size, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(e, reach, axis=axes)
        cut = (
            *(slice(None, None, s) for s in self.step),
            *(slice(None, None, d) for d in self.dilation),
        )
        windows = windows[(slice(None), slice(None), *cut)]
        inner = tuple(range(-len(axes), 0))
        around = (1, -1, *(1 for _ in axes))
        if self.kind in FILLS:
            y = windows.max(inner)
        elif self.kind == "plain":
            y = windows.sum(inner)
        else:
            y = (windows * w.reshape(1, len(w), *(1 for _ in axes), *self.size)).sum(inner)
        return np.maximum(y + bias.reshape(around), 0.0)


def case(
    source: tuple[int | str, ...], size: tuple[int, ...], step: int = 1, dilation: int = 1,
    padding: int = 0, kind: str = "sum",
) -> Case:  # fmt: skip
    n = len(size)
    return Case(source, size, (step,) * n, (dilation,) * n, ((padding,) * 2,) * n, kind)


CASES = [
    case((2, 5, 14, 14), (5, 5), padding=2),
    case(("B", 3, 7, 7), (3, 3), padding=1),
    case(("B", 3, 7, 6), (3, 3), padding=2, kind="max"),
    case(("B", 4, 29, 31), (3, 3), step=2, padding=1),
    case(("B", 4, 112, 57), (3, 3), step=2, padding=1, kind="max"),
    case((1, 2, 31, 28), (7, 7), padding=3),
    case((2, 3, 9, 33), (3, 3)),
    case((1, 2, 20, 33), (3, 3), dilation=3, padding=3),
    case((1, 2, 40, 41), (11, 9), padding=4),
    case((1, 2, 13, 40), (3, 37), padding=7),
    case((2, 2, 28, 27), (31, 31), padding=15),
    case((1, 3, 40, 33), (35, 18), step=2, padding=9),
    case((1, 2, 45, "W"), (19, 3), padding=1),
    case((1, 2, 150, 130), (3, 5), padding=2),
    case((1, 3, 8, 700), (3, 3), step=3, dilation=2, padding=1),
    case((2, 5, 28, 28), (3, 3), step=2, padding=1),
    case((2, 5, 14, 14), (3, 3), step=2, padding=1),
    case((1, 3, 27, 26), (7, 7), step=4, padding=3),
    case((2, 3, 101), (31,), padding=15),
    case((2, 3, 1001), (4,), step=3, padding=1),
    case((2, 3, 77), (45,), padding=3, kind="max"),
    case(("B", 3, "H", "W"), (3, 3), padding=1),
    case(("B", 3, "H", "W"), (3, 3), step=2, padding=1, kind="max"),
    case(("B", 3, 9, "W"), (2, 4), padding=1),
    case(("B", 3, "H", 19), (5, 1), padding=2),
    case((2, 3, 20, 20), (5, 5), padding=2, kind="max"),
    case(("B", 3, 13, 13), (13, 13), padding=6, kind="max"),
    case(("B", 2, 7, 7), (5, 5), padding=2, kind="max"),
    case((1, 3, 31, 33), (5, 5), step=2, padding=2, kind="plain"),
    case((1, 2, 60, 41), (6, 5), step=3, dilation=2, padding=4, kind="plain"),
    case(("B", 3, "H", 19), (5, 7), padding=2, kind="max"),
    case(("B", 2, "H", "W"), (5, 5), padding=2, kind="max"),
    Case((1, 2, 23, 29), (5, 8), (3, 2), (1, 3), ((1, 4), (7, 2)), "max"),
    Case(("B", 2, 9, "W"), (1, 2), (1, 2), (3, 2), ((5, 3), (4, 3))),
    Case((1, 2, 12, 13), (3, 2), (1, 2), (2, 1), ((0, 3), (2, 0))),
    case((1, 3, 5, 14, 15), (3, 3, 3), padding=1),
    case((1, 2, 8, 21, 18), (3, 3, 3), step=2, padding=1, kind="top"),
    case((2, 2, 6, 13, 12), (2, 3, 3), padding=1, kind="max"),
    case((1, 2, 6, 12, 13), (5, 5, 5), padding=2, kind="top"),
    case(("B", 2, 4, "H", "W"), (3, 3, 3), padding=1, kind="plain"),
    Case((2, 2, 9, 10, 7), (3, 2, 3), (2, 1, 2), (2, 1, 1), ((5, 4), (0, 1), (1, 1)), "plain"),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c.source}{c.size}{c.kind}")
def test_windows_are_reduced_in_a_stripe(
    c: Case, level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "p.pipe").write_text(c.text())
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    assert len(pipe.report().kernels) == 1
    w = rng.standard_normal((c.source[1], *c.size)).astype(np.float32)
    bias = rng.standard_normal(c.source[1]).astype(np.float32)
    for number in range(3):
        sizes = {n: int(rng.integers(9 if n != "B" else 0, most)) for n, most in SIZES.items()}
        shape = [sizes[s] if isinstance(s, str) else s for s in c.source]
        x = rng.standard_normal(shape).astype(np.float32)
        found, want = pipe(x=x, w=w, bias=bias), c.meaning(x, w, bias)
        assert found.shape == want.shape
        # a sum rounds each product and each partial sum once (Higham 2002, section 3.1)
        count = 1 if c.kind in FILLS else w[0].size + 2
        most = c.meaning(abs(x), abs(w), abs(bias))
        assert np.all(abs(found - want) <= count * 2.0**-24 * most), (number, sizes)
        if not any(isinstance(s, str) for s in c.source):
            break


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", ["27", "W"])
def test_windows_of_channels(
    size: str, level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Whole images are joined, as of a local response norm."""
    text = f"""
pipeline p(x: f32[B, 7, 5, {size}]):
    s = pad(x * x, [(0, 0), (2, 3), (0, 0), (0, 0)])
    t[b, c, h, w] = sum[k in 0..6] s[b, c + k, h, w]
    x / (t + 1.0)
"""
    assert any(has_stripe(kernel) for kernel in lowered(text))
    (tmp_path / "p.pipe").write_text(text)
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for batch in (0, 1, 3):
        x = rng.standard_normal((batch, 7, 5, 27)).astype(np.float32)
        squares = np.pad(x.astype(float) ** 2, ((0, 0), (2, 3), (0, 0), (0, 0)))
        total = sum(squares[:, k : k + 7] for k in range(6))
        want = x / (total + 1.0)
        # seven roundings of the divisor, whose terms are positive, and that of the quotient
        np.testing.assert_allclose(pipe(x=x), want, rtol=9 * 2.0**-24, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_any_windows_with_a_stride(
    level: str, rng: np.random.Generator, chance: random.Random, tmp_path: Path
) -> None:
    size, step = (chance.randrange(2, 6), chance.randrange(2, 6)), chance.randrange(2, 6)
    around = tuple((chance.randrange(4), chance.randrange(4)) for _ in size)
    source = (2, 3, chance.randrange(8, 40), chance.randrange(8, 70))
    dilation = (chance.randrange(1, 3), chance.randrange(1, 3))
    kind = chance.choice(["sum", "plain", "max"])
    c = Case(source, size, (chance.randrange(1, 4), step), dilation, around, kind)
    test_windows_are_reduced_in_a_stripe(c, level, rng, tmp_path)


def test_short_rows_with_a_stride_are_read_whole_and_not_gathered() -> None:
    (kernel,) = lowered(case((2, 5, 28, 28), (3, 3), step=2, padding=1).text())
    text = str(improved(module_text([kernel], "v4"), "v4"))
    assert "@llvm.masked.load.v32f32" in text and "masked.gather" not in text


@pytest.mark.parametrize("columns", [10, 13, 14, 28, 41, 62])
def test_short_rows_are_whole_vectors_where_there_are_no_masks(columns: int) -> None:
    (kernel,) = lowered(case((2, 5, 9, 2 * columns), (3, 3), step=2, padding=1).text())
    text = str(improved(module_text([kernel], "v3"), "v3"))
    assert "store <8 x float>" in text
    assert "store float %" not in text  # constants alone


def has_stripe(kernel: Kernel) -> bool:
    return has_scratch(kernel, "stripe")


def has_scratch(kernel: Kernel, name: str) -> bool:
    return any(isinstance(s, Alloc) and s.name.startswith(name) for s in walk(kernel.body))


@pytest.mark.parametrize("c", CASES, ids=lambda c: f"{c.source}{c.size}{c.kind}")
def test_every_access_to_a_stripe_is_proved(c: Case) -> None:
    (kernel,) = lowered(c.text())
    assert has_stripe(kernel)
    is_large = len(c.size) > 1 and min(c.size) >= 5
    apart = is_large and c.kind != "sum" and not isinstance(c.source[-1], str)
    assert has_scratch(kernel, "rows") == apart


def test_windows_side_by_side_need_no_stripe() -> None:
    (kernel,) = lowered("import nn\npipeline p(x: f32[2, 3, 20, 30]):\n    nn.max_pool(x, 2)\n")
    assert not has_stripe(kernel)


@pytest.mark.parametrize("level", LEVELS)
def test_a_window_with_nan_and_infinity(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "p.pipe").write_text(
        "import nn\npipeline p(x: f32[1, 2, 20, 20]):\n    nn.max_pool(x, 3, stride=2, padding=1)\n"
    )
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=1)
    x = rng.standard_normal((1, 2, 20, 20)).astype(np.float32)
    x[0, 0, 3, 4], x[0, 1, 0, 0], x[0, 1, 19, 19] = np.nan, -np.inf, np.inf
    e = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(e, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    np.testing.assert_array_equal(pipe(x=x), windows.max((-1, -2)))


def test_weights_that_differ_from_place_to_place_are_no_window(rng: np.random.Generator) -> None:
    text = """
pipeline p(x: f32[2, 3, 9, 30], w: f32[9, 28, 3]):
    y[b, c, i, j] = sum[q in 0..3] x[b, c, i, j + q] * w[i, j, q]
    y
"""
    (kernel,) = lowered(text)
    assert not has_stripe(kernel)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 9, 30), (9, 28, 3)))
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(float), 3, axis=3)
    want = (windows * w).sum(-1)
    most = (abs(windows) * abs(w)).sum(-1)
    assert np.all(abs(sf.compile(text)(x=x, w=w) - want) <= 4 * 2.0**-24 * most)


@pytest.mark.parametrize("level", LEVELS)
def test_windows_of_a_tensor_whose_channels_lie_innermost(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """As after a norm over channels; the result's lie outermost."""
    text = """
import nn
pipeline p(x: f32[B, 13, 19, 6], w: f32[6, 1, 5, 7]):
    y = pad(transpose(x, [0, 3, 1, 2]), [(0, 0), (0, 0), (2, 2), (3, 3)])
    nn.relu(nn.convolve2d(y, w, 1, 1, 6))
"""
    assert all(has_stripe(kernel) for kernel in lowered(text))
    (tmp_path / "p.pipe").write_text(text)
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    w = rng.standard_normal((6, 1, 5, 7), np.float32)
    for batch in (0, 1, 3):
        x = rng.standard_normal((batch, 13, 19, 6), np.float32)
        padded = np.pad(x.transpose(0, 3, 1, 2).astype(float), ((0, 0), (0, 0), (2, 2), (3, 3)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 7), axis=(2, 3))
        want = np.einsum("bchwij,cij->bchw", windows, w[:, 0])
        most = np.einsum("bchwij,cij->bchw", abs(windows), abs(w[:, 0]))
        # Higham 2002, section 3.1
        assert np.all(abs(pipe(x=x, w=w) - np.maximum(want, 0)) <= 36 * 2.0**-24 * most)


def test_high_windows_are_not_written_out(rng: np.random.Generator) -> None:
    text = """
pipeline p(x: f32[1, 1300, 20]) -> f32[1, 101, 18]:
    y[b, i, j] = max[m in 0..1200, n in 0..3] x[b, i + m, j + n]
    y
"""
    (kernel,) = lowered(text)
    assert len(str(kernel.body)) < 100_000
    x = rng.standard_normal((1, 1300, 20), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (1200, 3), axis=(1, 2))
    np.testing.assert_array_equal(sf.compile(text)(x=x), windows.max(axis=(-2, -1)))
