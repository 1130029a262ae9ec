"""Programs that are right: their types, operations and call-time checks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.check import check
from stagefuse.dsl.diagnostics import render_all
from stagefuse.dsl.dtypes import F16, F32, I64, DType
from stagefuse.dsl.parser import parse
from stagefuse.dsl.program import Pipeline
from stagefuse.dsl.source import Source

Headers = Mapping[str, tuple[DType, tuple[int, ...]]]
LAYERS: Headers = {
    "table.weight": (F32, (100, 8)),
    "layer.10.weight": (F32, (8, 8)),
    "layer.2.weight": (F32, (8, 8)),
    "layer.2.bias": (F32, (8,)),
    "odd-name.x.y": (F16, (3,)),
    "scale": (F32, ()),
    "ids": (I64, (4,)),
}


def checked(text: str, weights: Headers = LAYERS, **modules: str) -> Pipeline:
    """The first pipeline of a program that must have no errors."""
    source = Source("t.pipe", text)
    tree, problems = parse(source)
    program, found = check(
        tree,
        source,
        builtins=BUILTINS,
        load_module=lambda name: Source(f"{name}.pipe", modules[name]) if name in modules else None,
        weights=lambda path: weights,
    )
    assert not problems and not found, render_all([*problems, *found])
    return program.pipelines[0]


def result_types(text: str, **modules: str) -> list[str]:
    pipeline = checked(text, **modules)
    return [str(pipeline.types[value]) for _, value in pipeline.results]


def of(expression: str, inputs: str = "x: f32[B, T, 8], ids: i64[N]", where: str = "") -> str:
    """The type of one expression over the inputs."""
    (found,) = result_types(f"pipeline p({inputs}){where}:\n    {expression}\n")
    return found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("x + 1", "f32[B, T, 8]"),
        ("stack([[1, 2], [3, 4]]) + stack(((1, 2), (3, 4)))", "i64[2, 2]"),
        ("concat([[[1.0, 2.0]], stack([x[0, 0, :2], x[0, 0, 2:4]])])", "f32[3, 2]"),
        ("f16([[0.5, 1.5, 2.5]])", "f16[1, 3]"),
        ("concat([x[1:], x[:1]]) + concat([x[-1:], x[:-1]])", "f32[B, T, 8]"),
        ("x[:, : min(T, 3)]", "f32[B, min(3, T), 8]"),
        ("full([max(2, 5)], 1.0)", "f32[5]"),
        ("1 - x", "f32[B, T, 8]"),
        ("x[0] * 2.5 - x", "f32[B, T, 8]"),
        ("ids * 2 // 3 % 4", "i64[N]"),
        ("ids > 3 and ids < 9 or not (ids == 4)", "bool[N]"),
        ("f32(ids) / 2", "f32[N]"),
        ("ids + T", "i64[N]"),
        ("f32(T) * 0.5", "f32"),
        ("T * 2 + 1", "i64"),
        ("T > 3", "bool"),
        ("-x", "f32[B, T, 8]"),
        ("x |> exp |> sum", "f32"),
        ("sum(x, axis=(0, -1))", "f32[T]"),
        ("sum(x, axis=-1, keepdims=True)", "f32[B, T, 1]"),
        ("mean(ids)", "f32"),
        ("select(x > 0, x, 0)", "f32[B, T, 8]"),
        ("maximum(x, 0)", "f32[B, T, 8]"),
        ("x @ transpose(x, [0, 2, 1])", "f32[B, T, T]"),
        ("reshape(x, [B, -1])", "f32[B, 8*T]"),
        ("concat([x, x[:, :2]], axis=1)", "f32[B, T + min(2, T), 8]"),
        ("iota(T)", "i64[T]"),
        ("full([B, T], 0.5, f16)", "f16[B, T]"),
        ("full([B], T + 1)", "i64[B]"),
        ("full([B], x[0, 0, 0])", "f32[B]"),
        ("full([2], ids[0], u8)", "u8[2]"),
        ("zeros([T + 1])", "f32[T + 1]"),
        ("argmax(x, axis=1)", "i64[B, 8]"),
    ],
)
def test_types_of_operators_and_built_ins(expression: str, expected: str) -> None:
    assert of(expression) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("x[0]", "f32[T, 8]"),
        ("x[..., -1]", "f32[B, T]"),
        ("x[:, None]", "f32[B, 1, T, 8]"),
        ("x[:, :, 1:7:2]", "f32[B, T, 3]"),
        ("x[:, :, ::-1]", "f32[B, T, 8]"),
        ("x[:, :, 9:]", "f32[B, T, 0]"),
        ("x[:, :, -100:100]", "f32[B, T, 8]"),
        ("x[:, -3:]", "f32[B, min(3, T), 8]"),
        ("x[:, :T]", "f32[B, T, 8]"),
        ("x[ids]", "f32[N, T, 8]"),
        ("x[:, ids]", "f32[B, N, 8]"),
        ("x[ids, :, ids]", "f32[N, T]"),
        ("x[0, ids, 1]", "f32[N]"),
        ("x[ids[:, None], ids]", "f32[N, N, 8]"),
        ("x[ids, None]", "f32[N, 1, T, 8]"),
        ("x[0, :, ids]", "f32[N, T]"),
        ("(T + 1)[None]", "i64[1]"),
        ("T[None, ..., None]", "i64[1, 1]"),
    ],
)
def test_numpy_indexing(expression: str, expected: str) -> None:
    assert of(expression) == expected


def test_a_slice_to_a_smaller_size_has_that_size() -> None:
    assert of("w[:T]", "x: f32[T], w: f32[512]", " where T in 1..=512") == "f32[T]"


@pytest.mark.parametrize(
    ("inputs", "line", "expected"),
    [
        ("x: f32[B, I], w: f32[O, I]", "y[b, o] = sum[i] x[b, i] * w[o, i]", "f32[B, O]"),
        ("a: f32[I, K], b: f32[J, K]", "d[i, j] = sqrt(sum[k] (a[i, k] - b[j, k]) ** 2)",
         "f32[I, J]"),
        ("x: f32[B, 9]", "s[b, i] = max[j in 0..3] x[b, 2*i + j]", "f32[B, 4]"),
        ("x: f32[T]", "m[i in 0..T, j in 0..T] = i >= j", "bool[T, T]"),
        ("t: f32[V, D], ids: i64[T]", "e[i, d] = t[ids[i], d]", "f32[T, D]"),
        ("x: f32[T]", "y[i] = x[T - 1 - i]", "f32[T]"),
        ("x: f32[5]", "y[i] = x[i + 1] - x[i]", "f32[4]"),
        ("x: f32[5]", "y[i in 1..5] = x[i] - x[i - 1]", "f32[4]"),
        ("x: f32[5]", "y[i] = x[i // 2]", "f32[10]"),
        ("x: f32[5]", "y[i in 0..20] = x[i % 5]", "f32[20]"),
        ("x: f32[9, 7]", "y[i, j, k in 0..9] = x[i + k // 3, j + 2 - k % 3]", "f32[7, 5, 9]"),
        ("x: f32[4 * C, H]", "y[c, i] = x[4*c + 2 * (i % 2) + 1, i // 2]", "f32[C, 2*H]"),
        ("x: f32[9]", "y[i] = sum[k in 0..3, l in 0..3] x[i + (2*k + l) // 2]", "f32[6]"),
        ("x: f32[C, T], w: f32[C, 3]", "y[t] = sum[c, k] x[c, t + k] * w[c, k]",
         "f32[max(0, T - 2)]"),
        ("x: f32[3]", "sum[i] x[i]", "f32"),
        ("x: f32[T]", "y[i] = x[i] * f32(i)", "f32[T]"),
        ("x: bool[A, B]", "y[a] = any[b] x[a, b]", "bool[A]"),
        ("x: i32[A, B]", "y[a] = mean[b] x[a, b]", "f32[A]"),
        ("x: f32[3]", "y[i in 0..4] = 0", "i64[4]"),
    ],
)  # fmt: skip
def test_index_notation(inputs: str, line: str, expected: str) -> None:
    assert of(line, inputs) == expected


def test_a_sum_takes_the_product_that_follows_it() -> None:
    pipeline = checked(
        "pipeline p(a: f32[I, K], b: f32[K, J], c: f32[J]) -> f32[I, J]:\n"
        "    y[i, j] = sum[k] a[i, k] * b[k, j] + c[j]\n"
    )
    assert [a.op for a in pipeline.body if a.op != "input"] == [
        "access", "access", "mul", "sum", "access", "add",
    ]  # fmt: skip
    total = next(a for a in pipeline.body if a.op == "sum")
    assert ("axis", (2,)) in total.attributes


def test_functions_apply_to_single_elements_of_index_notation() -> None:
    text = """
fn soft[E: float](v: E[*S], k: float = 1.0) -> E[*S]:
    log1p(exp(v * k))

fn dot(v: f32, w: f32[K]) -> f32:
    sum[k] v * w[k]

pipeline p(x: f32[A], w: f32[K]) -> f32[A]:
    y[a] = soft(x[a], k=2) + dot(x[a], w)
"""
    assert result_types(text) == ["f32[A]"]


def test_weights_by_path_name_and_number() -> None:
    text = """
weights w = "m.safetensors"
fn dense(x: f32[*S, K], p: weights) -> f32[*S, 8]:
    y = x @ p.weight
    if has(p, "bias"):
        y = y + p.bias
    y
pipeline p(x: f32[B, 8]) -> f32[B, 8]:
    for layer in w.layer:
        x = x |> dense(layer)
    x * w.scale + f32(w["odd-name"].x["y"][0]) + w.layer[2].bias + w["layer.10"]["weight"][0]
"""
    pipeline = checked(text)
    keys = [dict(a.attributes)["key"] for a in pipeline.body if a.op == "weight"]
    assert keys == ["layer.2.weight", "layer.2.bias", "layer.10.weight", "scale", "odd-name.x.y"]


def test_generic_dtypes_and_ranks_follow_the_arguments() -> None:
    text = """
fn scaled[E: float](x: E[*S, N], by: E[N]) -> E[*S, N]:
    x * by * E(N)
pipeline p(x: f16[2, 3, T], y: f64[T]):
    scaled(x, f16(y)), scaled(y, y)
"""
    assert result_types(text) == ["f16[2, 3, T]", "f64[T]"]


@pytest.mark.parametrize(
    ("signature", "call", "checks"),
    [
        ("x: f32[2*T]", "f(a)", ["N % 2 ==0"]),
        ("x: f32[T - 2]", "f(a)", []),
        ("x: f32[T + 2]", "f(a)", ["N - 2 >=0"]),
        ("x: f32[T], y: f32[2*T + 1]", "f(a, concat([a, a, a[0:1]]))", []),
    ],
)
def test_dimension_expressions_are_solved(signature: str, call: str, checks: list[str]) -> None:
    pipeline = checked(
        f"fn f({signature}) -> i64:\n    T\npipeline p(a: f32[N]) where N >= 1:\n    {call}\n"
    )
    found = [f"{c.expr} {c.relation}" for c in pipeline.checks]
    assert [c for c in found if "N - 1" not in c] == checks


def test_ranges_and_facts_of_where() -> None:
    pipeline = checked(
        "const H = 4\npipeline p(x: f32[D, T, U]) -> f32[D // H, H, T, U]\n"
        "where D % H == 0, T in 1..=512, U in 2..9, U <= T:\n"
        "    reshape(x, [D // H, H, T, U])\n"
    )
    facts = pipeline.facts
    assert facts.bounds(pipeline.inputs[0][1].shape[1]) == (2, 512)  # T is at least U
    assert facts.bounds(pipeline.inputs[0][1].shape[2]) == (2, 8)
    assert facts.divides(pipeline.inputs[0][1].shape[0], 4)
    assert pipeline.dims == ("D", "T", "U")


def test_facts_of_a_function_are_proved_or_checked_at_the_call() -> None:
    text = """
fn halves(x: f32[D]) -> f32[2, D // 2]
where D % 2 == 0:
    reshape(x, [2, D // 2])
pipeline p(x: f32[8], y: f32[N]):
    halves(x), halves(y)
"""
    pipeline = checked(text)
    assert [(str(c.expr), c.relation) for c in pipeline.checks] == [("N % 2", "==0")]


def test_loops_and_branches_are_decided_while_compiling() -> None:
    text = """
const SIZES = [(1, 2.0), (3, 4.0)]
const FAST = True
fn f(x: f32[N], mode: str, n: int = 2) -> f32[N]:
    if mode == "add" and n > 1:
        x + f32(n)
    elif FAST:
        x * f32(n)
    else:
        nonsense
pipeline p(x: f32[4]) -> f32[4]:
    for a, b in SIZES:
        x = x * b + f32(a)
    for i in 0..=2:
        x = f(x, "add", i)
    x
"""
    ops = [a.op for a in checked(text).body]
    assert ops.count("mul") == 4 and ops.count("add") == 3


def test_named_results_tuples_and_rebinding() -> None:
    text = """
fn stats(x: f32[N]) -> (low: f32, high: f32):
    min(x), max(x)
pipeline p(x: f32[N]) -> (a: f32, b: f32, c: f32[N]):
    r = stats(x)
    low, high = r
    x = x - r.low
    low, high, x
"""
    pipeline = checked(text)
    assert [name for name, _ in pipeline.results] == ["a", "b", "c"]


def test_modules_of_the_program_itself() -> None:
    helper = "import base\nconst TWO = 2\nfn twice(x: f32[*S]) -> f32[*S]:\n    base.id(x) * TWO\n"
    base = "fn id(x: f32[*S]) -> f32[*S]:\n    x\n"
    text = "import helper\npipeline p(x: f32[3, N]):\n    helper.twice(x) + helper.TWO\n"
    assert result_types(text, helper=helper, base=base) == ["f32[3, N]"]


def test_pipelines_are_called_as_functions_are() -> None:
    model = """
weights w = "model.npz"
pipeline model(x: f32[B, 8]) -> (y: f32[B, 8], n: i64[B])
where B in 1..=64:
    x @ w.layer[10].weight, argmax(x, axis=1)
"""
    text = """
import model
pipeline twice(x: f32[B, 8]) -> f32[B, 8]
where B >= 1:
    model.model(once(x)).y
pipeline once(x: f32[B, 8]) -> f32[B, 8]:
    y, n = model.model(x)
    y
"""
    pipeline = checked(text, model=model)
    assert [str(pipeline.types[value]) for _, value in pipeline.results] == ["f32[B, 8]"]
    assert [str(c.expr) for c in pipeline.checks if c.relation == ">=0"].count("-B + 64") == 2
    assert [a.label for a in pipeline.body if a.op == "matmul"] == [
        "twice.once.model.matmul", "twice.model.matmul"
    ]  # fmt: skip


def test_the_greatest_square_of_an_image_is_inside_it() -> None:
    text = """
pipeline p(x: u8[B, H, W]):
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    x[:, top:top + side, left:left + side]
"""
    assert result_types(text) == ["u8[B, min(H, W), min(H, W)]"]


def test_operations_know_where_they_stand_and_what_called_them() -> None:
    text = "fn f(x: f32[N]) -> f32[N]:\n    exp(x)\npipeline p(x: f32[N]):\n    f(f(x))\n"
    pipeline = checked(text)
    inner, outer = [a for a in pipeline.body if a.op == "exp"]
    assert (inner.span.text, inner.label) == ("exp(x)", "p.f.exp")
    assert [s.text for s in inner.stack] == ["f(x)"]
    assert [s.text for s in outer.stack] == ["f(f(x))"]


def test_optional_arguments_are_none() -> None:
    text = """
fn f(x: f32[N], mask: bool[*M] = None, scale: float = None) -> f32[N]:
    if mask != None:
        x = select(mask, x, 0.0)
    if scale == None:
        x
    else:
        x * scale
pipeline p(x: f32[N]):
    f(f(f(x, x > 0), scale=2), True, 1)
"""
    assert result_types(text) == ["f32[N]"]


def test_same_text_same_program() -> None:
    text = "pipeline p(x: f32[B, T]):\n    y[b] = sum[t] x[b, t] * f32(t)\n    y\n"
    assert checked(text) == checked(text)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("x[:D // 2]", "f32[D // 2]"),
        ("x[D // 2:]", "f32[D // 2]"),
        ("x[:D // 2] + x[D // 2:]", "f32[D // 2]"),
        ("x[D // 4:D // 2]", "f32[D // 2 - D // 4]"),
    ],
)
def test_halves_of_a_dimension(expression: str, expected: str) -> None:
    assert of(expression, "x: f32[D]", " where D % 2 == 0") == expected


@pytest.mark.parametrize(
    ("shape", "where", "expected"),
    [
        ("B, T // 2, -1", "T % 2 == 0", "f32[B, T // 2, 2*C]"),
        ("B, T // 4, -1, C // 8", "T % 4 == 0, C % 8 == 0", "f32[B, T // 4, 32, C // 8]"),
        ("B // 2, T // 2, -1", "T % 2 == 0, B % 2 == 0", "f32[B // 2, T // 2, 4*C]"),
    ],
)
def test_what_is_left_beside_parts_of_a_size(shape: str, where: str, expected: str) -> None:
    assert of(f"reshape(x, [{shape}])", "x: f32[B, T, C]", f" where {where}") == expected


def test_an_index_of_all_elements_is_taken_apart() -> None:
    text = "y[k in 0..H*W] = x[k // W, k % W]"
    assert of(text, "x: f32[H, W]", " where W >= 1") == "f32[H*W]"


def test_a_function_that_nothing_calls_is_doubted_for_no_size_it_may_have() -> None:
    text = """
fn glued(x: f32[*S], m: bool[*M]) -> f32[*S]:
    a, b = split(select(m, x, 0), 2, axis=-2)
    concat([a, b], axis=-2)
fn halves(x: f32[D]):
    y = reshape(x, [2, D // 2])
    for i in 0..D:
        y = y + 1
    if D > 3:
        y
    else:
        -y
pipeline p(x: f32[N]):
    x
"""
    assert result_types(text) == ["f32[N]"]


def test_parentheses_around_one_result_type_are_those_around_one_value() -> None:
    assert result_types(
        "fn f(x: f32[N]) -> (f32[N]):\n    x\n"
        "fn g(x: f32[N]) -> (y: f32[N]):\n    x\n"
        "pipeline p(x: f32[B]) -> (f32[B]):\n    f(x) + g(x).y\n"
    ) == ["f32[B]"]
    pipeline = checked("pipeline p(x: f32[B]) -> (y: f32[B]):\n    x\n")
    assert [name for name, _ in pipeline.results] == ["y"]
