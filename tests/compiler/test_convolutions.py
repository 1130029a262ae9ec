"""Convolutions by stretches of their source, of every step, shift, border and size."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.graph import Contract, Graph, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.kernel_ir import For, Kernel, TileProduct
from stagefuse.compiler.kernel_text import parse_kernel, print_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.lower import Sites, lower
from stagefuse.compiler.lower.convolution import _Striped
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.patterns.windows import Windows, windows_of
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import run_passes
from stagefuse.compiler.schedule import CPU
from stagefuse.dsl.dims import Expr, as_expr, floordiv, sym
from stagefuse.dsl.dtypes import BF16, F32, F64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS
from .graph_run import both, graph_of, native
from .ir_cases import lowered

Size = int | str | Expr


def convolution(
    source: Sequence[Size], outer: int, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], dtype: DType = F32, relu: bool = False,
    weights: np.ndarray[Any, Any] | None = None,
) -> Graph:  # fmt: skip
    """The graph of x [B, C, space...] with w [O, C, kernel...], and a bias after it; with constant
    weights if any are given."""
    b = Builder(Facts().with_ranges({"B": (0, 8), "H": (9, 300), "W": (9, 300)}))
    sizes = [sym(s) if isinstance(s, str) else as_expr(s) for s in source]
    x = b.input("x", TensorType(dtype, tuple(sizes)))
    if weights is None:
        w = b.input("w", TensorType(dtype, (as_expr(outer), sizes[1], *map(as_expr, kernel))))
    else:
        w = b.constant(weights, dtype)
    bias = b.input("bias", TensorType(dtype, (as_expr(outer),)))
    seen: Ref = b.map("maximum", x, b.scalar(0.0, dtype, sizes)) if relu else x
    space = range(len(kernel))
    around = [sizes[a + 2] + 2 * padding[a] for a in space]
    if any(padding):
        seen = b.view(
            seen, [*sizes[:2], *around],
            lambda *at: [*at[:2], *(at[a + 2] - padding[a] for a in space)],
            lambda *at: [e for a in space if padding[a] for e in
                         (at[a + 2] - padding[a], sizes[a + 2] + padding[a] - 1 - at[a + 2])],
        )  # fmt: skip
    results = [
        floordiv(around[a] - dilation[a] * (kernel[a] - 1) - 1, stride[a]) + 1 for a in space
    ]
    domain = [sizes[0], as_expr(outer), *results, sizes[1], *map(as_expr, kernel)]
    n = len(kernel)

    def windows(*at: Expr) -> list[Expr]:
        moved = [at[2 + a] * stride[a] + at[3 + n + a] * dilation[a] for a in space]
        return [at[0], at[2 + n], *moved]

    left = b.view(seen, domain, windows)
    right = b.view(w, domain, lambda *at: [at[1], *at[2 + n :]])
    total = b.reduce("sum", b.map("mul", left, right), list(range(2 + n, len(domain))))
    added = b.view(bias, domain[: 2 + n], lambda *at: [at[1]])
    return graph_of(b, [b.map("add", total, added)])


CASES: list[dict[str, Any]] = [
    dict(source=("B", 3, 23, 29), outer=20, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    dict(source=("B", 16, 7, 7), outer=37, kernel=(3, 3), padding=(1, 1)),
    dict(source=(2, 5, 14, 14), outer=16, kernel=(3, 3), padding=(1, 1), relu=True),
    dict(source=(1, 4, 1, 17), outer=9, kernel=(1, 3), padding=(0, 1)),
    dict(source=(1, 4, 17, 5), outer=9, kernel=(3, 3), padding=(2, 2)),
    dict(source=(1, 70, 9, 9), outer=40, kernel=(3, 3)),
    dict(source=("B", 20, 9, 9), outer=30, kernel=(1, 1), stride=(2, 2)),
    dict(source=("B", 20, 11, 13), outer=30, kernel=(1, 1)),
    dict(source=("B", 20, 11, 13), outer=300, kernel=(1, 1)),
    dict(source=(1, 6, 40, 31), outer=13, kernel=(5, 3), stride=(3, 2), padding=(2, 1)),
    dict(source=(1, 6, 40, 31), outer=13, kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
    dict(source=(1, 6, 40, 31), outer=13, kernel=(3, 5), stride=(2, 3), padding=(5, 7),
         dilation=(2, 3)),
    dict(source=(1, 3, 9, 700), outer=17, kernel=(3, 3), padding=(1, 1)),
    dict(source=("B", 12, 101), outer=33, kernel=(5,), padding=(2,)),
    dict(source=(2, 12, 1501), outer=33, kernel=(3,), stride=(2,), padding=(1,)),
    dict(source=(2, 5, 6, 9, 11), outer=20, kernel=(3, 3, 3), padding=(1, 1, 1)),
    dict(source=("B", 3, 7, 12, 14), outer=17, kernel=(3, 5, 3), stride=(2, 2, 1),
         padding=(2, 2, 1), dilation=(2, 1, 1)),
    dict(source=(1, 5, "H", "W"), outer=19, kernel=(3, 3), padding=(1, 1)),
    dict(source=(1, 5, "H", "W"), outer=19, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    dict(source=(1, 5, "H", "W"), outer=19, kernel=(1, 1)),
    dict(source=(1, 5, 8, "W"), outer=290, kernel=(1, 1)),
    dict(source=("B", 32, 8, 8), outer=64, kernel=(3, 3), padding=(1, 1)),
    dict(source=(1, 24, 10, 12), outer=150, kernel=(2, 3), padding=(0, 2), dilation=(2, 3)),
    dict(source=(1, 3, 17, 19), outer=7, kernel=(3, 3), padding=(1, 1), dtype=F64),
    dict(source=(1, 3, 17, 19), outer=7, kernel=(3, 3), padding=(1, 1), dtype=BF16),
]  # fmt: skip


def of(case: dict[str, Any], weights: np.ndarray[Any, Any] | None = None) -> Graph:
    ones = (1,) * len(case["kernel"])
    zeros = (0,) * len(ones)
    others = {"stride": ones, "padding": zeros, "dilation": ones, "weights": weights}
    return convolution(**{**others, **case})


@pytest.mark.parametrize(
    ("case", "level"),
    [(c, level) for level in LEVELS for c in (CASES if level == LEVELS[-1] else CASES[::3])],
    ids=lambda c: c if isinstance(c, str) else f"{c['source']}{c['kernel']}",
)
def test_convolution(case: dict[str, Any], level: str, rng: np.random.Generator) -> None:
    graph = of(case)
    dims = [s for s in case["source"] if isinstance(s, str)]
    pipe = native(graph, dims, levels=(level,))
    dtype = case.get("dtype", F32)
    for number in range(3):
        sizes = {d: int(rng.integers(0, 4) if d == "B" else rng.integers(9, 130)) for d in dims}
        shape = [sizes[s] if isinstance(s, str) else s for s in case["source"]]
        depth = int(np.prod([shape[1], *case["kernel"]]))
        of_weights = (case["outer"], shape[1], *case["kernel"])
        given = {"x": shape, "w": of_weights, "bias": (case["outer"],)}
        feeds = {n: rng.standard_normal(s).astype(dtype.numpy) for n, s in given.items()}
        ((found, wanted),) = both(graph, feeds, sizes, pipe)
        magnitudes = {k: np.abs(v) for k, v in feeds.items()}
        ((_, scale),) = both(graph, magnitudes, sizes, pipe)
        # each product is added at most K times, each time rounding once (Higham 2002, section 3.1)
        unit = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-24}[dtype]
        error = np.abs(found.astype(np.float64) - wanted)
        sums = wanted - feeds["bias"].astype(np.float64).reshape(-1, *(1,) * len(case["kernel"]))
        # a sum is rounded to bf16, and again with the bias
        last = 2.0**-7.99 * (np.abs(wanted) + np.abs(sums)) if dtype == BF16 else 0
        assert np.all(error <= (depth + 2) * (unit + 2.0**-50) * scale + last)
        if not dims:
            break
        print(number, sizes, level)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['source']}{c['kernel']}")
def test_every_access_is_proved_to_be_inside(case: dict[str, Any]) -> None:
    graph, _ = run_passes(of(case), pipeline_of(lambda *_: np.zeros(0)), Bounds())
    products = [n.id for n in graph.nodes.values() if isinstance(n.primitive, Contract)]
    assert products and all(windows_of(graph, n) is not None for n in products)
    found = []
    for group in join(graph, partition(graph)).groups:
        kernel = lower(graph, group, Sites(), CPU).kernel
        found += [s for s in walk(kernel.body) if isinstance(s, TileProduct)]
        assert verify_kernel(kernel, graph.facts).open == []
        assert parse_kernel(print_kernel(kernel)) == kernel
    assert all(s.panel_place is not None or s.panel_row is not None for s in found)


def kernel_of_product(graph: Graph) -> Kernel:
    """The kernel of the only product of a graph."""
    graph, _ = run_passes(graph, pipeline_of(lambda *_: np.zeros(0)), Bounds())
    kernels = [lower(graph, g, Sites(), CPU).kernel for g in join(graph, partition(graph)).groups]
    (kernel,) = (k for k in kernels if any(isinstance(s, TileProduct) for s in walk(k.body)))
    return kernel


@pytest.mark.parametrize(("size", "panels"), [(8, 1), (56, 9)])
def test_columns_of_short_rows_lie_without_gaps(size: int, panels: int) -> None:
    """64 places of 8 x 8 are one panel of 64, where 71 columns would be two; seven rows of 56 are
    nine panels of 48 with the gaps, which are few."""
    case = {"source": (1, 32, size, size), "outer": 64, "kernel": (3, 3), "padding": (1, 1)}
    kernel = kernel_of_product(of(case))
    (loop,) = (s for s in walk(kernel.body) if isinstance(s, For) and s.index == "p")
    assert loop.hi.as_int() == panels


SPREAD = [
    dict(source=("B", 3, 23, 29), outer=20, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    dict(source=(1, 6, 40, 31), outer=13, kernel=(5, 3), stride=(3, 2), padding=(2, 1)),
    dict(source=(1, 5, 12, 31), outer=13, kernel=(3, 3), padding=(2, 2), dilation=(2, 3)),
    dict(source=(2, 5, 6, 5), outer=30, kernel=(3, 5), padding=(0, 3), relu=True),
    dict(source=("B", 12, 101), outer=33, kernel=(5,), padding=(2,)),
    dict(source=(1, 3, 7, 12, 14), outer=17, kernel=(3, 3, 4), stride=(2, 1, 3), padding=(1, 1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", SPREAD, ids=lambda c: f"{c['source']}{c['kernel']}")
def test_shifts_in_planes_of_their_own(
    case: dict[str, Any], level: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rules choose."""
    take, spread = _Striped._take, []

    def prefer(self: _Striped, windows: Windows) -> float:
        spread.append(windows.axes[-1].spread)
        return -take(self, windows) if spread[-1] else take(self, windows)

    monkeypatch.setattr(_Striped, "_take", prefer)
    test_convolution(case, level, rng)
    test_every_access_is_proved_to_be_inside(case)
    assert spread and all(spread[1::2])


def test_what_every_window_reads_again_is_stored(rng: np.random.Generator) -> None:
    """As many elements go in as come out, and each is read by 25 windows."""
    text = """
import nn
pipeline p(x: f32[B, 4, H, W], w: f32[4, 1, 5, 5]):
    y = nn.gelu_tanh(x)
    nn.convolve2d(pad(y, [(0, 0), (0, 0), (2, 2), (2, 2)]), w, 1, 1, 4)
"""
    pipe = sf.compile(text)
    assert len(pipe.report().kernels) == 2
    x = rng.standard_normal((2, 4, 7, 9), np.float32)
    w = rng.standard_normal((4, 1, 5, 5), np.float32)
    wide = x.astype(float)
    y = 0.5 * wide * (1 + np.tanh(0.7978845608028654 * (wide + 0.044715 * wide**3)))
    padded = np.pad(y, ((0, 0), (0, 0), (2, 2), (2, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(2, 3))
    want = np.einsum("bchwij,cij->bchw", windows, w[:, 0])
    np.testing.assert_allclose(pipe(x=x, w=w), want, rtol=0, atol=1e-5)


def test_windows_at_sizes_that_are_quotients_are_not_stored(rng: np.random.Generator) -> None:
    """Their positions hold many divisions as text, and few that differ: those of the sizes."""
    text = """
import nn
pipeline p(x: f32[B, 3, H, W], v: f32[6, 3, 4, 4], w: f32[5, 6, 2, 2]):
    nn.convolve2d(nn.relu(nn.convolve2d(x, v, 4, 1, 1)), w, 2, 1, 1)
"""
    pipe = sf.compile(text)
    assert len(pipe.report().kernels) == 2
    v = rng.standard_normal((6, 3, 4, 4), np.float32)
    w = rng.standard_normal((5, 6, 2, 2), np.float32)
    for high, wide in ((8, 8), (27, 41)):
        x = rng.standard_normal((2, 3, high, wide), np.float32)
        want, most = x.astype(float), abs(x)
        for kernel, step in ((v, 4), (w, 2)):
            for k, values in enumerate((want, most)):
                of = np.lib.stride_tricks.sliding_window_view(values, (step, step), axis=(2, 3))
                of = of[:, :, ::step, ::step]
                new = np.einsum("bchwij,ocij->bohw", of, kernel if k == 0 else abs(kernel))
                want, most = (new, most) if k == 0 else (want, new)
            want = np.maximum(want, 0) if step == 4 else want
        bound = 76 * 2.0**-24 * most  # two sums, of 48 and 24: Higham 2002, section 3.1
        assert np.all(abs(pipe(x=x, v=v, w=w) - want) <= bound)


@pytest.mark.parametrize("level", LEVELS)
def test_few_places_are_rows_and_weights_lie_in_panels(
    level: str, chance: random.Random, rng: np.random.Generator, tmp_path: Path
) -> None:
    high, wide = (chance.randrange(1, 5) for _ in range(2))
    channels, out = (chance.randrange(17, 70) for _ in range(2))
    kernel = rng.standard_normal((out, channels, 3, 3), np.float32)
    np.savez(tmp_path / "w.npz", **{"c.weight": kernel})
    (tmp_path / "p.pipe").write_text(f"""
import nn
weights w = "w.npz"
pipeline p(x: f32[B, {channels}, {high}, {wide}]) -> f32[B, {out}, {high}, {wide}]:
    nn.relu(nn.conv2d(x, w.c, padding=1))
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for b in (0, 1, 7):
        x = rng.standard_normal((b, channels, high, wide), np.float32)
        padded = np.pad(x.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        want = np.einsum("bchwij,ocij->bohw", windows, kernel)
        most = np.einsum("bchwij,ocij->bohw", abs(windows), abs(kernel))
        bound = (9 * channels + 2) * 2.0**-24 * most  # Higham 2002, section 3.1
        assert np.all(abs(pipe(x=x) - np.maximum(want, 0)) <= bound)
    # the weights' panels are made while compiling
    assert len(pipe.report().kernels) == 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stride", [1, 2])
def test_places_that_fill_no_panels_are_rows_of_a_kernel_of_one_element(
    level: str, stride: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    """49 places take four vectors with 15 lanes of padding, 64 channels four without."""
    size, channels = stride * 6 + 1, 37
    kernel = rng.standard_normal((64, channels, 1, 1), np.float32)
    np.savez(tmp_path / "w.npz", **{"c.weight": kernel})
    (tmp_path / "p.pipe").write_text(f"""
import nn
weights w = "w.npz"
pipeline p(x: f32[B, {channels}, {size}, {size}], y: f32[B, 64, 7, 7]) -> f32[B, 64, 7, 7]:
    nn.relu(nn.conv2d(x, w.c, stride={stride}) + y)
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for b in (0, 1, 5):
        x = rng.standard_normal((b, channels, size, size), np.float32)
        y = rng.standard_normal((b, 64, 7, 7), np.float32)
        seen = x[:, :, ::stride, ::stride].astype(float)
        want = np.einsum("bchw,oc->bohw", seen, kernel[:, :, 0, 0]) + y
        most = np.einsum("bchw,oc->bohw", abs(seen), abs(kernel[:, :, 0, 0])) + abs(y)
        bound = (channels + 2) * 2.0**-24 * most
        assert np.all(abs(pipe(x=x, y=y) - np.maximum(want, 0)) <= bound)
    assert len(pipe.report().kernels) == 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("out", [1, 5])
def test_a_part_of_a_tensor_whose_channels_lie_innermost(
    level: str, out: int, chance: random.Random, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Of one channel in the result columns are accumulated, of several a stripe is taken."""
    high, wide, cut = 7, chance.randrange(30, 60), chance.randrange(9, 25)
    (tmp_path / "p.pipe").write_text(f"""
import nn
pipeline p(y: f32[B, {high}, {wide}, 3], w: f32[{out}, 3, 3, 9]) -> f32[B, {out}, {high}, {cut}]:
    x = transpose(y[:, :, :{cut}], [0, 3, 1, 2])
    nn.gelu(nn.convolve2d(pad(x, [(0, 0), (0, 0), (1, 1), (4, 4)]), w, 1, 1, 1))
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    w = rng.standard_normal((out, 3, 3, 9), np.float32)
    for b in (0, 1, 3):
        y = rng.standard_normal((b, high, wide, 3), np.float32)
        x = y[:, :, :cut].astype(float).transpose(0, 3, 1, 2)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (4, 4)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 9), axis=(2, 3))
        want = np.einsum("bchwij,ocij->bohw", windows, w)
        most = np.einsum("bchwij,ocij->bohw", abs(windows), abs(w))
        gelu = want * (1 + np.vectorize(math.erf, "d")(want / np.sqrt(2))) / 2
        # gelu's slope is at most 1.13, and it is off by few ulp of itself and of what it adds
        bound = 1.2 * (3 * 27 + 8) * 2.0**-24 * most
        assert np.all(abs(pipe(y=y, w=w) - gelu) <= bound)
    assert len(pipe.report().kernels) == 1


def convolved(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a 3 x 3 convolution that keeps an image's size is, in float64."""
    padded = np.pad(x.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, w.astype(float))


@pytest.mark.parametrize("level", LEVELS)
def test_convolutions_of_the_same_windows_copy_a_stripe_each(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """The windows, nine times as many elements as the image has, are not stored for both."""
    (tmp_path / "p.pipe").write_text("""
import nn
pipeline p(x: f32[B, 5, 19, 23], v: f32[20, 5, 3, 3], w: f32[33, 5, 3, 3]):
    y = nn.relu(nn.convolve2d(pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), v, 1, 1, 1))
    z = nn.silu(nn.convolve2d(pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), w, 1, 1, 1))
    y, z
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    assert len(pipe.report().kernels) == 2
    v, w = (rng.standard_normal((n, 5, 3, 3), np.float32) for n in (20, 33))
    for b in (0, 1, 3):
        x = rng.standard_normal((b, 5, 19, 23), np.float32)
        y, z = pipe(x=x, v=v, w=w)
        # Higham 2002, section 3.1; silu's slope is at most 1.1, and it is off by few ulp
        most = 2**-24 * convolved(abs(x), abs(v))
        assert np.all(abs(y - np.maximum(convolved(x, v), 0)) <= 47 * most)
        want, most = convolved(x, w), 2**-24 * convolved(abs(x), abs(w))
        assert np.all(abs(z - want / (1 + np.exp(-want))) <= 1.1 * 55 * most)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("parts", [3, 20])
def test_the_parts_of_a_concatenation_are_copied_one_after_the_other(
    parts: int, level: str, chance: random.Random, rng: np.random.Generator, tmp_path: Path
) -> None:
    """No element of a stripe is chosen among three parts; of twenty, among two at most."""
    counts = [chance.randrange(1, 5) for _ in range(parts)]
    total = sum(counts)
    given = ", ".join(f"x{n}: f32[B, {c}, 17, 13]" for n, c in enumerate(counts))
    text = f"""
import nn
pipeline p({given}, w: f32[19, {total}, 3, 3]):
    x = concat([{", ".join(f"x{n} + 1.0" for n in range(parts))}], 1)
    nn.relu(nn.convolve2d(pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), w, 1, 1, 1))
"""
    kernels = lowered(text)
    assert len(kernels) == 1 and ("select" in print_kernel(kernels[0])) == (parts > 16)
    (tmp_path / "p.pipe").write_text(text)
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    w = rng.standard_normal((19, total, 3, 3), np.float32)
    for b in (0, 1, 3):
        x = [rng.standard_normal((b, c, 17, 13), np.float32) for c in counts]
        whole = np.concatenate(x, 1).astype(float) + 1
        want = np.maximum(convolved(whole, w), 0)
        bound = (9 * total + 3) * 2.0**-24 * convolved(abs(np.concatenate(x, 1)) + 1.0, abs(w))
        found = pipe(**{f"x{n}": a for n, a in enumerate(x)}, w=w)
        assert np.all(abs(found - want) <= bound)
