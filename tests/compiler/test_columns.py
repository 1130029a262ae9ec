"""Reductions whose memory runs along what is kept: they accumulate columns side by side."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse
from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.merging import merged
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import Alloc, For
from stagefuse.dsl.dims import const
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS
from .ir_cases import kernels_of, of_text

Array = np.ndarray[Any, Any]
MATRICES = "pipeline main(x: f32[M, N], y: f32[N, M]):\n"
HEADS = "pipeline main(p: f32[1, 3, 1, N], v: f32[1, 3, N, 40], k: f32[1, 3, N, 40]):\n"
EXPERTS = "pipeline main(x: f32[T, D], at: i64[T], w: f32[E, D, N], v: f32[D, E]):\n"
CASES = {
    "down": (MATRICES, "sum(x, axis=0)", True),
    "down, kept": (MATRICES, "sum(x, axis=0, keepdims=True)", True),
    "across a transpose": (MATRICES, "max(transpose(x, [1, 0]), axis=1)", True),
    "along": (MATRICES, "sum(x, axis=1)", False),
    "along, transposed": (MATRICES, "sum(transpose(x, [1, 0]), axis=0)", False),
    "places down": (MATRICES, "argmax(x, axis=0)", True),
    "places along": (MATRICES, "argmax(x, axis=1)", False),
    "both ways": (MATRICES, "sum(x + transpose(y, [1, 0]), axis=0)", False),
    "weights by rows": (HEADS, "p @ v", True),
    "rows by keys": (HEADS, "v[:, :, :1] @ transpose(k, [0, 1, 3, 2])", False),
    "matrices of a table": (EXPERTS, "y[t, n] = sum[d] x[t, d] * w[at[t], d, n]", True),
    "rows of a table": (EXPERTS, "y[d, n] = sum[t] w[at[t], d, n]", True),
    "columns of a table": (EXPERTS, "y[t] = sum[d] x[t, d] * v[d, at[t]]", False),
}


@pytest.mark.parametrize("name", CASES)
def test_columns_are_chosen_by_memory(name: str) -> None:
    head, body, wanted = CASES[name]
    (kernel,) = kernels_of(of_text(f"{head}    {body}\n").passed())
    assert any(isinstance(s, Alloc) and s.name.startswith("columns") for s in kernel.body) == wanted


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] is MATRICES])
def test_results(name: str, rng: np.random.Generator) -> None:
    pipe = stagefuse.compile(f"{MATRICES}    {CASES[name][1]}\n", device="cpu")
    for m, n in ((1, 1), (2, 7), (33, 257), (300, 1)):
        x, y = rng.normal(0, 1, (m, n)).astype("f4"), rng.normal(0, 1, (n, m)).astype("f4")
        wide = {"x": x.astype("f8"), "y": y.astype("f8"), "sum": np.sum, "max": np.max}
        wide["argmax"] = np.argmax
        wanted = eval(CASES[name][1], wide | {"transpose": np.transpose})
        # each addition is off by half a unit of a sum that is well below 64
        np.testing.assert_allclose(pipe(x=x, y=y), wanted, rtol=0, atol=(m + n) * 2**-19)


def test_rows_by_matrices_of_a_table(rng: np.random.Generator) -> None:
    text = f"""{EXPERTS}    y[t, n] = sum[d] x[t, d] * w[at[t], d, n]
    z[d, n] = sum[t] w[at[t], d, n]
    y, z
"""
    pipe = stagefuse.compile(text, device="cpu")
    for t, d, n in ((1, 1, 1), (3, 7, 257), (17, 33, 8), (0, 5, 9), (4, 0, 3), (4, 5, 3)):
        x, w = rng.normal(0, 1, (t, d)).astype("f4"), rng.normal(0, 1, (3, d, n)).astype("f4")
        at = rng.integers(-3, 3, t)
        y, z = pipe(x=x, at=at, w=w, v=np.zeros((d, 3), "f4"))
        wanted = np.einsum("td,tdn->tn", x.astype("f8"), w[at].astype("f8"))
        # each addition is off by half a unit of a sum that is well below 64
        np.testing.assert_allclose(y, wanted, rtol=0, atol=d * 2**-19)
        np.testing.assert_allclose(z, w[at].astype("f8").sum(0), rtol=0, atol=t * 2**-19)
        for place in range(t if d else 0):  # one of several rows that are read at a time
            wrong = np.where(np.arange(t) == place, 7, at)
            with pytest.raises(stagefuse.IndexOutOfRange, match="it is 7, the axis has size 3"):
                pipe(x=x, at=wrong, w=w, v=np.zeros((d, 3), "f4"))


def test_products_of_one_row(rng: np.random.Generator) -> None:
    pipe = stagefuse.compile(f"{HEADS}    p @ v\n", device="cpu")
    for n in (0, 1, 5, 130):
        p = rng.normal(0, 1, (1, 3, 1, n)).astype("f4")
        v, k = (rng.normal(0, 1, (1, 3, n, 40)).astype("f4") for _ in range(2))
        wanted = p.astype("f8") @ v
        np.testing.assert_allclose(pipe(p=p, v=v, k=k), wanted, rtol=0, atol=n * 2**-19)


CHANNELS = "import nn\n\npipeline main(x: f32[B, C, T]) -> f32[B, C, T]:\n"
CHAINS = {
    "softmax": "nn.softmax(x, axis=1)",
    "norm": "(x - mean(x, axis=1, keepdims=True)) * rsqrt(var(x, axis=1, keepdims=True) + 0.5)",
    "both": "nn.softmax(x, axis=1) + max(x, axis=[0, 1], keepdims=True)",
    "over two axes": "x - mean(x, axis=[0, 1], keepdims=True)",
}


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


@pytest.mark.parametrize("name", CHAINS)
def test_what_follows_a_reduction_down_columns(name: str, rng: np.random.Generator) -> None:
    text = f"{CHANNELS}    {CHAINS[name]}\n"
    statements = [s for kernel in kernels_of(of_text(text).passed()) for s in kernel.body]
    assert any(isinstance(s, Alloc) and s.name.startswith("columns") for s in statements)
    pipe = stagefuse.compile(text, device="cpu")
    meaning = CHAINS[name].replace("nn.", "").replace("[0, 1]", "(0, 1)")
    names = {"max": np.max, "mean": np.mean, "var": np.var, "softmax": softmax}
    for shape in ((1, 1, 1), (2, 7, 3), (3, 33, 257), (1, 300, 16), (2, 5, 513)):
        x = rng.normal(0, 1, shape).astype("f4")
        wanted = eval(meaning, names | {"x": x.astype("f8"), "rsqrt": lambda v: v**-0.5})
        # sums of up to 300 terms below 32, each off by half a unit; what follows adds a few more
        np.testing.assert_allclose(pipe(x=x), wanted, rtol=0, atol=(shape[1] + 8) * 2**-19)


@pytest.mark.parametrize("kind", ["argmax", "argmin"])
def test_places_of_nan_infinities_and_equals(kind: str) -> None:
    text = f"pipeline main(x: f32[M, 2, N]) -> i64[N]:\n    {kind}(x, axis=[0, 1])\n"
    x = np.zeros((5, 2, 19), "f4")
    x[3, 1, ::3] = np.nan
    x[2, 0, 1::3], x[4, 1, 1::3] = np.inf, -np.inf
    x[:, :, 2] = np.inf if kind == "argmin" else -np.inf
    wanted = getattr(np, kind)(x.reshape(10, 19), axis=0)
    np.testing.assert_array_equal(stagefuse.compile(text, device="cpu")(x=x), wanted)


@pytest.mark.parametrize("size", ["5", "N"])
def test_rows_that_are_conditional(size: str, rng: np.random.Generator) -> None:
    """What holds of a loop's turns, several rows each, does not hold of the rows."""
    rows = {"5": "8", "N": "N + 3"}[size]
    text = f"""pipeline main(x: f32[{size}, M]) -> (f32[M], i64[M], f32[M]):
    y = pad(x, [(0, 3), (0, 0)], value=-1.5)
    keep = iota({rows})[:, None] < {size} - 1
    sum(y, axis=0), argmax(y, axis=0), sum(select(keep, y, 0.5), axis=0)
"""
    pipe = stagefuse.compile(text, device="cpu")
    for n, m in ((5, 1), (5, 300), (30, 19), (8, 8), (0, 3))[: 2 if size == "5" else None]:
        x = rng.integers(-9, 9, (n, m)).astype("f4")
        y = np.pad(x, ((0, 3), (0, 0)), constant_values=-1.5)
        masked = np.where(np.arange(n + 3)[:, None] < n - 1, y, 0.5)
        for found, wanted in zip(
            pipe(x=x), (y.sum(axis=0), y.argmax(axis=0), masked.sum(axis=0)), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


IMAGES: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "softmax": ("nn.softmax(x, axis=1)", lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)),
    "logarithms": ("nn.log_softmax(x, axis=1)",
                   lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))),
    "largest": ("x / max(abs(x), axis=1, keepdims=True)",
                lambda x: x / np.abs(x).max(1, keepdims=True)),
    "two axes": ("x - mean(x, axis=(1, 2), keepdims=True)",
                 lambda x: x - x.mean((1, 2), keepdims=True)),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", IMAGES)
def test_channels_of_small_images(
    name: str, level: str, rng: np.random.Generator, chance: random.Random, tmp_path: Path
) -> None:
    """Their places are columns of one block, whatever the last axis alone has."""
    body, meaning = IMAGES[name]
    sizes = [(7, 7), (1, 9), (3, 2), *((chance.randrange(1, 17), chance.randrange(1, 17)),) * 2]
    for h, w in sizes:
        c = chance.randrange(1, 40)
        (tmp_path / "p.pipe").write_text(
            f"import nn\n\npipeline main(x: f32[2, {c}, {h}, {w}]):\n    {body}\n"
        )
        pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=1)
        x = rng.uniform(-3, 3, (2, c, h, w)).astype("f4")
        # exponentials to 2 units, up to c * h sums of them or of 3, and a few more roundings
        atol = (c * h + 16) * 3 * 2.0**-23
        np.testing.assert_allclose(pipe(x=x), meaning(x.astype("f8")), rtol=0, atol=atol)


def test_places_of_a_small_image_are_one_block() -> None:
    text = "import nn\n\npipeline main(x: f32[B, 512, 7, 7]):\n    nn.softmax(x, axis=1)\n"
    (kernel,) = kernels_of(of_text(text).passed())
    assert [name for name, _ in kernel.parallel] == ["d0"]
    loops = [s for s in walk(merged(kernel).body) if isinstance(s, For) and s.vector]
    assert all(s.hi == const(49) for s in loops)


@pytest.mark.parametrize(
    "rows, columns, dtype, block",
    [
        (4096, 4096, "f32", 1024),
        (1024, 14336, "f32", 4096),
        (64, 14336, "f32", 1024),
        (1024, 14336, "f64", 2048),
        (1024, 8192, "f32", 2048),
        (4096, 300, "f32", 256),
    ],
)
def test_blocks_of_columns(rows: int, columns: int, dtype: str, block: int) -> None:
    """They are longer where that leaves enough for threads, longest of what no cache holds."""
    text = f"pipeline main(x: {dtype}[{rows}, {columns}]):\n    sum(x, axis=0)\n"
    (kernel,) = kernels_of(of_text(text).passed())
    (scratch,) = (s for s in kernel.body if isinstance(s, Alloc))
    assert scratch.shape[-1] == const(block)
