"""The lines that a product's tile ends in are asked for before the tile is computed, and those of
large matrices some pages before their rows are reduced."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.cpu.emit import AS_WRITTEN, module_text
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.kernel_text import parse_kernel
from stagefuse.compiler.plan import UNITS

from .cpu_run import LEVELS, Compiled
from .ir_cases import kernels_of, of_text

HEAD = "pipeline main(x: f32[M, 96], y: f32[96, N], z: f32[N]) -> f32[M, N]\nwhere N in 1..=999:\n"


def fetches(body: str, level: str) -> int:
    kernels = list(kernels_of(of_text(HEAD + body).passed()))
    text, *_ = module_text(kernels, level).split(AS_WRITTEN)  # some micro-kernels fetch too
    return text.count("call void @llvm.prefetch.p0(")


@pytest.mark.parametrize("level", ["v3", "v4"])
def test_a_product_fetches_its_result(level: str) -> None:
    assert fetches("    x @ y + z\n", level) == 1
    assert fetches("    exp(x @ y) * 2.0\n", level) == 1


def test_other_kernels_do_not() -> None:
    assert fetches("    sum(x, axis=1, keepdims=True) + sum(y, axis=0, keepdims=True)\n", "v4") == 0


ROW_SUMS = """stagefuse kernel 1
kernel sums for test
buffer x : in {t}[{k}]
buffer w : in {t}[{n}, {k}]
buffer v : in {t}[{n}, {k}]
buffer y : out {r}[{n}]
dims
parallel i in {n}
fold total = sum over (f in {k}) : {r} of {value}
store y[i] = $total.{r}
"""


def row_sums(t: str, n: int, k: int, two: bool = False) -> Kernel:
    """The products of rows of a matrix (times another, element by element) and a vector."""
    r = "f64" if t == "f64" else "f32"
    x, w, v = (
        f"{name}.{t}[{at}]" if t == r else f"cast.{r}({name}.{t}[{at}])"
        for name, at in (("x", "f"), ("w", "i, f"), ("v", "i, f"))
    )
    value = f"mul.{r}({x}, {f'mul.{r}({w}, {v})' if two else w})"
    return parse_kernel(ROW_SUMS.format(t=t, n=n, k=k, r=r, value=value))


def asked(kernel: Kernel) -> int:
    return module_text([kernel], "v4").count("call void @llvm.prefetch.p0(")


def test_rows_of_large_matrices_are_asked_for_ahead() -> None:
    assert asked(row_sums("f32", 1024, 1024)) == 32  # lines of a block
    assert asked(row_sums("f32", 1024, 1024, two=True)) == 64
    assert asked(row_sums("f16", 1024, 2048)) == 32
    assert asked(row_sums("f32", 1024, 1023)) == 0  # 4 MB are large
    assert asked(row_sums("f32", 4096, 512)) == 0  # rows of one block


@pytest.mark.parametrize("units", [0, UNITS["pages"]])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("t, two", [("f32", False), ("f32", True), ("f64", False), ("f16", False)])
def test_sums_of_rows_of_large_matrices(
    units: int, level: str, t: str, two: bool, rng: np.random.Generator
) -> None:
    dtype = np.dtype({"f32": "f4", "f64": "f8", "f16": "f2"}[t])
    shapes = [(1031, 2053), (67, 65536 + 3)] if t != "f64" else [(521, 1031)]
    for n, k in shapes:
        kernel = row_sums(t, n, k, two)
        assert asked(kernel) > 0
        x, w, v = (rng.standard_normal(s).astype(dtype) for s in (k, (n, k), (n, k)))
        y = np.zeros(n, np.float64 if t == "f64" else np.float32)
        compiled = Compiled([kernel], level)
        compiled.native.use_units(units)
        assert compiled("sums", [x, w, v, y])[0] == 0
        factors = (w.astype(np.longdouble) * v if two else w.astype(np.longdouble)) * x
        bound = (k + 2) * (2.0**-53 if t == "f64" else 2.0**-24) * np.abs(factors).sum(1)
        assert np.all(np.abs(y - factors.sum(1)) <= bound)
