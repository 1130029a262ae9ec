"""The vector math over wide ranges: error in units in the last place, and special values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.cpu import wide_math
from stagefuse.compiler.cpu.trigonometry import two_over_pi_table
from stagefuse.compiler.cpu.vector_math import FUNCTIONS
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import Buffer, Index, Kernel, Load, Op, Store
from stagefuse.compiler.scalar import FUNCTIONS as SCALARS
from stagefuse.dsl.dims import sym
from stagefuse.dsl.dtypes import F32, F64, DType
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS, Compiled

I = (Index(sym("i")),)  # noqa: E741
Array = np.ndarray[Any, Any]


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


REFERENCE: dict[str, Callable[..., Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "log1p": np.log1p,
    "expm1": np.expm1, "tanh": np.tanh, "erf": np.vectorize(math.erf, otypes=[float]),
    "sigmoid": sigmoid, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 88.7,
     89.0, -87.3, -103.0, -104.0, -105.0, 16777216.0, 1e22, 1e30]
)  # fmt: skip


def kernel(name: str, dtype: DType, arity: int = 1) -> Kernel:
    n = sym("N")
    loads = tuple(Load(f"x{k}", I, dtype) for k in range(arity))
    return Kernel(
        f"{name}.{dtype}",
        (*(Buffer(f"x{k}", dtype, (n,), "in") for k in range(arity)),
         Buffer("y", dtype, (n,), "out")),
        ("N",), (("i", n),), (Store("y", I, Op(name, loads, dtype)),),
    )  # fmt: skip


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request: Any) -> Any:
    kernels = [kernel(n, t, arity) for n, (_, arity) in FUNCTIONS.items() for t in (F32, F64)]
    return Compiled([*kernels, kernel("mod", F32, 2)], request.param)


def run(compiled: Compiled, name: str, *inputs: Array) -> Array:
    out = np.empty_like(inputs[0])
    kind = {4: "f32", 8: "f64"}[out.dtype.itemsize]
    compiled(f"{name}.{kind}", [*inputs, out], {"N": out.size})
    return out


def worst(got: Array, want: Array) -> float:
    """The largest error, in units in the last place of the result's type."""
    with np.errstate(all="ignore"):
        near = want.astype(got.dtype)
        same = (got == near) | (np.isnan(got) & np.isnan(near))
        step = np.spacing(np.abs(near)).astype(float)
        gap = np.abs(got.astype(float) - want) / step
    return float(np.max(np.where(same, 0, np.where(np.isnan(gap), np.inf, gap))))


@pytest.mark.parametrize("name", REFERENCE)
def test_f32_is_within_two_units(compiled: Compiled, name: str) -> None:
    patterns = np.arange(0, 1 << 32, 61 * 61 * 8 + 1, dtype=np.uint64).astype(np.uint32)
    rng = np.random.default_rng(5)
    with np.errstate(all="ignore"):
        x = np.concatenate(
            [SPECIAL, patterns.view(np.float32), rng.standard_normal(100000) * 3]
        ).astype(np.float32)
        want = REFERENCE[name](x.astype(float))
    assert worst(run(compiled, name, x), want) <= 2


@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
def test_angles_up_to_where_the_short_way_ends(
    compiled: Compiled, name: str, rng: np.random.Generator
) -> None:
    x = rng.uniform(-1.01, 1.01, 500_000).astype(np.float32) * np.float32(wide_math.TURNED)
    assert worst(run(compiled, name, x), REFERENCE[name](x.astype(float))) <= 2


@pytest.mark.parametrize("name", REFERENCE)
def test_f64_is_within_a_few_units(compiled: Compiled, name: str) -> None:
    rng = np.random.default_rng(6)
    bits = rng.integers(0, 1 << 64, 3000, dtype=np.uint64, endpoint=False)
    more = [5e-324, -5e-324, 1e-310, 710.0, -745.0, -746.0, 1e308]
    x = np.concatenate(
        [SPECIAL, more, bits.view(float), rng.standard_normal(3000) * 3,
         1 + rng.standard_normal(1000) * 0.01, 10.0 ** rng.uniform(-12, 0, 1000)]
    )  # fmt: skip
    with np.errstate(all="ignore"):
        want = REFERENCE[name](x)
        if name in ("sin", "cos", "tan"):  # NumPy's own are a few units off for large arguments
            finite = np.isfinite(x)
            want[finite] = [getattr(math, name)(v) for v in x[finite].tolist()]
    assert worst(run(compiled, name, x), want) <= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["expm1", "log1p", "sin", "tan", "tanh", "erf"])
def test_odd_functions_keep_the_sign_of_zero(compiled: Compiled, name: str, dtype: Any) -> None:
    found = run(compiled, name, np.array([0.0, -0.0], dtype))
    assert list(found) == [0, 0] and list(np.signbit(found)) == [False, True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pow_of_special_values(compiled: Compiled, dtype: Any) -> None:
    edge = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 2, -2, 3, -3, 0.5, -0.5, 1e30, -1e30, 1e-30]
    x, y = (np.ascontiguousarray(g.ravel()) for g in np.meshgrid(*[np.array(edge, dtype)] * 2))
    with np.errstate(all="ignore"):
        want = np.power(x.astype(float), y.astype(float))
        near = want.astype(dtype)
    found = run(compiled, "pow", x, y)
    assert worst(found, want) <= 2
    numbers = ~np.isnan(near)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(near[numbers]))


def test_pow_is_accurate_near_overflow(compiled: Compiled) -> None:
    rng = np.random.default_rng(7)
    x = np.concatenate([np.exp(rng.standard_normal(3000) * 3), 1 + rng.random(1000)])
    y = np.concatenate([rng.standard_normal(3000) * 50, rng.random(1000) * 900])
    with np.errstate(all="ignore"):
        want = np.power(x, y)
    assert worst(run(compiled, "pow", x, y), want) <= 2


def test_the_argument_nearest_to_a_multiple_of_half_pi(compiled: Compiled) -> None:
    found = run(compiled, "cos", np.array([6381956970095103.0 * 2.0**797]))
    assert found[0] == -4.68716592425462761112e-19


@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
def test_f32_arguments_nearest_to_multiples_of_half_pi(compiled: Compiled, name: str) -> None:
    """Within 2e-9 of one; where a function is small, it is rounding in f64 that counts."""
    near = [(16367173, 72), (10741887, 11), (16367173, 73), (10741887, 12)]
    x = np.array([m * 2.0**e for m, e in near], np.float32)
    want = np.array([getattr(math, name)(v) for v in x.tolist()])
    assert worst(run(compiled, name, x), want) <= SCALARS[name].ulp


@pytest.mark.parametrize("name", [*(n for n in wide_math.FUNCTIONS if n in FUNCTIONS), "mod"])
def test_a_result_does_not_depend_on_what_else_a_vector_holds(
    compiled: Compiled, name: str, rng: np.random.Generator
) -> None:
    """One element at a time, a vector with its rest, and beside elements that need another way."""
    count = 2 if name == "mod" else FUNCTIONS[name][1]
    x = np.concatenate([SPECIAL, rng.standard_normal(120) * 10.0 ** rng.integers(-9, 9, 120)])
    inputs = [rng.permutation(x).astype(np.float32) for _ in range(count)]
    alone = [run(compiled, name, *(a[i : i + 1].copy() for a in inputs)) for i in range(x.size)]
    for size in (x.size, 64, 33, 7):
        found = run(compiled, name, *(a[:size].copy() for a in inputs))
        assert np.array_equal(found, np.concatenate(alone[:size]), equal_nan=True)


def test_remainders_are_exact(compiled: Compiled, rng: np.random.Generator) -> None:
    """Of quotients of any size, also next to whole numbers, and of special values."""
    special = [0.0, -0.0, 1, -1, 3, np.inf, -np.inf, np.nan, 1e-45, 3e38, 2.0**28]
    edge = np.array(special, np.float32)
    a, b = (g.ravel() for g in np.meshgrid(edge, edge))
    bits = rng.integers(0, 1 << 32, (2, 4000), dtype=np.uint64).astype(np.uint32).view(np.float32)
    divisor = (rng.standard_normal(4000) * 10.0 ** rng.integers(-3, 4, 4000)).astype(np.float32)
    near = np.float32(divisor * rng.integers(1, 1 << 28, 4000)), divisor
    below = np.nextafter(near[0], np.float32(0)), divisor
    pairs = [np.stack(p) for p in ((a, b), bits, near, below)]
    x, y = (np.ascontiguousarray(v) for v in np.concatenate(pairs, axis=1))
    with np.errstate(all="ignore"):
        want = np.mod(x, y)
    found = run(compiled, "mod", x, y)
    np.testing.assert_array_equal(found, want)
    numbers = ~np.isnan(want)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(want[numbers]))


@pytest.mark.parametrize("level", LEVELS)
def test_functions_in_loops_of_other_widths(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A vector holds as many elements as the widest, or narrowest, number of a loop allows."""
    functions = ["log", "log2", "log1p", "sin", "cos", "tanh"]
    x = (rng.random((5, 333)) * 7 + 0.5).astype(np.float16)
    listed = ", ".join(f"{name}(f32(x))" for name in functions)
    for dtype in ("u8", "f16", "f32", "f64"):
        (tmp_path / "p.pipe").write_text(
            f"pipeline p(x: {dtype}[B, N]) -> ({', '.join(['f32[B, N]'] * 6)}, f64[B, N]):\n"
            f"    ({listed}, f64(log(f32(x))) * f64(iota(N)))\n"
        )
        pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=1)
        kind = {"u8": "uint8"}.get(dtype, dtype.replace("f", "float"))
        given = (np.ceil(x) if dtype == "u8" else x).astype(kind)
        *found, product = pipe(x=given)
        wide = given.astype(float)
        for name, got in zip(functions, found, strict=True):
            assert worst(got, REFERENCE[name](wide)) <= 2, (name, dtype)
        log = found[0].astype(float)
        np.testing.assert_array_equal(product, log * np.arange(333))


def test_the_table_of_two_over_pi_is_a_sum_of_doubles() -> None:
    rows = two_over_pi_table()
    assert abs(rows[0][0] - 2 / math.pi) < 1e-15
    assert all(
        0 < abs(b) < abs(a) * 2.0**-50 for row in rows for a, b in zip(row, row[1:], strict=False)
    )
