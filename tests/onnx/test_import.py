"""Models are imported as sources that compile and compute what the standard's reference does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import stagefuse as sf
from stagefuse.onnx import OnnxError, import_model

from . import models
from .models import F32, I64, node

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    request.node.add_report_section("setup", "seed", f"seed {seed}")
    return np.random.default_rng(seed)


def inputs_of(name: str, rng: np.random.Generator) -> dict[str, Any]:
    match name:
        case "attention":
            mask = (np.arange(7)[None, :] < rng.integers(1, 8, (3, 1))).astype(np.int64)
            return {"ids": rng.integers(0, 50, (3, 7)), "mask": mask}
        case "residual":
            return {"image": rng.standard_normal((2, 3, 32, 32)).astype(np.float32)}
        case "quantised":
            return {"x": rng.standard_normal((5, 12)).astype(np.float32)}
    return {"x": rng.standard_normal((3, 8)).astype(np.float32)}


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "quantised"])
def test_an_imported_model_computes_what_the_reference_does(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    build: Callable[..., onnx.ModelProto] = getattr(models, name)
    made = build(rng)
    onnx.save(made, tmp_path / f"{name}.onnx")
    path = sf.import_onnx(tmp_path / f"{name}.onnx", tmp_path / "out")
    assert path == tmp_path / "out" / f"{name}.pipe"
    inputs = inputs_of(name, rng)
    found = sf.compile(path)(**inputs)
    (wanted,) = models.reference(made, **inputs)
    # f32 throughout: the deepest sum has 147 products (the stem), and a few layers follow
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_the_source_reads_like_one_written_by_hand(rng: np.random.Generator) -> None:
    text = import_model(models.mlp(rng), name="mlp").text
    assert text == '''"""Imported from ONNX.

In the model, `Batch` is `batch`.
"""

import nn

weights w = "mlp.safetensors"

pipeline mlp(x: f32[Batch, 8]) -> f32[Batch, 4]
where Batch >= 1:
    nn.linear(x, w.fc1) |> nn.relu |> nn.linear(w.fc2) |> nn.softmax
'''


def test_a_plain_source_has_a_line_for_each_node(rng: np.random.Generator) -> None:
    text = import_model(models.mlp(rng), name="mlp", plain=True).text
    assert text.endswith("""\
    fc1_Gemm_output_0 = nn.linear(x, w.fc1)
    act_Relu_output_0 = nn.relu(fc1_Gemm_output_0)
    logits = nn.linear(act_Relu_output_0, w.fc2)
    probs = nn.softmax(logits)
    probs
""")


def test_arithmetic_of_shapes_leaves_no_trace(rng: np.random.Generator) -> None:
    text = import_model(models.attention(rng), plain=True).text
    assert "reshape(" in text and "[Batch, Sequence, 4, 8]" in text
    assert "stack" not in text and "concat" not in text


def test_everything_that_cannot_be_imported_is_named_at_once() -> None:
    made = models.model(
        [node("Multinomial", ["x"], ["a"]), node("Dropout", ["x", "", "yes"], ["b"]),
         node("MaxPool", ["x"], ["c"], kernel_shape=[2], auto_pad="ELSE")],
        {"x": (F32, ["B", 2, 4])}, ["a", "b", "c"], {"yes": np.array(True)},
    )  # fmt: skip
    with pytest.raises(OnnxError) as caught:
        import_model(made)
    found = {(p.op, p.node, p.attribute) for p in caught.value.problems}
    assert found == {("Multinomial", "node_a", ""), ("Dropout", "node_b", ""),
                     ("MaxPool", "node_c", "auto_pad")}  # fmt: skip
    scope = {p.op: "out of scope" in p.message for p in caught.value.problems}
    assert scope == {"Multinomial": True, "Dropout": False, "MaxPool": False}
    assert all(p.need for p in caught.value.problems if p.op == "MaxPool")


@pytest.mark.parametrize("plain", [False, True])
def test_a_truth_value_is_an_input_and_a_result(plain: bool) -> None:
    made = models.model([node("Not", ["x"], ["y"])], {"x": (onnx.TensorProto.BOOL, [])}, ["y"])
    found = import_model(made, plain=plain)
    assert "(x: bool[]) -> bool[]:" in found.text
    assert sf.compile(found.text)(x=np.array(True)).tolist() is False


def test_a_transform_of_numbers_that_may_be_complex_is_refused() -> None:
    made = models.model([node("DFT", ["x"], ["y"], axis=1)], {"x": (F32, [2, 4, "parts"])}, ["y"])
    with pytest.raises(OnnxError, match="a last axis that is neither 1 nor 2"):
        import_model(made)


def test_a_single_element_of_a_resized_axis_is_the_first_one(rng: np.random.Generator) -> None:
    """As the definition of pytorch_half_pixel has it, where sizes are known and where not."""
    x = rng.standard_normal((5, 5)).astype(np.float32)
    for size in (5, "n"):
        made = models.model(
            [node("Resize", ["x", "", "", "one"], ["y"], mode="cubic",
                  coordinate_transformation_mode="pytorch_half_pixel")],
            {"x": (F32, [5, size])}, ["y"], {"one": np.array([1, 1])}, opset=19,
        )  # fmt: skip
        found = import_model(made)
        y = sf.compile(found.text, weights={"w": found.arrays} if found.arrays else None)(x=x)
        np.testing.assert_allclose(y, x[:1, :1], rtol=1e-6)


def test_an_attribute_that_a_record_does_not_read_is_refused() -> None:
    made = models.model([node("Relu", ["x"], ["y"], slope=0.5)], {"x": (F32, [4])}, ["y"])
    with pytest.raises(OnnxError) as caught:
        import_model(made)
    assert caught.value.problems[0].attribute == "slope"


def test_an_input_that_must_be_known_can_be_fixed() -> None:
    made = models.model([node("Reshape", ["x", "shape"], ["y"])],
                        {"x": (F32, [6]), "shape": (I64, [2])}, ["y"])  # fmt: skip
    with pytest.raises(OnnxError) as caught:
        import_model(made)
    assert caught.value.problems[0].inputs == ("shape",)
    found = import_model(made, fixed={"shape": np.array([2, -1])})
    assert found.inputs == {"x": "x"} and "-> f32[2, 3]" in found.text


def test_names_that_the_language_takes_are_changed() -> None:
    made = models.model([node("Add", ["sum", "in put"], ["w"]), node("Neg", ["w"], ["pipeline"])],
                        {"sum": (F32, ["n"]), "in put": (F32, ["n"])}, ["pipeline"])  # fmt: skip
    found = import_model(made)
    x = np.arange(3, dtype=np.float32)
    pipe = sf.compile(found.text)
    y = pipe(**{found.inputs["sum"]: x, found.inputs["in put"]: x})
    np.testing.assert_array_equal(y, -2 * x)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("given", "result", "weights"),
    [("w", "y", "params"), ("x", "w", "params"), ("w", "params", "params2"), ("x", "y", "w")],
)
def test_the_weights_are_called_what_no_input_and_no_result_is(
    given: str, result: str, weights: str, plain: bool, rng: np.random.Generator
) -> None:
    k = rng.standard_normal((3, 2), np.float32)
    nodes = [node("MatMul", [given, "fc.weight"], ["h"]), node("Relu", ["h"], [result])]
    made = models.model(nodes, {given: (F32, ["n", 3])}, [result], {"fc.weight": k})
    found = import_model(made, plain=plain)
    assert found.inputs == {given: given} and found.results == {result: result}
    assert f'weights {weights} = "' in found.text
    x = rng.standard_normal((5, 3), np.float32)
    y = sf.compile(found.text, weights={found.weights: found.arrays})(**{given: x})
    np.testing.assert_allclose(y, np.maximum(x @ k, 0), rtol=0, atol=8 * 3 * 2.0**-24)


@pytest.mark.parametrize("name", ["class", "out"])
def test_inputs_can_be_passed_by_name(name: str) -> None:
    made = models.model([node("Neg", [name], ["y"])], {name: (F32, ["n"])}, ["y"])
    found = import_model(made)
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(sf.compile(found.text)(**{found.inputs[name]: x}), -x)


def test_the_command_writes_both_files(rng: np.random.Generator, tmp_path: Path) -> None:
    onnx.save(models.mlp(rng), tmp_path / "net.onnx")
    command = [sys.executable, "-m", "stagefuse", "import", str(tmp_path / "net.onnx"), "-o",
               str(tmp_path / "made.pipe")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "made.pipe"), str(tmp_path / "made.safetensors")]
    assert 'weights w = "made.safetensors"' in (tmp_path / "made.pipe").read_text()


def test_weights_of_others_are_not_replaced(rng: np.random.Generator, tmp_path: Path) -> None:
    """Models often lie beside the weights that they were exported from, under the same name."""
    onnx.save(models.mlp(rng), tmp_path / "net.onnx")
    (tmp_path / "net.safetensors").write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(FileExistsError, match="these weights were there before"):
            sf.import_onnx(tmp_path / "net.onnx", tmp_path)
        assert (tmp_path / "net.safetensors").read_bytes() == b"mine"
        assert not (tmp_path / "net.pipe").exists()
    (tmp_path / "net.safetensors").unlink()
    for _ in range(2):  # its own are
        sf.import_onnx(tmp_path / "net.onnx", tmp_path)
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == ["net.onnx", "net.pipe", "net.safetensors"]


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    command = [sys.executable, "-m", "stagefuse", "import", str(tmp_path / "bad.onnx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "this is no ONNX model" in done.stderr
    assert "bad.onnx" in done.stderr


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT2", "UINT2"])
def test_packed_weights_are_held_in_bytes(kind: str, rng: np.random.Generator) -> None:
    number = onnx.TensorProto.DataType.Value(kind)
    element = onnx.helper.tensor_dtype_to_np_dtype(number)
    low = -(1 << (int(kind[-1]) - 1)) if kind[0] == "I" else 0
    values = rng.integers(low, low + (1 << int(kind[-1])), (3, 5))
    made = models.model(
        [node("DequantizeLinear", ["q", "scale"], ["w"]), node("MatMul", ["x", "w"], ["y"])],
        {"x": (F32, ["B", 3])}, ["y"], {"scale": np.array(0.5, np.float32)}, opset=25,
    )  # fmt: skip
    made.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(element), "q"))
    found = import_model(made)
    assert found.arrays["q.q"].dtype == (np.int8 if kind[0] == "I" else np.uint8)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y = sf.compile(found.text, weights={"w": found.arrays})(x=x)
    np.testing.assert_allclose(y, x @ (0.5 * values), rtol=1e-5, atol=1e-5)


def test_bounds_that_are_greater_than_the_dtype_hold_nothing_back() -> None:
    """Exporters write the greatest f32 where a clip has no bound."""
    most = float(np.finfo(np.float32).max)
    made = models.model(
        [node("Clip", ["x"], ["y"], min=0.0, max=most)],
        {"x": (onnx.TensorProto.FLOAT16, ["n"])}, ["y"], {}, opset=9,
    )  # fmt: skip
    x = np.array([-1, 2, 65504, np.inf], np.float16)
    found = sf.compile(import_model(made).text)(x=x)
    np.testing.assert_array_equal(found, np.maximum(x, np.float16(0)))
