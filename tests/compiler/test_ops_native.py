"""Compiled operations equal the reference interpreter, for every record and on odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler import scalar
from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.front import check_source
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.ops import BUILTINS, Op
from stagefuse.dsl.dims import sym
from stagefuse.dsl.dtypes import BOOL, DTYPES, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.signature import OpError
from stagefuse.dsl.types import TensorType

NARROW_BITS = {"f16": 10, "bf16": 7, "f8e4m3": 3, "f8e5m2": 2, "f32": 23, "f64": 52}
SMALLEST = {"f16": -24, "f8e4m3": -9, "f8e5m2": -16, "bf16": -133, "f32": -149, "f64": -1074}


def outputs(path: Path, text: str, inputs: dict[str, Any], dims: dict[str, int]) -> Any:
    """What the reference and the compiled pipeline give, in pairs."""
    path.write_text(text)
    program, found, _ = check_source(path, {})
    assert not found, found
    expected = evaluate(build_graph(program.pipelines[0]), inputs, dims)
    got = sf.compile(str(path))(**inputs)
    return list(zip(expected, got if isinstance(got, tuple) else (got,), strict=True))


def ulps(expected: Any, got: Any, dtype: DType) -> Any:
    """The error in units in the last place; NaN with NaN and equal values are 0."""
    with np.errstate(all="ignore"):
        expected = scalar.round_to(expected, dtype)
        exponent = np.frexp(np.nan_to_num(expected, posinf=0, neginf=0))[1] - 1
        unit = np.maximum(exponent - NARROW_BITS[dtype.name], SMALLEST[dtype.name])
        error = np.abs(expected - got) / np.exp2(unit.astype(float))
    same = (expected == got) | (np.isnan(expected) & np.isnan(got))
    return np.where(same, 0, np.where(np.isnan(error), np.inf, error))


def edges(dtype: DType) -> np.ndarray[Any, Any]:
    if dtype.is_bool:
        return np.array([True, False])
    if dtype.is_int:
        info = np.iinfo(dtype.numpy)
        values = [0, 1, 2, 3, 7, 31, 64, 100, info.max, info.max - 1, info.min, info.min + 1]
        return np.array(values + [-1, -2, -7] * (info.min < 0), dtype.numpy)
    values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, 1.5, 2.5, -2.5, 3, 1e-3, 1e-20]
    values += [1e-40, 100, 88.5, -104, 1e10, 3e38, 1 / 3, -7, 710, 1e-7, 2**31, -(2**63)]
    return scalar.narrow(np.array(values), dtype)


def call(op: Op, dtype: DType) -> tuple[str, DType] | None:
    """The operation written on x, y and z, and its result dtype; None if it refuses."""
    shape = (sym("N"),)
    given = {p.name: TensorType(BOOL if p.name == "c" else dtype, shape) for p in op.params}
    try:
        (result,) = op.infer(given, Facts())
    except OpError:
        return None
    names = {"x": "x", "a": "x", "b": "y", "c": "(x > y)", "lo": "y", "hi": "z"}
    args = [names[p.name] for p in op.params]
    if op.symbol:
        text = f"({op.symbol} x)" if len(args) == 1 else f"(x {op.symbol} y)"
    else:
        text = f"{op.name}({', '.join(args)})"
    return text, result.dtype


@pytest.mark.parametrize("name", ["f32", "f16", "i8", "i64", "u16", "u32", "u64", "bool"])
def test_compiled_pointwise_operations_keep_their_tolerance(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    calls = [(op.name, 2 * op.ulp if op.scalar != "pow" else 8.0, *found)
             for op in BUILTINS.values()
             if op.pointwise and op.name not in ("cast", "access", "position")
             and (found := call(op, dtype))]  # fmt: skip
    calls += [(f"to {t}", 0.0, f"{t}(x)", t) for t in DTYPES.values() if t != dtype]
    lines = "".join(f"    r{n} = {text}\n" for n, (_, _, text, _) in enumerate(calls))
    x = f"{name}[N]"
    text = (
        f"pipeline p(x: {x}, y: {x}, z: {x}) -> ({', '.join(f'{c[3]}[N]' for c in calls)}):\n"
        f"{lines}    {', '.join(f'r{n}' for n in range(len(calls)))}\n"
    )
    grid = np.meshgrid(edges(dtype), edges(dtype), edges(dtype)[:3])
    inputs = {n: a.ravel().copy() for n, a in zip("xyz", grid, strict=True)}
    pairs = outputs(tmp_path / "p.pipe", text, inputs, {"N": grid[0].size})
    for (op, ulp, _, result), (expected, got) in zip(calls, pairs, strict=True):
        if result.is_float:
            error = ulps(expected, np.asarray(got).astype(np.float64), result)
            worst = int(np.argmax(error))
            at = [a[worst] for a in inputs.values()]
            assert error[worst] <= max(ulp, 1.0), (op, at, expected[worst], got[worst])
        else:
            np.testing.assert_array_equal(expected, got, op)


PIPELINES = {
    "matmul": """(x: f32[B, T, 8], w: f32[5, 8], v: f32[B, 8, T]) -> (f32[B, T, 5], f32[B, T, T]):
    x @ transpose(w, [1, 0]), x @ v""",
    "narrow matmul": """(x: i8[B, T], y: i8[T, D]) -> i32[B, D]:
    x @ y""",
    "index notation": """(a: f32[B, T], b: f32[D, T]) -> f32[B, D]:
    d[i, j] = sqrt(sum[k] (a[i, k] - b[j, k]) ** 2)""",
    "window": """(x: f32[B, T]) -> f32[B, T - 2]
where T in 3..=99:
    s[b, i] = max[j in 0..3] x[b, i + j]""",
    "softmax": """(x: f32[B, T]) -> f32[B, T]:
    e = exp(x - max(x, axis=-1, keepdims=True))
    e / sum(e, axis=-1, keepdims=True)""",
    "reductions": """(x: f32[B, T], m: bool[B, T]) -> (
    f32[B], f32[T], i64[B], f32[B], bool[T], i64[])
where T in 1..=99:
    mean(x, axis=1), max(x, axis=0), argmax(x, axis=-1), var(x, axis=1), any(m, axis=0), sum(m)""",
    "sorts": """(x: f32[B, T]) -> (f32[B, T], f32[B, 3], i64[B, 3], i64[B, T])
where T in 3..=99:
    a, b = topk(x, 3)
    sort(x), a, b, cumsum(i8(x), axis=1)""",
    "running products": """(x: f32[B, T], n: i32[B, T]) -> (f32[B, T], i64[B, T], i64[B*T]):
    cumprod(x, axis=0), cumprod(n, axis=1), cumprod(n % 3 - 1)""",
    "views": """(x: f32[B, T, 12], y: f32[B, T]) -> (
    f32[B, 4, T, 3], f32[2*B, T], f32[B, 2, T], f32[B+3, T+1], f32[B, T]):
    a = reshape(x, [B, T, 4, 3]) |> transpose([0, 2, 1, 3])
    a, concat([y, y * 2.0]), stack([y, y], axis=1), pad(y, [(1, 2), (0, 1)], value=2.5), flip(y)""",
    "scalars in larger tensors": """(x: f32[], y: f32[B, T]) -> (
    f32[3], f32[2, 4], f32[2], f32[]):
    m = max(abs(y))
    a, b = pad(x[None], [(1, 1)], value=2.5), pad(m[None, None], [(1, 0), (2, 1)])
    a, b, concat([x[None], m[None]]), m""",
    "columns with and without a unit axis": """(x: f32[B, 40], y: f32[B]) -> (f32[B, 40], f32[40]):
    v = y[::-1] @ x
    v - x, v""",
    "gathers": """(x: f32[T, D], ids: i64[B], u: f32[B, D]) -> (f32[B, D], f32[T, D])
where T in 3..=99:
    x[ids % 3 - 1], scatter_add(x, ids % 3, u)""",
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_a_factor_stays_in_the_sum(device: str) -> None:
    """Out of it, sums of large terms would overflow, and infinite ones would be no NaN."""
    pipe = sf.compile("pipeline p(x: f32[K], y: f32[3]):\n    z[c] = sum[a] y[a] * x[c]\n",
                      device=device)  # fmt: skip
    x = np.array([0.1, 1e-10, 0, np.inf], np.float32)
    found = pipe(x=x, y=np.array([3e38, 3e38, -1], np.float32))
    np.testing.assert_allclose(found, [6e37, 6e28, 0, np.nan], 1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_compiled_pipelines_equal_the_reference_on_odd_shapes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text(f"pipeline p{PIPELINES[name]}\n")
    program, found, _ = check_source(path, {})
    assert not found, found
    pipeline = program.pipelines[0]
    graph, compiled = build_graph(pipeline), sf.compile(str(path))
    rng = np.random.default_rng(5)
    for sizes in ((3, 5, 7), (1, 1, 1), (17, 33, 19), (0, 4, 2), (2, 67, 50), (4, 0, 3)):
        dims = {}
        for dim, size in zip(("B", "T", "D"), sizes, strict=True):
            low = pipeline.facts.ranges.get(dim, (0, None))[0]
            if dim in pipeline.dims:
                dims[dim] = max(size, int(str(low)))
        inputs = {}
        for argument, type, _ in pipeline.inputs:
            shape = tuple(d.evaluate(dims) for d in type.shape)
            array = rng.standard_normal(shape) if type.dtype.is_float else rng.integers(0, 9, shape)
            inputs[argument] = np.asarray(array).astype(type.dtype.numpy)
        got = compiled(**inputs)
        got = got if isinstance(got, tuple) else (got,)
        for a, b in zip(evaluate(graph, inputs, dims), got, strict=True):
            assert a.shape == b.shape
            if a.dtype.kind == "f":
                np.testing.assert_allclose(b, a, 1e-5, 1e-5, equal_nan=True)
            else:
                np.testing.assert_array_equal(a, b)
