"""GPU code of every operation, run in the emulator, equals the reference on odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.front import check_source
from stagefuse.compiler.gpu.matmul import split_depth
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.dtypes import DTYPES

from ..test_ops_native import PIPELINES, call, edges, ulps
from .gpu_run import Emulated, check_legal, compiled, launches

MORE = {
    "norm": """(x: f32[B, 384], g: f32[384], b: f32[384]) -> f32[B, 384]:
    m = mean(x, axis=-1, keepdims=True)
    v = var(x, axis=-1, keepdims=True)
    (x - m) * rsqrt(v + 1e-5) * g + b""",
    "rows of a block": """(x: f32[B, 1500]) -> (f32[B, 1500], i64[B]):
    e = exp(x - max(x, axis=-1, keepdims=True))
    e / sum(e, axis=-1, keepdims=True), argmax(x, axis=-1)""",
    "bounded rows": """(x: f32[B, T], m: bool[B, T]) -> f32[B, T]
where T in 1..=512:
    y = select(m, x, -1e9)
    e = exp(y - max(y, axis=-1, keepdims=True))
    e / sum(e, axis=-1, keepdims=True)""",
    "half rows": """(x: f16[B, 512], y: bf16[B, 512]) -> (f16[B, 512], bf16[B, 512], f16[B]):
    f16(f32(x) * 2.0 + f32(y)), y * y, max(x, axis=-1)""",
    "narrow integers": """(x: i16[B, 64], y: u16[B, 64], z: i8[B, 64], m: u8[B, 64]) -> (
    i16[B], u16[64], i64[B], i16[B, 64], u16[B, 64], i8[64], u8[B], i16[B, 64]):
    a, b = max(x, axis=1), min(y, axis=0)
    a, b, sum(x, axis=1), x * 3, y + 7, max(z, axis=0), min(m, axis=1), i16(z) - x[::-1]""",
    "whole tensors": """(x: f32[B, T, D], m: bool[D, B]) -> (f32[], f32[], bool[], f32[], i64[]):
    sum(x * x), max(x), all(m), mean(tanh(x)), sum(i32(m))""",
    "columns": """(x: f32[B, T]) -> (f32[T], f32[T]):
    sum(x, axis=0), max(x * x, axis=0)""",
    "several axes": """(x: f32[B, T, D], i: i32[B, T, D]) -> (
    f32[B], f32[D], f32[T], i64[B, D], bool[T, D], f32[B, T]):
    a, b, c = sum(x, axis=(1, 2)), sum(x, axis=(0, 1)), mean(x, axis=(0, 2))
    a, b, c, sum(i, axis=1), any(i > 5, axis=0), var(x, axis=2)""",
    "linear": """(x: f32[B, 48], w: f32[96, 48], b: f32[96]) -> f32[B, 96]:
    tanh(x @ transpose(w, [1, 0]) + b)""",
    "deep linear": """(x: f32[B, T, 200], w: f32[50, 200]) -> f32[B, T, 50]:
    tanh(x @ transpose(w, [1, 0])) + x[:, :, :50]""",
    "half products": """(x: bf16[B, T, 64], w: bf16[64, 128], y: f16[B, T, 64], v: f16[72, 64]) -> (
    bf16[B, T, 128], f16[B, T, 72]):
    tanh(x @ w), y @ transpose(v, [1, 0])""",
    "deep half product": """(x: f16[B, T, 208], w: f16[208, 96], b: f16[96]) -> f16[B, T, 96]:
    x @ w + b""",
    "odd half product": """(x: f16[B, T], w: f16[T, D]) -> f16[B, D]:
    x @ w""",
    "odd linear": """(x: f32[B, T], w: f32[D, T]) -> f32[B, D]:
    x @ transpose(w, [1, 0])""",
    "f64 linear": """(x: f64[B, T], w: f64[D, T]) -> f64[B, D]:
    x @ transpose(w, [1, 0])""",
    "attention": """(q: f32[B, 2, T, 32], k: f32[B, 2, T, 32], v: f32[B, 2, T, 32], m: bool[B, T])
    -> f32[B, T, 2, 32]
where T in 1..=64:
    s = select(m[:, None, None, :], q @ transpose(k, [0, 1, 3, 2]) * 0.17677669, -1e30)
    e = exp(s - max(s, axis=-1, keepdims=True))
    transpose((e / sum(e, axis=-1, keepdims=True)) @ v, [0, 2, 1, 3])""",
    "convolution": """(x: f32[B, 4, 9, 10], w: f32[13, 4, 3, 3]) -> f32[B, 13, 7, 8]:
    y[b, o, i, j] = sum[c, u, v] x[b, c, i + u, j + v] * w[o, c, u, v]""",
    "scans": """(x: f32[B, T], y: f64[T, D], i: i32[B, T, D]) -> (
    f32[B, T], f32[B, T], f64[T, D], i64[B, T, D]):
    cumsum(tanh(x), axis=1), cumsum(x, axis=0), cumsum(y, axis=1), cumsum(i, axis=2)""",
    "long sort": """(x: f32[B, T]) -> (f32[B, T], f32[B, T]):
    sort(x), cumsum(x, axis=1)""",
}  # fmt: skip
SIZES = ((3, 5, 7), (1, 1, 1), (17, 33, 19), (0, 4, 2), (2, 67, 50), (4, 0, 3))


def sizes_of(pipeline: Any, sizes: tuple[int, int, int]) -> dict[str, int]:
    """Sizes of B, T and D within what the pipeline accepts."""
    dims = {}
    for dim, size in zip(("B", "T", "D"), sizes, strict=True):
        if dim in pipeline.dims:
            low, high = pipeline.facts.ranges.get(dim, (0, None))
            dims[dim] = max(size, int(str(low)))
            dims[dim] = dims[dim] if high is None else min(dims[dim], int(str(high)))
    return dims


def inputs_of(pipeline: Any, dims: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
    inputs = {}
    for argument, type, _ in pipeline.inputs:
        shape = tuple(d.evaluate(dims) for d in type.shape)
        array = rng.standard_normal(shape) if type.dtype.is_float else rng.integers(0, 9, shape)
        inputs[argument] = np.asarray(array).astype(type.dtype.numpy)
    return inputs


def agree(found: Any, expected: Any, dtype: str) -> None:
    """Equal, or as near as rounding of intermediate results to f32, or of results, allows."""
    assert found.shape == expected.shape
    if not DTYPES[dtype].is_float:
        return np.testing.assert_array_equal(found, expected)
    small = {"f16": 2.0**-9, "bf16": 2.0**-6}.get(dtype, 1e-5)
    np.testing.assert_allclose(found.astype(np.float64), expected, small, small, equal_nan=True)


@pytest.mark.parametrize("name", [*PIPELINES, *MORE])
def test_pipelines_equal_the_reference_on_odd_shapes(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "p.pipe"
    plan = compiled(path, f"pipeline p{ {**PIPELINES, **MORE}[name] }\n", ("sm_80",))
    check_legal(plan)
    assert all(not x.report["spill bytes"] for x in launches(plan))
    pipeline = check_source(path, {})[0].pipelines[0]
    graph, emulated = build_graph(pipeline), Emulated(plan, "sm_80")
    for sizes in SIZES:
        dims = sizes_of(pipeline, sizes)
        inputs = inputs_of(pipeline, dims, rng)
        found = emulated(inputs, dims)
        for a, b, argument in zip(
            evaluate(graph, inputs, dims), found, emulated.pipeline.results, strict=True
        ):
            agree(b, a, argument.dtype)


def test_short_and_long_rows_have_kernels_of_their_own(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", f"pipeline p{PIPELINES['softmax']}\n", ("sm_80",))
    emulated = Emulated(plan, "sm_80")
    for width in (1, 40, 63, 130, 256, 257, 1000, 1023, 1024, 1025, 1028, 4101, 5000, 16388, 4097):
        x = rng.standard_normal((2, width)).astype(np.float32)
        (found,) = emulated({"x": x}, {"B": 2, "T": width})
        e = np.exp(x.astype(float) - x.max(1, keepdims=True))
        np.testing.assert_allclose(found, e / e.sum(1, keepdims=True), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_softmax_of_few_elements(
    count: int, axis: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The row that is summed lies in the registers of the lanes, however short it is."""
    shape = [3, 7, 7]
    shape[axis] = count
    sizes = ", ".join(map(str, shape))
    head = f"import nn\npipeline p(x: f32[{sizes}]) -> f32[{sizes}]:"
    text = f"{head}\n    nn.softmax(x, axis={axis})\n"
    emulated = Emulated(compiled(tmp_path / "p.pipe", text, ("sm_90a",)), "sm_90a")
    x = rng.standard_normal(shape).astype(np.float32)
    (found,) = emulated({"x": x}, {})
    e = np.exp(x.astype(float))
    np.testing.assert_allclose(found, e / e.sum(axis, keepdims=True), rtol=1e-5)


def test_a_product_of_few_rows_and_one_of_many_are_the_same(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_depth, "FULL", 1)
    text = f"pipeline p{MORE['deep linear']}\n"
    emulated = Emulated(compiled(tmp_path / "p.pipe", text, ("sm_89",)), "sm_89")
    weights = rng.standard_normal((50, 200)).astype(np.float32)
    rows = rng.standard_normal((1, 70, 200)).astype(np.float32)
    (many,) = emulated({"x": rows, "w": weights}, {"B": 1, "T": 70})
    (few,) = emulated({"x": rows[:, :7], "w": weights}, {"B": 1, "T": 7})
    np.testing.assert_allclose(many[:, :7], few, rtol=1e-5, atol=1e-5)
    plain = np.tanh(rows.astype(float) @ weights.T.astype(float)) + rows[:, :, :50]
    np.testing.assert_allclose(many, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["f32", "f16", "i8", "i64", "u16", "u32", "u64", "bool"])
def test_pointwise_operations_keep_their_tolerance(name: str, tmp_path: Path) -> None:
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
    path = tmp_path / "p.pipe"
    emulated = Emulated(compiled(path, text, ("sm_90a",)))
    grid = np.meshgrid(edges(dtype), edges(dtype), edges(dtype)[:3])
    inputs = {n: a.ravel().copy() for n, a in zip("xyz", grid, strict=True)}
    dims = {"N": grid[0].size}
    expected = evaluate(build_graph(check_source(path, {})[0].pipelines[0]), inputs, dims)
    found = emulated(inputs, dims)
    for (op, ulp, _, result), wanted, got in zip(calls, expected, found, strict=True):
        if not result.is_float:
            np.testing.assert_array_equal(wanted, got, op)
            continue
        error = ulps(wanted, np.asarray(got).astype(np.float64), result)
        worst = int(np.argmax(error))
        at = [a[worst] for a in inputs.values()]
        assert error[worst] <= max(ulp, 1.0), (op, at, wanted[worst], got[worst])


def test_a_position_out_of_range_is_reported(tmp_path: Path) -> None:
    text = "pipeline p(x: f32[T, 3], ids: i64[B]) -> f32[B, 3]:\n    x[ids]\n"
    emulated = Emulated(compiled(tmp_path / "p.pipe", text, ("sm_80",)), "sm_80")
    inputs = {"x": np.ones((5, 3), np.float32), "ids": np.array([4, -5, 2, 5], np.int64)}
    emulated(inputs, {"T": 5, "B": 4})
    assert emulated.status.tolist() == [1, 5]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_products_by_warpgroups(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        f"pipeline p(x: {kind}[N, K], w: {kind}[K, 272], v: {kind}[272, K])"
        f" -> ({kind}[N, 272], {kind}[N, 272])\n"
        "where N in 1..=4096, K in 8..=4096, K % 8 == 0:\n"
        "    x @ w, x @ transpose(v, [1, 0])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80", "sm_90a"))
    check_legal(plan)
    assert "wgmma" in plan.ptx["sm_90a"] and "wgmma" not in plan.ptx["sm_80"]
    emulated = Emulated(plan)
    for sizes in ({"N": 3, "K": 8}, {"N": 130, "K": 72}, {"N": 129, "K": 328}):
        x, w, v = (
            np.asarray(rng.standard_normal(shape)).astype(DTYPES[kind].numpy)
            for shape in ((sizes["N"], sizes["K"]), (sizes["K"], 272), (272, sizes["K"]))
        )
        a, b = emulated({"x": x, "w": w, "v": v}, sizes)
        wide = [m.astype(np.float64) for m in (x, w, v)]
        agree(a, wide[0] @ wide[1], kind)
        agree(b, wide[0] @ wide[2].T, kind)
