"""LSTM, GRU, RNN, Scan and Loop become scans of any number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import stagefuse as sf
from stagefuse.compiler.front import check_source
from stagefuse.onnx import OnnxError, import_model

from ..compiler.recurrences import CASES, SIZES, Case
from . import models
from .export_run import by_reference, by_runtime, exported, onnxruntime
from .models import F32, I64, node

BOOL = onnx.TensorProto.BOOL
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    request.node.add_report_section("setup", "seed", f"seed {seed}")
    return np.random.default_rng(seed)


def computed(made: onnx.ModelProto, inputs: dict[str, Any]) -> tuple[Any, ...]:
    found = import_model(made)
    results = sf.compile(found.text, weights={"w": found.arrays} if found.arrays else None)(
        **inputs
    )
    return results if isinstance(results, tuple) else (results,)


def same(made: onnx.ModelProto, inputs: dict[str, Any]) -> None:
    wanted = models.reference(made, **inputs)
    for found, want in zip(computed(made, inputs), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("RNN", {}),
        ("GRU", {}),
        ("GRU", {"linear_before_reset": 1}),
        ("LSTM", {}),
    ],
)
def test_the_number_of_steps_may_vary(
    op: str, attributes: dict[str, int], steps: int, rng: np.random.Generator
) -> None:
    g = GATES[op]
    weights = {"W": models.drawn(rng, 1, 4 * g, 3), "R": models.drawn(rng, 1, 4 * g, 4),
               "B": models.drawn(rng, 1, 8 * g)}  # fmt: skip
    made = models.model([node(op, ["x", "W", "R", "B"], ["y", "h"], hidden_size=4, **attributes)],
                        {"x": (F32, ["steps", "batch", 3])}, ["y", "h"], weights)  # fmt: skip
    assert f"onnx.{op.lower()}(" in import_model(made).text
    same(made, {"x": rng.standard_normal((steps, 2, 3)).astype(np.float32)})


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def test_both_directions_with_lengths_states_peepholes_clips_and_activations(
    rng: np.random.Generator,
) -> None:
    weights = {"W": models.drawn(rng, 2, 16, 3), "R": models.drawn(rng, 2, 16, 4),
               "B": models.drawn(rng, 2, 32), "P": models.drawn(rng, 2, 12)}  # fmt: skip
    names = ["x", "W", "R", "B", "lens", "h", "c", "P"]
    made = models.model(
        [node("LSTM", names, ["y", "yh", "yc"], hidden_size=4, direction="bidirectional", clip=0.4,
              activations=["HardSigmoid", "Tanh", "LeakyRelu"] * 2, activation_alpha=[0.3, 0.1],
              activation_beta=[0.45])],
        {"x": (F32, ["steps", "batch", 3]), "lens": (onnx.TensorProto.INT32, ["batch"]),
         "h": (F32, [2, "batch", 4]), "c": (F32, [2, "batch", 4])},
        ["y", "yh", "yc"], weights,
    )  # fmt: skip
    lens = np.array([5, 0, 2], np.int32)
    inputs = {"x": models.drawn(rng, 5, 3, 3), "lens": lens, "h": models.drawn(rng, 2, 3, 4),
              "c": models.drawn(rng, 2, 3, 4)}  # fmt: skip
    y, yh, yc = computed(made, inputs)
    # alphas and betas that are not given have their defaults: 0.2 and 0.5, and 0.01
    functions = [((0.3, 0.45), 0.1), ((0.2, 0.5), 0.01)]
    x = inputs["x"].astype(np.float64)
    for d, ((alpha, beta), slope) in enumerate(functions):
        w, r, b, p = (weights[k][d].astype(np.float64) for k in "WRBP")
        h, c = inputs["h"][d].astype(np.float64), inputs["c"][d].astype(np.float64)

        def hard(v: Any, alpha: float = alpha, beta: float = beta) -> Any:
            return np.clip(alpha * np.clip(v, -0.4, 0.4) + beta, 0, 1)

        for t in range(5)[:: -1 if d else 1]:
            i, o, f, u = np.split(x[t] @ w.T + h @ r.T + b[:16] + b[16:], 4, axis=1)
            pi, po, pf = np.split(p, 3)
            cell = hard(f + pf * c) * c + hard(i + pi * c) * np.tanh(np.clip(u, -0.4, 0.4))
            new = hard(o + po * cell) * np.where(cell < 0, slope * cell, cell)
            inside = (t < lens)[:, None]
            np.testing.assert_allclose(y[t, d], np.where(inside, new, 0), rtol=1e-5, atol=1e-5)
            h, c = np.where(inside, new, h), np.where(inside, cell, c)
        np.testing.assert_allclose(yh[d], h, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(yc[d], c, rtol=1e-5, atol=1e-5)


def graph(nodes: list[Any], inputs: dict[str, Any], outputs: list[str]) -> onnx.GraphProto:
    return helper.make_graph(
        nodes, "body",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
    )  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"scan_input_directions": [1], "scan_output_directions": [1]},
        {"scan_input_axes": [1], "scan_output_axes": [-1]},
    ],
)
def test_a_scan_is_a_scan(attributes: dict[str, Any], rng: np.random.Generator) -> None:
    body = graph(
        [node("MatMul", ["h", "W"], ["a"]), node("Add", ["a", "xt"], ["s"]),
         node("Tanh", ["s"], ["h2"]), node("Mul", ["h2", "xt"], ["yt"])],
        {"h": (F32, [2, 3]), "xt": (F32, [2, 3])}, ["h2", "yt"],
    )  # fmt: skip
    first = "scan_input_axes" not in attributes
    made = models.model(
        [node("Scan", ["h0", "x"], ["h1", "y"], body=body, num_scan_inputs=1, **attributes)],
        {"h0": (F32, [2, 3]), "x": (F32, ["T", 2, 3] if first else [2, "T", 3])}, ["h1", "y"],
        {"W": models.drawn(rng, 3, 3)},
    )  # fmt: skip
    assert "scan turn in 0..T with h1 = h0:" in import_model(made).text
    x = models.drawn(rng, 7, 2, 3)
    inputs = {"h0": models.drawn(rng, 2, 3), "x": x if first else x.transpose(1, 0, 2).copy()}
    found = computed(made, inputs)
    h, rows = inputs["h0"].astype(np.float64), []
    (w,) = (numpy_helper.to_array(t) for t in made.graph.initializer)
    order = range(7)[:: -1 if "scan_input_directions" in attributes else 1]
    for t in order:
        h = np.tanh(h @ w + x[t])
        rows.append(h * x[t])
    y = np.stack(rows[:: -1 if "scan_output_directions" in attributes else 1])
    np.testing.assert_allclose(found[0], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], y if first else y.transpose(1, 2, 0), rtol=1e-5, atol=1e-6)


def loop(body: onnx.GraphProto, outputs: list[str], states: list[str]) -> onnx.ModelProto:
    """A model that runs a body for each row of x."""
    return models.model(
        [node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["rows"], axis=0),
         node("Loop", ["rows", "", *states], outputs, body=body)],
        {"x": (F32, ["N", 3]), "s0": (F32, [3])}, outputs, {"zero": np.array(0)},
    )  # fmt: skip


def test_a_loop_over_a_size_is_a_scan(rng: np.random.Generator) -> None:
    body = graph(
        [node("Gather", ["x", "i"], ["row"], axis=0), node("Add", ["s", "row"], ["s2"]),
         node("Cast", ["i"], ["place"], to=F32), node("Mul", ["s2", "place"], ["y"]),
         node("Identity", ["go"], ["go2"]), node("Identity", ["kept"], ["kept2"])],
        {"i": (I64, []), "go": (BOOL, []), "s": (F32, [3]), "kept": (F32, [3])},
        ["go2", "s2", "kept2", "y"],
    )  # fmt: skip
    made = loop(body, ["total", "same", "rows_"], ["s0", "s0"])
    text = import_model(made).text
    assert "scan turn in 0..N with total = s0:" in text and "x[turn, :]" in text
    x, s0 = models.drawn(rng, 600, 3), models.drawn(rng, 3)
    total, kept, rows = computed(made, {"x": x, "s0": s0})
    sums = s0 + np.cumsum(x.astype(np.float64), axis=0)
    np.testing.assert_allclose(total, sums[-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(kept, s0)
    np.testing.assert_allclose(rows, sums * np.arange(600)[:, None], rtol=1e-4, atol=1e-2)


def test_what_a_turn_was_given_can_be_gathered(rng: np.random.Generator) -> None:
    """Not what it carries on."""
    body = graph(
        [node("Identity", ["s"], ["before"]), node("Add", ["s", "s"], ["s2"]),
         node("Identity", ["go"], ["go2"])],
        {"i": (I64, []), "go": (BOOL, []), "s": (F32, [3])}, ["go2", "s2", "before"],
    )  # fmt: skip
    s0 = models.drawn(rng, 3)
    last, rows = computed(loop(body, ["last", "rows_"], ["s0"]),
                          {"x": models.drawn(rng, 4, 3), "s0": s0})  # fmt: skip
    np.testing.assert_array_equal(last, 16 * s0)
    np.testing.assert_array_equal(rows, s0 * np.array([[1], [2], [4], [8]], np.float32))


def growing(turns: str) -> onnx.ModelProto:
    body = graph(
        [node("Concat", ["s", "x"], ["s2"], axis=0), node("Identity", ["go"], ["go2"])],
        {"i": (I64, []), "go": (BOOL, []), "s": (F32, ["M", 3])}, ["go2", "s2"],
    )  # fmt: skip
    return models.model(
        [node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["rows"], axis=0),
         node("Loop", [turns, "", "x"], ["y"], body=body)],
        {"x": (F32, ["N", 3])}, ["y"], {"zero": np.array(0), "three": np.array(3)},
    )  # fmt: skip


def test_a_loop_that_changes_shapes_is_unrolled_if_its_turns_are_known(
    rng: np.random.Generator,
) -> None:
    x = models.drawn(rng, 2, 3)
    np.testing.assert_array_equal(computed(growing("three"), {"x": x})[0], np.tile(x, (4, 1)))
    with pytest.raises(OnnxError, match="would change its type"):
        import_model(growing("rows"))


def test_a_loop_that_data_end_is_refused() -> None:
    body = graph(
        [node("Add", ["s", "s"], ["s2"]), node("Less", ["s2", "limit"], ["go2"])],
        {"i": (I64, []), "go": (BOOL, []), "s": (F32, [])}, ["go2", "s2"],
    )  # fmt: skip
    made = models.model([node("Loop", ["many", "", "s0"], ["y"], body=body)],
                        {"s0": (F32, []), "limit": (F32, [])}, ["y"],
                        {"many": np.array(1 << 40)})  # fmt: skip
    with pytest.raises(OnnxError, match="a loop whose end depends on data"):
        import_model(made)


def test_the_scan_of_opset_8_is_one_for_each_element_of_a_batch(rng: np.random.Generator) -> None:
    body = graph([node("Add", ["s", "row"], ["s2"]), node("Identity", ["s2"], ["y"])],
                 {"s": (F32, [2]), "row": (F32, [2])}, ["s2", "y"])  # fmt: skip
    made = models.model(
        [node("Scan", ["", "s0", "x"], ["s1", "ys"], body=body, num_scan_inputs=1,
              directions=[1])],
        {"s0": (F32, ["B", 2]), "x": (F32, ["B", "T", 2])}, ["s1", "ys"], opset=8,
    )  # fmt: skip
    x, s0 = models.drawn(rng, 3, 5, 2), models.drawn(rng, 3, 2)
    last, rows = computed(made, {"s0": s0, "x": x})
    wanted = s0[:, None] + np.cumsum(x[:, ::-1].astype(np.float64), axis=1)
    np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last, wanted[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_scan_is_exported_as_a_loop(
    case: Case, rng: np.random.Generator, tmp_path: Path
) -> None:
    made = exported(case.source, tmp_path)
    program, found, _ = check_source(tmp_path / "p.pipe", {})
    assert not found and "Loop" in {n.op_type for n in made.graph.node}
    for sizes in SIZES:
        if min(sizes["T"], sizes["D"], sizes["B"]) < case.least:
            continue
        inputs = case.inputs(program.pipelines[0], sizes, rng)
        if onnxruntime is None and sizes["T"] < 2:
            continue  # the package's own implementation wants a turn
        run = by_reference if onnxruntime is None else by_runtime
        wanted = case.meaning(*(v.astype(np.float64 if v.dtype.kind == "f" else np.int64)
                                for v in inputs.values()))  # fmt: skip
        for got, want in zip(run(made, inputs), wanted, strict=True):
            if onnxruntime is None:
                got = got.reshape(np.shape(want))  # it stacks scalars as vectors of one
            assert np.shape(got) == np.shape(want)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def branch(nodes: list[onnx.NodeProto], *results: str) -> onnx.GraphProto:
    return helper.make_graph(
        nodes, "branch", [], [helper.make_empty_tensor_value_info(name) for name in results]
    )


@pytest.mark.parametrize("shape", [[], [1]])
def test_a_branch_on_data_is_a_choice(shape: list[int], rng: np.random.Generator) -> None:
    """In each other, with several results, on a sum and on a size."""
    inner = node("If", ["small"], ["h"], then_branch=branch([node("Neg", ["x"], ["n"])], "n"),
                 else_branch=branch([node("Exp", ["x"], ["e"])], "e"))  # fmt: skip
    made = models.model(
        [node("ReduceSum", ["x"], ["sum"], keepdims=0), node("Greater", ["sum", "zero"], ["up"]),
         node("Reshape", ["up", "shape"], ["c"]), node("Shape", ["x"], ["rows"], end=1),
         node("Less", ["rows", "three"], ["small"]),
         node("If", ["c"], ["y", "n"],
              then_branch=branch([node("Mul", ["x", "x"], ["t"]), node("Size", ["x"], ["k"])],
                                 "t", "k"),
              else_branch=branch([inner, node("ReduceMax", ["rows"], ["m"], keepdims=0)],
                                 "h", "m"))],
        {"x": (F32, ["rows", 4])}, ["y", "n"],
        {"zero": np.float32(0), "three": np.array([3]), "shape": np.array(shape, np.int64)},
    )  # fmt: skip
    for rows in (1, 2, 3, 5):
        x = np.abs(rng.standard_normal((rows, 4), np.float32))
        same(made, {"x": x})
        same(made, {"x": -x})


def test_branches_on_data_of_other_shapes_are_refused() -> None:
    made = models.model(
        [node("ReduceMax", ["x"], ["c"], keepdims=0),
         node("If", ["c"], ["y"], then_branch=branch([node("Not", ["x"], ["t"])], "t"),
              else_branch=branch([node("Unsqueeze", ["x", "zero"], ["e"])], "e"))],
        {"x": (BOOL, ["rows"])}, ["y"], {"zero": np.array([0])}, opset=20,
    )  # fmt: skip
    with pytest.raises(OnnxError, match=r"give bool\[Rows\] and bool\[1, Rows\]"):
        import_model(made)


def test_a_branch_for_other_sizes_says_nothing_of_those_meant() -> None:
    """As PyTorch writes a squeeze of an axis that may have one element."""
    made = models.model(
        [node("Shape", ["x"], ["n"], start=1, end=2), node("Equal", ["n", "one"], ["c"]),
         node("If", ["c"], ["y"],
              then_branch=branch([node("Squeeze", ["x", "one"], ["t"])], "t"),
              else_branch=branch([node("Identity", ["x"], ["e"])], "e"))],
        {"x": (F32, ["rows", "n"])}, ["y"], {"one": np.array([1])},
    )  # fmt: skip
    with pytest.raises(OnnxError, match="a branch is refused.*in its node Squeeze") as caught:
        import_model(made)
    assert "`sizes=` sizes" in caught.value.problems[0].need
    assert "f32[Rows, N]" in import_model(made, sizes={"n": (2, 9)}).text
    assert "-> f32[Rows]" in import_model(made, sizes={"n": 1}).text
