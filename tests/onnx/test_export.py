"""Exported models compute what the language does, by the standard's reference and by an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import stagefuse as sf
from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.front import check_source
from stagefuse.compiler.graph import Graph, Indirect, Input, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.dims import const, floordiv, mod, sym
from stagefuse.dsl.dtypes import DTYPES, F32, F64, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.program import Pipeline
from stagefuse.dsl.types import TensorType
from stagefuse.onnx.export.exporting import model_of
from tests.compiler.graph_run import NOWHERE, graph_of
from tests.compiler.measured_graph import measured
from tests.compiler.test_fused_graphs import SIZES, _Random, feeds_for
from tests.compiler.test_ops_native import PIPELINES, call, edges, ulps
from tests.fuzz.measured import check
from tests.test_std import CASES

from . import models
from .export_run import as_list, by_reference, by_runtime, checked, exported, onnxruntime, ops_of

ENGINES = [
    by_reference,
    pytest.param(
        by_runtime, marks=pytest.mark.skipif(onnxruntime is None, reason="no ONNX Runtime")
    ),
]
ENGINES_ONLY = pytest.mark.parametrize("run", ENGINES)
LACKING = {("f64", "tan"), ("f64", "erf")}
"""Functions that ONNX Runtime has not in that dtype; the reference's erf is no better than f32."""
COARSE = {"tanh", "sigmoid"}
"""Functions that ONNX Runtime computes with less care where the result is small."""


@ENGINES_ONLY
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_scalar_function_and_conversion(dtype: DType, run: Any, tmp_path: Path) -> None:
    calls = [
        (op.name, op.ulp, *found)
        for op in BUILTINS.values()
        if op.pointwise and op.name not in ("cast", "access", "position")
        if (dtype.name, op.name) not in LACKING and (found := call(op, dtype))
    ]
    calls += [(f"to {t}", 0.0, f"{t}(x)", t) for t in DTYPES.values() if t != dtype]
    x, results = f"{dtype}[N]", ", ".join(f"{c[3]}[N]" for c in calls)
    text = f"pipeline p(x: {x}, y: {x}, z: {x}) -> ({results}):\n"
    text += "".join(f"    r{n} = {c[2]}\n" for n, c in enumerate(calls))
    text += f"    {', '.join(f'r{n}' for n in range(len(calls)))}\n"
    grid = np.meshgrid(edges(dtype), edges(dtype), edges(dtype)[:3])
    inputs = {n: a.ravel().copy() for n, a in zip("xyz", grid, strict=True)}
    model = exported(text, tmp_path)
    program, _, _ = check_source(tmp_path / "p.pipe", {})
    wanted = evaluate(build_graph(program.pipelines[0]), inputs, {"N": grid[0].size})
    for (op, ulp, _, kind), want, got in zip(calls, wanted, run(model, inputs), strict=True):
        if not kind.is_float:
            np.testing.assert_array_equal(want, got, op)
        elif run is by_reference or op not in COARSE:
            error = ulps(want, got.astype(np.float64), kind)
            # a formula of a few roundings stands for a function that ONNX lacks
            assert error.max() <= max(2 * ulp, 1), (op, want[error.argmax()], got[error.argmax()])


def sized(pipeline: Pipeline, sizes: dict[str, int]) -> dict[str, int]:
    low = {d: pipeline.facts.ranges.get(d, (0, None))[0] for d in pipeline.dims}
    return {d: max(sizes[d], int(str(low[d]))) for d in pipeline.dims}


@ENGINES_ONLY
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_on_odd_shapes(
    name: str, run: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    newest = "cumprod" in PIPELINES[name]
    if newest and run is by_runtime:
        pytest.skip("an op of opset 26")
    model = exported(f"pipeline p{PIPELINES[name]}\n", tmp_path, opset=26 if newest else 21)
    pipeline = check_source(tmp_path / "p.pipe", {})[0].pipelines[0]
    graph = build_graph(pipeline)
    for sizes in ((3, 5, 7), (1, 1, 1), (17, 33, 19), (0, 4, 2), (4, 0, 3)):
        dims = sized(pipeline, dict(zip("BTD", sizes, strict=True)))
        inputs = {}
        for argument, type, _ in pipeline.inputs:
            shape = tuple(d.evaluate(dims) for d in type.shape)
            array = rng.standard_normal(shape) if type.dtype.is_float else rng.integers(0, 9, shape)
            inputs[argument] = np.asarray(array).astype(type.dtype.numpy)
        close(run(model, inputs), evaluate(graph, inputs, dims))


def close(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if np.asarray(b).dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol, atol, equal_nan=True)
        else:
            np.testing.assert_array_equal(a, b)


@ENGINES_ONLY
@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{c.covers}" for n, c in enumerate(CASES)])
def test_every_function_of_the_library(case: Any, run: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **case.weights)
    model = exported(case.source, tmp_path)
    program, _, load = check_source(tmp_path / "p.pipe", {})
    pipeline = program.pipelines[0]
    arrays = {("w", key): array for key, array in case.weights.items()}
    dims = {}
    for name, type, _ in pipeline.inputs:
        for size, extent in zip(type.shape, np.shape(case.inputs[name]), strict=True):
            if size.as_symbol():
                dims[str(size)] = extent
    wanted = evaluate(build_graph(pipeline), case.inputs, dims, weights=arrays)
    given = {i.name: case.inputs[i.name] for i in model.graph.input}
    # sums of a few hundred terms near 1 in f32, some of them cancelling
    close(run(model, given), wanted, 1e-4, 2e-5)


# Views and gathers that the library has not


def model_of_graph(graph: Graph, dims: tuple[str, ...], opset: int = 21) -> onnx.ModelProto:
    inputs = tuple(
        (node.primitive.name, node.type, NOWHERE)
        for node in graph.nodes.values() if isinstance(node.primitive, Input)
    )  # fmt: skip
    results = tuple((f"r{i}", i) for i in range(len(graph.results)))
    signature = Pipeline("test", "", inputs, results, {}, (), graph.facts, dims)
    proto, arrays = model_of(signature, graph, lambda *_: np.zeros(0), opset)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return checked(proto)


@ENGINES_ONLY
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_random_graphs(
    case: int, dtype: DType, run: Any, program_seed: int, rng: np.random.Generator
) -> None:
    grown = _Random(program_seed, dtype)
    for _ in range(12):
        grown.step()
    graph = graph_of(grown.b, [r for r in grown.values[-4:] if grown.b.type(r).rank <= 4])
    if dtype == F64 and run is by_runtime and "map erf" in str(
        [f"map {getattr(n.primitive, 'fn', '')}" for n in graph.nodes.values()]
    ):  # fmt: skip
        pytest.skip("ONNX Runtime has no erf in f64")
    model = model_of_graph(graph, ("M", "N"))
    for sizes in SIZES:
        feeds = feeds_for(graph, sizes, rng)
        # engines compute functions in f32, by rational functions that are off by 2**-20 or less
        wanted = measured(graph, feeds, sizes, "f32", 16, 2.0**-20)
        for found, bound in zip(run(model, feeds), wanted, strict=True):
            assert not check(found, bound), sizes


def odd_views(b: Builder, x: Ref, y: Ref, ids: Ref) -> list[Ref]:
    """Of x: [M, N] and y: [6, 12] with ids: [M] in -3..3."""
    m, n = b.type(x).shape
    i, j, k = sym("i0"), sym("i1"), sym("i2")
    return [
        b.view(y, [6], lambda a: [a, a * 2]),  # a diagonal
        b.view(y, [12, 6], lambda a, c: [c, 11 - a]),  # flipped and transposed
        b.view(y, [3, 4, 6], lambda a, c, d: [d, 3 * c + a]),  # an axis split, and turned
        b.view(y, [6, 5, 3], lambda a, c, d: [a, 2 * c + d]),  # windows
        b.view(y, [4, 6, 3], lambda a, c, d: [c, floordiv(a * 3 + d, 2)]),
        b.view(y, [72], lambda a: [mod(a, 6), floordiv(a, 6)]),  # column by column
        b.view(y, [8, 12], lambda a, c: [a - c, c], lambda a, c: [a - c, 5 - a + c], 7.5),
        b.view(x, [n, m], lambda a, c: [m - 1 - c, a]),
        b.view(x, [m, 2 * n], lambda a, c: [a, floordiv(c, 2)]),
        b.view(x, [m, n], lambda a, c: [a, c - 1], lambda a, c: [c - 1], -1.0),
        b.view(x, [m + 3, n], lambda a, c: [a, c], lambda a, c: [m - 1 - a], 2.0),
        b.gather(y, [ids], (m, const(12)), ("i0", "i1"), [Indirect(1, (i,)), j]),
        b.gather(y, [ids], (const(6), m), ("i0", "i1"), [i, Indirect(1, (j,))]),
        b.gather(y, [ids], (m,), ("i0",), [Indirect(1, (i,)), mod(i, 12)]),
        b.gather(
            y, [ids], (m, const(3), const(2)), ("i0", "i1", "i2"),
            [Indirect(1, (i,), const(1), k), Indirect(1, (i,), const(2), j)],
        ),
    ]  # fmt: skip


@ENGINES_ONLY
def test_index_maps_of_every_kind(run: Any, rng: np.random.Generator) -> None:
    b = Builder(Facts({"M": (0, 64), "N": (0, 64)}))
    x = b.input("x", TensorType(F32, (sym("M"), sym("N"))))
    y = b.input("y", TensorType(F32, (const(6), const(12))))
    ids = b.input("ids", TensorType(I64, (sym("M"),)))
    graph = graph_of(b, odd_views(b, x, y, ids))
    model = model_of_graph(graph, ("M", "N"))
    for sizes in ({"M": 5, "N": 7}, {"M": 1, "N": 1}, {"M": 0, "N": 3}, {"M": 11, "N": 2}):
        feeds = {
            "x": rng.standard_normal((sizes["M"], sizes["N"])).astype(np.float32),
            "y": rng.standard_normal((6, 12)).astype(np.float32),
            "ids": rng.integers(-3, 3, sizes["M"]),
        }
        close(run(model, feeds), evaluate(graph, feeds, sizes), 0, 0)


# Structure


SOFTMAX = """e = exp(x - max(x, axis=1, keepdims=True))
    e / sum(e, axis=1, keepdims=True)"""
CONV = """padded = pad(i, [(0, 0), (0, 0), (1, 1), (2, 2)])
    nn.convolve2d(padded, k, stride=2, dilation=1, groups=2)"""


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (SOFTMAX, ["Softmax"]),
        ("nn.log_softmax(x)", ["LogSoftmax"]),
        ("mean(x, axis=1, keepdims=True)", ["ReduceMean"]),
        ("nn.gelu(x)", ["Gelu"]),
        ("x @ y", ["MatMul"]),
        ("s[b, o] = sum[k] x[b, k] * z[o, k]", ["Transpose", "MatMul"]),
        (CONV, ["Conv"]),
        ("nn.max_pool(i, 3, stride=2, padding=1)", ["MaxPool"]),
        ("nn.avg_pool(i, 3, stride=1, padding=1)", ["AveragePool"]),
        ("maximum(x, 0.0)", ["Relu"]),
        ("x[:, None, :] + x[:, :, None]", ["Unsqueeze", "Unsqueeze", "Add"]),
        ("reshape(i, [B, 6, 81])", ["Reshape"]),
        ("topk(z, 3, axis=0)", ["TopK"]),
        ("topk(i, 1, axis=1)[1]", ["TopK"]),
        ("sort(i)[..., 4]", ["TopK", "Gather"]),
    ],
)
def test_ops_are_found_by_structure(body: str, ops: list[str], tmp_path: Path) -> None:
    text = f"""import nn
pipeline p(x: f32[B, T], y: f32[T, 8], z: f32[8, T], i: f32[B, 6, 9, 9], k: f32[4, 3, 3, 3])
where B in 1..=9, T in 1..=9:
    {body}
"""
    assert ops_of(exported(text, tmp_path)) == ops


def test_a_layer_norm_is_one_op(tmp_path: Path) -> None:
    text = """import nn
weights w = "w.npz"
pipeline p(x: f32[B, 8]):
    nn.layer_norm(x, w.n, eps=1e-6)
"""
    weights = {"w": {"n.weight": np.ones(8, np.float32), "n.bias": np.ones(8, np.float32)}}
    model = exported(text, tmp_path, weights)
    assert ops_of(model) == ["LayerNormalization"]
    assert list(model.graph.node[0].input) == ["x", "n.weight", "n.bias"]


def test_a_batch_norm_is_one_op(tmp_path: Path) -> None:
    text = """import nn
weights w = "w.npz"
pipeline p(x: f32[B, 5, 7, 3]):
    nn.batch_norm(x, w.n)
"""
    ends = ("weight", "bias", "running_mean", "running_var")
    weights = {"w": {f"n.{end}": np.ones(5, np.float32) for end in ends}}
    model = exported(text, tmp_path, weights)
    assert ops_of(model) == ["BatchNormalization"]
    assert list(model.graph.node[0].input) == ["x", *(f"n.{end}" for end in ends)]


def test_names_sizes_and_ranges_are_the_sources(tmp_path: Path) -> None:
    text = """\"\"\"Rows.\"\"\"
fn scaled(x: f32[B, T]) -> f32[B, T]:
    top = max(abs(x), axis=1, keepdims=True)
    x / top

pipeline rows(x: f32[B, T]) -> (half: f32[B, T], f32[2*B, T])
where B in 1..=8, T >= 1:
    unit = scaled(x)
    half = unit * 0.5
    half, concat([unit, unit])
"""
    model = exported(text, tmp_path)
    graph = model.graph
    assert graph.name == "rows" and [o.name for o in graph.output] == ["half", "result1"]
    shapes = [[d.dim_param for d in o.type.tensor_type.shape.dim] for o in graph.output]
    assert shapes == [["B", "T"], ["2*B", "T"]]
    assert {o for n in graph.node for o in n.output} >= {"scaled/Abs", "unit", "half"}
    assert {p.key: p.value for p in model.metadata_props} == {"where": "B in 1..=8, T >= 1"}


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    text = f"pipeline p{PIPELINES['views']}\n"
    exported(text, tmp_path)
    first = (tmp_path / "p.onnx").read_bytes()
    exported(text, tmp_path)
    assert (tmp_path / "p.onnx").read_bytes() == first


# Files and errors


def test_large_weights_go_beside_the_model(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    np.savez(tmp_path / "w.npz", fc=weight, tiny=np.ones(3, np.float32))
    text = """weights w = "w.npz"
pipeline p(x: f32[B, 64]) -> f32[B, 32]:
    x @ w.fc * w.tiny[0]
"""
    model = exported(text, tmp_path, external_data=True)
    assert (tmp_path / "p.onnx.data").stat().st_size == weight.nbytes
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["p.onnx", "p.onnx.data", "p.pipe", "w.npz"]
    model = onnx.load(tmp_path / "p.onnx")
    x = rng.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(by_reference(model, {"x": x})[0], x @ weight, 1e-4, 1e-4)


def test_what_an_opset_lacks_is_named_all_at_once(tmp_path: Path) -> None:
    kinds = "(i64[N], i64[N], i64[N])"
    text = f"pipeline p(x: i64[N], y: i64[N]) -> {kinds}:\n    x & y, x + y, x ^ y\n"
    with pytest.raises(sf.CompileError) as caught:
        exported(text, tmp_path, opset=17)
    found = caught.value.diagnostics
    assert [(d.code, d.primary.span.text if d.primary else "") for d in found] == [
        ("E0301", "x & y"), ("E0301", "x ^ y"),
    ]  # fmt: skip
    assert all("opset 18" in d.message for d in found)
    assert not (tmp_path / "p.onnx").exists()
    exported(text, tmp_path, opset=18)


UPDATES = [
    "l[2] = a[1]", "l[:, 2] = a[:, 1]", "l[1:3, ::2] = 5.0", "l[-1, 1:] = 0.0", "l[...] = 2.0",
    "l[:] = a", "l[::-1] = a", "l[0, 0] = a[1, 1]", "l[n] = a[0]", "l[n, n] = 1.0",
    "l[n : n + 2] = a[:2]", "l[1:, n] = a[1:, 0]", "l[at] = a[1]", "l[:, at] = a[:, 2:4]",
    "l[at, at[::-1]] = a[0, :2]", "l[at[:, None], at] = 3.0", "l[n : n + 2, at] = a[:2, :2]",
]  # fmt: skip


@ENGINES_ONLY
@pytest.mark.parametrize("line", UPDATES)
def test_updates_of_items(line: str, run: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    """And what is imported again, where names are found for what reads nothing too."""
    text = (
        "pipeline p(l: f32[N, M], a: f32[N, M], at: i64[2], n: i64) -> f32[N, M]\n"
        f"where N in 4..=10, M in 4..=10:\n    l = l * 1.0\n    {line}\n    l\n"
    )
    model = exported(text, tmp_path)
    pipe = sf.compile(text)
    again = sf.compile(sf.import_onnx(tmp_path / "p.onnx", tmp_path / "again"))
    for n in (1, -2, -3):
        inputs = {"l": models.drawn(rng, 5, 4), "a": models.drawn(rng, 5, 4), "n": np.array(n),
                  "at": rng.permutation(4)[:2] - 4 * (n < -2)}  # fmt: skip
        wanted = pipe(**inputs)
        np.testing.assert_array_equal(run(model, inputs)[0], wanted)
        np.testing.assert_array_equal(again(**inputs), wanted)


def test_updates_of_items_in_a_scan(tmp_path: Path, rng: np.random.Generator) -> None:
    text = """pipeline cholesky(a: f32[N, N]) -> f32[N, N]
where N in 1..=20:
    scan j in 0..N with l = zeros([N, N]):
        row = l[j]
        s[i] = sum[k] l[i, k] * row[k]
        d = sqrt(a[j, j] - s[j])
        l[:, j] = select(iota(N) == j, d, select(iota(N) > j, (a[:, j] - s) / d, 0.0))
    l
"""
    x = rng.standard_normal((7, 7))
    a = x @ x.T + 7 * np.eye(7)
    (found,) = by_reference(exported(text, tmp_path), {"a": a.astype(np.float32)})
    close(found, np.linalg.cholesky(a), 1e-4, 1e-5)


@ENGINES_ONLY
def test_states_are_inputs_and_results(run: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    text = """pipeline step(x: f32[T, 4]) -> f32[T]
where T in 1..=4, S in 4..=64:
    state rows: f32[S, 4] = 0.0
    state length: i64 = 0
    state scale: f32 = 2.0
    rows[length : length + T] = x
    seen = iota(S)[None, :] <= (length + iota(T))[:, None]
    length = length + T
    sum(select(seen, x @ transpose(rows), 0.0), axis=1) * scale
"""
    model = exported(text, tmp_path)
    assert [i.name for i in model.graph.input] == ["x", "rows", "length", "scale"]
    names = [o.name for o in model.graph.output]
    assert names[1:] == ["rows.next", "length.next"]
    assert "rows = 0.0, length = 0, scale = 2.0" in {p.value for p in model.metadata_props}
    session = sf.compile(text).session(S=9)
    kept = {name: session.state[name] for name in ("rows", "length", "scale")}
    for steps in (3, 1, 2):
        x = models.drawn(rng, steps, 4)
        found = dict(zip(names, run(model, {"x": x, **kept}), strict=True))
        close(found[names[0]], session(x=x))
        kept |= {name: found[f"{name}.next"] for name in ("rows", "length")}
        np.testing.assert_array_equal(kept["rows"], session.state["rows"])


@pytest.mark.parametrize("opset", [17, 18, 19, 20, 22, 23, 25])
def test_every_opset_is_written(opset: int, tmp_path: Path, rng: np.random.Generator) -> None:
    text = """import nn
pipeline p(x: f32[B, T]) -> (f32[B, T], f32[B], f32[B, 1, T], i64[B])
where B in 1..=9, T in 1..=9:
    nn.gelu(x), max(x, axis=1), pad(x[:, None, :], [(0, 0), (0, 0), (0, 0)]), argmax(x, axis=1)
"""
    model = exported(text, tmp_path, opset=opset)
    assert model.opset_import[0].version == opset
    x = rng.standard_normal((3, 5)).astype(np.float32)
    assert np.array_equal(by_reference(model, {"x": x})[1], x.max(1))


@ENGINES_ONLY
def test_one_value_as_several_results(run: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each result has a name of its own, be it an input, a constant, or made by a node."""
    text = """
pipeline p(x: f32[N], y: f32[N]) -> (a: f32[N], b: f32[N], f32[N], f32[N], c: f32[N], f32[N],
                                     d: f32, f32, f32, f32[1], f32[1], f32[1])
where N >= 1:
    two = full([], 2.0, f32)
    t = tanh(x + y)
    t, t, t, x, x, x, two, two, two, t[0:1], t[0:1], t[0:1]
"""
    model = exported(text, tmp_path)
    assert len({r.name for r in model.graph.output}) == 12
    x, y = (rng.standard_normal(5).astype(np.float32) for _ in "xy")
    t = np.tanh(np.float64(x) + np.float64(y)).astype(np.float32)
    two = np.float32(2)
    close(run(model, {"x": x, "y": y}), [t, t, t, x, x, x, two, two, two, t[:1], t[:1], t[:1]])


def test_a_wrong_opset_or_pipeline_is_refused(tmp_path: Path) -> None:
    text = "".join(f"pipeline {n}(x: f32[N]) -> f32[N]:\n    x\n\n" for n in "ab")
    for options, words in (
        ({"opset": 6}, "17 to"), ({}, "several"), ({"pipeline": "c"}, "there is a, b"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            exported(text, tmp_path, **options)
    assert ops_of(exported(text, tmp_path, pipeline="a")) == ["Identity"]


# Round trips


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "quantised"])
def test_import_and_export_give_the_same_numbers(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    from .test_import import inputs_of

    made = getattr(models, name)(rng)
    onnx.save(made, tmp_path / "m.onnx")
    path = sf.import_onnx(tmp_path / "m.onnx", tmp_path)
    again = sf.export_onnx(path, tmp_path / "again.onnx")
    inputs = inputs_of(name, rng)
    (wanted,) = models.reference(made, **inputs)
    (found,) = by_reference(checked(onnx.load(again)), inputs)
    # f32 throughout: the deepest sum has 147 products (the stem), and a few layers follow
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_export_and_import_give_the_same_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    text = """import nn
pipeline p(x: f32[B, T, 12], mask: bool[B, T]) -> f32[B, T, 12]
where B in 1..=64, T in 1..=64:
    h = x |> nn.split_heads(3)
    nn.attend(h, h, h, mask=mask[:, None, None, :]) |> nn.merge_heads
"""
    exported(text, tmp_path)
    path = sf.import_onnx(tmp_path / "p.onnx", tmp_path / "again")
    inputs = {"x": rng.standard_normal((2, 5, 12)).astype(np.float32),
              "mask": rng.integers(0, 2, (2, 5)).astype(bool)}  # fmt: skip
    wanted = as_list(sf.compile(tmp_path / "p.pipe")(**inputs))
    close(as_list(sf.compile(path)(**inputs)), wanted)
