"""Products of few rows, whose panels are read where they lie: along the depth, and in attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler import driver
from stagefuse.compiler.fusion.join_operands import THIN, THIN_DEPTH, THIN_NARROW
from stagefuse.compiler.kernel_ir import Alloc, Buffer, For, Index, Kernel, Load, Store, TileProduct
from stagefuse.compiler.plan import Plan
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import F16, F32, F64, DType
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.native import detect_level
from stagefuse.runtime.prepared import Evaluator

from .cpu_run import LEVELS, Compiled

UNIT = {F32: 2.0**-24, F64: 2.0**-53}
LEVEL = detect_level() or "v3"


def dots(dtype: DType) -> Kernel:
    """z = x @ y.T, and once more added to it: columns of the panel begin S apart."""
    m, n, k, s = (sym(x) for x in "MNKS")
    buffers = (
        Buffer("x", dtype, (m, k), "in"), Buffer("y", dtype, (n, s), "in"),
        Buffer("z", dtype, (m, n), "out"),
    )  # fmt: skip

    def product(accumulate: bool) -> TileProduct:
        return TileProduct(
            "tile", const(0), const(48), "x", const(0), k, const(1), "y", const(0), m, k, 32, 48,
            accumulate, n, const(1), s,
        )  # fmt: skip

    i, j = Index(sym("i")), Index(sym("j"))
    store = Store("z", (i, j), Load("tile", (i, j), dtype))
    body = (
        Alloc("tile", dtype, (const(32), const(48))), product(False), product(True),
        For("i", const(0), m, (For("j", const(0), n, (store,)),)),
    )  # fmt: skip
    return Kernel(f"dots_{dtype}", buffers, ("K", "M", "N", "S"), (("p", const(1)),), body)


@pytest.mark.parametrize("level", LEVELS)
def test_dot_products_of_every_size(level: str, rng: np.random.Generator) -> None:
    kernels = {dtype: dots(dtype) for dtype in (F32, F64)}
    compiled = Compiled(list(kernels.values()), level)
    sizes = [(m, n, 33) for m in (0, 1, 2, 3, 5, 8, 31, 32) for n in (0, 1, 3, 4, 7, 48)]
    sizes += [(5, 6, k) for k in (0, 1, 7, 8, 15, 16, 17, 64, 1009)]
    for (m, n, k), (dtype, kernel) in ((s, d) for s in sizes for d in kernels.items()):
        x = rng.standard_normal((m, k)).astype(dtype.numpy)
        y = rng.standard_normal((n, k + 3)).astype(dtype.numpy)
        z = np.full((m, n), np.nan, dtype.numpy)
        dims = {"K": k, "M": m, "N": n, "S": k + 3}
        assert compiled(kernel.name, [x, y, z], dims)[0] == 0
        wide = np.longdouble
        wanted = 2 * (x.astype(wide) @ y[:, :k].astype(wide).T)
        scale = 2 * np.abs(x).astype(float) @ np.abs(y[:, :k]).astype(float).T
        assert np.all(np.abs(z - wanted) <= (k + 2) * UNIT[dtype] * scale)


def plan_of(path: Path, text: str, level: str = LEVEL) -> Plan:
    path.write_text(text)
    return driver.compile_file(path, levels=(level,))


def running(plan: Plan, sizes: dict[str, int]) -> list[bool]:
    return [Evaluator(sizes)(s.count) > 0 for s in plan.pipelines[0].steps]


TRANSPOSED = """pipeline main(x: {t}[M, K], y: {t}[N, K], b: {t}[N]) -> {t}[M, N]{where}:
    z[m, n] = sum[k] x[m, k] * y[n, k]
    maximum(z + b, 0)
"""


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("where", ["", "\nwhere M in 1..=36"])
def test_few_rows_by_rows(
    dtype: DType, where: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = plan_of(tmp_path / "p.pipe", TRANSPOSED.format(t=dtype, where=where))
    pipe = CpuPipeline(plan, threads=2)
    for m in (1, 2, 7, 36) if where else (0, 1, 2, 7, 33, 36, 37):
        for n, k in ((1, 20), (49, 0), (97, 65), (5, 1030)):
            x, y = (rng.standard_normal((r, k)).astype(dtype.numpy) for r in (m, n))
            b = rng.standard_normal(n).astype(dtype.numpy)
            wanted = np.maximum(x.astype(np.longdouble) @ y.astype(np.longdouble).T + b, 0)
            scale = np.abs(x).astype(float) @ np.abs(y).astype(float).T + np.abs(b)
            error = np.abs(pipe(x=x, y=y, b=b) - wanted)
            assert np.all(error <= (k + 2) * UNIT[dtype] * scale)
    for m, k in ((1, 3), (2, 3), (16, 65), (17, 65), (36, 145), (37, 145)):
        few = m <= min(THIN, max(k // THIN_DEPTH, 1))
        if m <= 36 or not where:
            packing = [] if where else [not few]
            assert running(plan, {"M": m, "N": 97, "K": k}) == [*packing, not few, few]


BATCHED = """pipeline main(x: f32[B, M, K], y: f32[B, K, N], t: f32[B, N, K])
    -> (a: f32[B, M, N], b: f32[B, M, N]):
    z[i, m, n] = sum[k] x[i, m, k] * t[i, n, k]
    x @ y, z
"""


@pytest.mark.parametrize("level", LEVELS)
def test_few_rows_of_each_of_a_batch(level: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Among them rows that share a set of the cache: those of 1024 and 4096 columns."""
    pipe = CpuPipeline(plan_of(tmp_path / "p.pipe", BATCHED, level), threads=2)
    sizes = [(5, 1, 20, 30), (2, 36, 33, 50), (2, 37, 33, 50), (3, 4, 4, 4), (0, 2, 3, 4)]
    sizes += [(2, m, 20, n) for m in (1, 3, 8, 9) for n in (1024, 4096)]
    for b, m, k, n in sizes:
        x = rng.standard_normal((b, m, k), np.float32)
        y = rng.standard_normal((b, k, n), np.float32)
        wanted = x.astype(float) @ y
        bound = (k + 1) * (2.0**-24 + 2.0**-50) * (np.abs(x).astype(float) @ np.abs(y))
        for found in pipe(x=x, y=y, t=np.ascontiguousarray(y.swapaxes(1, 2))):
            assert np.all(np.abs(found - wanted) <= bound)


ATTENTION = {
    "of heads": ("q: {t}[B, H, T, D], k: {t}[B, H, S, D], v: {t}[B, H, S, D]", "q, k, v", ""),
    "shared": ("q: {t}[B, 6, T, D], k: {t}[B, 2, S, D], v: {t}[B, 2, S, D]", "q, k, v", ""),
    "as they come": (
        "q: {t}[B, T, H, D], k: {t}[B, S, H, D], v: {t}[B, S, H, D]",
        "q[:, :, :, :], k, v", "swapped",
    ),
    "masked": (
        "q: {t}[B, H, T, D], k: {t}[B, H, S, D], v: {t}[B, H, S, D], m: bool[B, S]",
        "q, k, v, mask=m[:, None, None, :]", "",
    ),
}  # fmt: skip


def attention_source(form: str, dtype: DType) -> str:
    parameters, arguments, swapped = ATTENTION[form]
    if swapped:
        arguments = ", ".join(f"swap({x})" for x in "qkv")
    heads = "6" if form == "shared" else "H"
    return (
        "import nn\n\n"
        f"fn swap(x: {dtype}[A, M, C, E]) -> {dtype}[A, C, M, E]:\n"
        "    y[a, c, m, e] = x[a, m, c, e]\n\n"
        f"pipeline main({parameters.format(t=dtype)}) -> {dtype}[B, {heads}, T, D]\n"
        f"where S >= 1:\n    nn.attend({arguments})\n"
    )


@pytest.mark.parametrize("form, dtype", [(form, F32) for form in ATTENTION] + [("of heads", F64)])
def test_few_queries(form: str, dtype: DType, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = plan_of(tmp_path / "p.pipe", attention_source(form, dtype))
    pipe = CpuPipeline(plan, threads=2)
    sizes = [(t, s, d) for t in (1, 3, 36, 37) for s, d in ((1, 8), (5, 3), (130, 64))]
    for t, s, d in [*sizes, (0, 3, 8), (2, 3000, 16)]:
        heads, keys = (6, 2) if form == "shared" else (3, 3)
        inputs: dict[str, np.ndarray[Any, Any]] = {
            name: rng.standard_normal((2, count, length, d)).astype(dtype.numpy)
            for name, count, length in (("q", heads, t), ("k", keys, s), ("v", keys, s))
        }
        wide = {n: np.repeat(x, heads // x.shape[1], 1).astype(float) for n, x in inputs.items()}
        if form == "as they come":
            inputs = {n: np.ascontiguousarray(x.swapaxes(1, 2)) for n, x in inputs.items()}
        scores = wide["q"] @ wide["k"].swapaxes(-1, -2) / np.sqrt(d)
        if form == "masked":
            inputs["m"] = keep = rng.random((2, s)) < 0.7
            keep[:, 0] = True
            scores = np.where(keep[:, None, None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        wanted = weights @ wide["v"]
        # errors of a score in units, twice as a factor of a weight; then those of exp and of sums
        size = np.abs(wide["q"]) @ np.abs(wide["k"]).swapaxes(-1, -2) / np.sqrt(d)
        factor = (2 * (d + 4) * size.max(-1, keepdims=True, initial=0) + 2 * s + 16) * UNIT[dtype]
        bound = 1.1 * factor * (weights @ np.abs(wide["v"]))
        assert np.all(np.abs(pipe(**inputs) - wanted) <= bound + 2.0**-140)
    names = {"B": 2, "H": 3, "S": 130, "D": 64}
    assert running(plan, {**names, "T": 36}) != running(plan, {**names, "T": 37})


CONVERTED = """pipeline main(x: f32[B, M, K], y: {t}[B, K, N], z: {t}[K, N], w: {t}[B, N, K])
    -> (a: f32[B, M, N], b: f32[B, M, N], c: f32[B, M, N]):
    x @ f32(y), x @ f32(z), x @ transpose(f32(w), [0, 2, 1])
"""
KINDS = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8, "u8": np.uint8, "f64": np.float64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS)
def test_few_rows_by_a_matrix_that_is_converted(
    dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = plan_of(tmp_path / "p.pipe", CONVERTED.format(t=dtype))
    pipe = CpuPipeline(plan, threads=2)
    sizes = [(1, 1, 20, 30), (2, 36, 300, 500), (2, 37, 33, 50), (0, 2, 3, 4), (3, 4, 0, 5)]
    for b, m, k, n in sizes:
        x = rng.standard_normal((b, m, k), np.float32)
        shapes = ((b, k, n), (k, n), (b, n, k))
        y, z, w = (rng.integers(0, 100, s).astype(KINDS[dtype]) for s in shapes)
        right = (y, z, w.swapaxes(1, 2))
        for found, matrix in zip(pipe(x=x, y=y, z=z, w=w), right, strict=True):
            wide = matrix.astype(float)
            bound = (k + 1) * (2.0**-24 + 2.0**-50) * (np.abs(x).astype(float) @ np.abs(wide))
            assert np.all(np.abs(found - x.astype(float) @ wide) <= bound)
    few = running(plan, {"B": 1, "M": 32, "K": 65, "N": 97})
    assert sum(few) == 3 < sum(running(plan, {"B": 1, "M": 33, "K": 65, "N": 97}))


BY_A_VECTOR = """pipeline main(x: {t}[{b}M, K], y: {t}[{b}K, N], b: {t}[N]) -> {t}[{b}M, N]:
    maximum(x @ y + b, 0)
"""


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("level", LEVELS)
def test_a_matrix_of_one_column_is_read_where_it_lies(
    level: str, dtype: DType, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Its products are dot products with rows, however many there are."""
    plan = plan_of(tmp_path / "p.pipe", BY_A_VECTOR.format(t=dtype, b=""), level)
    pipe, limit = CpuPipeline(plan, threads=2), THIN_NARROW if level == "v3" else THIN
    sizes = ((1, 17, 1), (36, 300, 1), (101, 37, 1), (40, 0, 1), (70, 1, 1), (70, 33, 2))
    for m, k, n in (*sizes, (257, 33, 2)):
        x, y, b = (rng.standard_normal(s).astype(dtype.numpy) for s in ((m, k), (k, n), n))
        found = np.asarray(pipe(x=x, y=y, b=b))
        wanted = np.maximum(x.astype(np.longdouble) @ y.astype(np.longdouble) + b, 0)
        scale = np.abs(x).astype(float) @ np.abs(y).astype(float) + np.abs(b)
        assert np.all(np.abs(found - wanted) <= (k + 2) * UNIT[dtype] * scale)
        packs = sum(running(plan, {"M": m, "K": k, "N": n})) > 1
        assert packs == (n > 1 and m > limit)


@pytest.mark.parametrize("level", LEVELS)
def test_matrices_of_one_column_in_a_batch(
    level: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = plan_of(tmp_path / "p.pipe", BY_A_VECTOR.format(t="f32", b="B, "), level)
    pipe = CpuPipeline(plan, threads=2)
    for m, k, n in ((1, 17, 1), (101, 37, 1), (40, 0, 1), (70, 33, 2)):
        x, y, b = (rng.standard_normal(s, np.float32) for s in ((3, m, k), (3, k, n), (n,)))
        found = np.asarray(pipe(x=x, y=y, b=b))
        wanted = np.maximum(x.astype(float) @ y.astype(float) + b, 0)
        scale = np.abs(x).astype(float) @ np.abs(y).astype(float) + np.abs(b)
        assert np.all(np.abs(found - wanted) <= (k + 2) * UNIT[F32] * scale)


@pytest.mark.parametrize("level", LEVELS)
def test_few_rows_by_many_columns(level: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """A step takes up to four stretches of 512 columns, and leaves another step as many."""
    pipe = CpuPipeline(plan_of(tmp_path / "p.pipe", BY_A_VECTOR.format(t="f32", b=""), level))
    for m, n in ((1, 1023), (3, 1025), (1, 2049), (36, 3100), (2, 5000)):
        x, y, b = (rng.standard_normal(s, np.float32) for s in ((m, 41), (41, n), n))
        found = np.asarray(pipe(x=x, y=y, b=b))
        wanted = np.maximum(x.astype(float) @ y.astype(float) + b, 0)
        scale = np.abs(x).astype(float) @ np.abs(y).astype(float) + np.abs(b)
        assert np.all(np.abs(found - wanted) <= 43 * UNIT[F32] * scale)


@pytest.mark.parametrize("m", ["M", 13, 33, 256])
@pytest.mark.parametrize("level", LEVELS)
def test_bands_of_a_matrix_are_copied(
    level: str, m: str | int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """For some dozens of rows, of fewer where the matrix's rows lie a multiple of 4 KB apart."""
    text = f"pipeline main(x: f32[{m}, K], y: f32[K, N]) -> f32[{m}, N]:\n    x @ y\n"
    pipe = CpuPipeline(plan_of(tmp_path / "p.pipe", text, level), threads=2)
    for rows in (11, 13, 40, 41, 97, 256) if m == "M" else (int(m),):
        for k, n in ((0, 1024), (1, 1024), (63, 2048), (65, 1024), (129, 701), (64, 512), (191, 1)):
            x, y = (
                rng.standard_normal((rows, k), np.float32),
                rng.standard_normal((k, n), np.float32),
            )
            wanted = x.astype(float) @ y.astype(float)
            scale = np.abs(x).astype(float) @ np.abs(y).astype(float)
            assert np.all(np.abs(pipe(x=x, y=y) - wanted) <= (k + 1) * UNIT[F32] * scale)


@pytest.mark.parametrize("dtype", [F32, F64, F16])
@pytest.mark.parametrize("level", LEVELS)
def test_one_row_adds_up_rows_of_the_matrix(
    level: str, dtype: DType, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of as many matrices as there are, whatever follows."""
    text = BY_A_VECTOR.format(t=dtype, b="B, ")
    pipe = CpuPipeline(plan_of(tmp_path / "p.pipe", text, level), threads=2)
    rounding = 2 * 2.0**-11 if dtype == F16 else 0  # of the product and of the sum with z
    sums = UNIT[F32 if dtype == F16 else dtype]
    for b, k, n in ((0, 3, 5), (2, 0, 7), (3, 1, 2), (2, 8, 1031), (1, 37, 513), (2, 100, 64)):
        x, y, z = (rng.standard_normal(s).astype(dtype.numpy) for s in ((b, 1, k), (b, k, n), (n,)))
        product = x.astype(np.longdouble) @ y.astype(np.longdouble)
        wanted = np.maximum(product + z, 0)
        scale = np.abs(x).astype(float) @ np.abs(y).astype(float) + np.abs(z)
        error = np.abs(np.asarray(pipe(x=x, y=y, b=z)).astype(np.longdouble) - wanted)
        assert np.all(error <= ((k + 2) * sums + rounding) * scale + rounding * 2.0**-14)
