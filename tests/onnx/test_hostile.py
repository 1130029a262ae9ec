"""Damaged and hostile models give an error in words, read nothing outside, and never hang."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper

import stagefuse as sf
from stagefuse.onnx import OnnxError, import_model

from . import models
from .models import F32, node


def refused(path: Path) -> str:
    with pytest.raises(OnnxError) as caught:
        sf.import_onnx(path, path.parent / "out")
    assert not (path.parent / "out").exists(), "nothing is written"
    return str(caught.value)


def test_every_truncation_is_refused_or_a_whole_model(tmp_path: Path) -> None:
    whole = models.mlp(np.random.default_rng(1)).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    whole = np.frombuffer(models.residual(rng).SerializeToString(), np.uint8)
    path = tmp_path / "damaged.onnx"
    for _ in range(60):
        damaged = whole.copy()
        at = rng.integers(0, len(whole), 6)
        damaged[at] = rng.integers(0, 256, 6)
        path.write_bytes(damaged.tobytes())
        try:
            sf.import_onnx(path, tmp_path / "out")
        except OnnxError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}") from error


@pytest.mark.parametrize("name", ["image", "Relu", "inner", "domain", "size"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    inner = helper.make_node("Relu", ["image"], ["inner"], domain="domain")
    graph = helper.make_graph(
        [inner], "graph", [helper.make_tensor_value_info("image", F32, ["size"])],
        [helper.make_tensor_value_info("inner", F32, ["size"])],
    )  # fmt: skip
    whole = helper.make_model(graph).SerializeToString()
    path = tmp_path / "damaged.onnx"
    path.write_bytes(whole.replace(name.encode(), name.encode()[:-1] + b"\xa2"))
    assert f"{name.encode()[:-1] + bytes([0xA2])!r} is no UTF-8 text" in refused(path)


def test_a_description_may_be_any_bytes(tmp_path: Path) -> None:
    made = models.mlp(np.random.default_rng(1))
    made.doc_string = made.graph.doc_string = "a network"
    path = tmp_path / "described.onnx"
    path.write_bytes(made.SerializeToString().replace(b"a network", b"a r\xe9seau."))
    assert sf.import_onnx(path, tmp_path / "out").exists()


def external(tmp_path: Path, location: str, **entries: str) -> Path:
    tensor = TensorProto(name="weight", data_type=F32, dims=[4],
                         data_location=TensorProto.EXTERNAL)  # fmt: skip
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    made = models.model([node("Add", ["x", "weight"], ["y"])], {"x": (F32, [4])}, ["y"])
    made.graph.initializer.append(tensor)
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "inside.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    return folder / "m.onnx"


def test_external_data_are_read_from_the_model_s_folder(tmp_path: Path) -> None:
    path = sf.import_onnx(external(tmp_path, "inside.bin"), tmp_path / "out")
    y = sf.compile(path)(x=np.ones(4, np.float32))
    np.testing.assert_array_equal(y, [1, 2, 3, 4])


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "",
                                      "..\\secret.bin", "inside.bin\0", "."])  # fmt: skip
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    text = refused(external(tmp_path, location))
    assert "outside the model's folder" in text or "there is no file" in text


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path, "link.bin")
    os.symlink(tmp_path / "secret.bin", path.parent / "link.bin")
    assert "outside the model's folder" in refused(path)


@pytest.mark.parametrize("entries", [{"offset": "4"}, {"length": "1000"}, {"offset": "-8"},
                                     {"offset": "much"}, {"length": "99999999999999999999"}])
def test_external_data_beyond_their_file_are_refused(
    tmp_path: Path, entries: dict[str, str]
) -> None:
    assert "weight" in refused(external(tmp_path, "inside.bin", **entries))


def test_huge_and_negative_dims_are_refused_before_any_memory_is_taken() -> None:
    for dims in ([1 << 40, 1 << 40], [-1], [1 << 62], [1] * 100):
        made = models.model([node("Add", ["x", "big"], ["y"])], {"x": (F32, [4])}, ["y"])
        made.graph.initializer.append(TensorProto(name="big", data_type=F32, dims=dims))
        with pytest.raises(OnnxError, match="big"):
            import_model(made)


def test_a_huge_constant_is_not_made_while_importing() -> None:
    made = models.model(
        [node("ConstantOfShape", ["shape"], ["zeros"]), node("ReduceSum", ["zeros"], ["y"])],
        {"x": (F32, [4])}, ["y"], {"shape": np.array([1 << 20, 1 << 20], np.int64)},
    )  # fmt: skip
    assert "full([1048576, 1048576], 0.0, f32)" in import_model(made).text


@pytest.mark.parametrize("shape", [(2, 1 << 40), (2, 0), (2, 4)])
def test_positions_along_axes_that_are_not_there_are_refused(shape: tuple[int, ...]) -> None:
    made = models.model([node("GatherND", ["x", "at"], ["y"], batch_dims=1)],
                        {"x": (F32, [2, 3, 4]), "at": (models.I64, shape)}, ["y"])  # fmt: skip
    with pytest.raises(OnnxError, match=f"positions along {shape[1]} axes of an input of 3"):
        import_model(made)


def test_a_side_of_too_many_positions_is_not_resized() -> None:
    made = models.model([node("Resize", ["x", "", "", "sizes"], ["y"], mode="cubic")],
                        {"x": (F32, [1, 1, 4, 4])}, ["y"],
                        {"sizes": np.array([1, 1, 1 << 32, 4])})  # fmt: skip
    with pytest.raises(OnnxError, match="a side of 4294967296 positions"):
        import_model(made)


def test_an_axis_that_is_added_twice_is_refused() -> None:
    made = models.model([node("Unsqueeze", ["x", "axes"], ["y"])], {}, ["y"],
                        {"x": np.zeros((2, 3)), "axes": np.array([1, 1])})  # fmt: skip
    with pytest.raises(OnnxError, match="Unsqueeze"):
        import_model(made)


def test_a_scan_over_more_than_it_is_given_is_refused() -> None:
    x, y = (helper.make_tensor_value_info(name, F32, []) for name in "xy")
    body = helper.make_graph([node("Neg", ["x"], ["y"])], "body", [x], [y])
    made = models.model([node("Scan", ["v"], ["all"], body=body, num_scan_inputs=3)],
                        {"v": (F32, [4])}, ["all"])  # fmt: skip
    with pytest.raises(OnnxError, match="a scan over 3 of its 1 inputs"):
        import_model(made)


def test_a_branch_without_a_value_is_not_chosen() -> None:
    """What it lacks was refused before."""
    branches = {
        f"{which}_branch": helper.make_graph([node("Neg", [of], [f"{which}_y"])], which, [],
                        [helper.make_tensor_value_info(f"{which}_y", F32, [4])])
        for which, of in (("then", "x"), ("else", "none"))
    }  # fmt: skip
    made = models.model(
        [node("Unknown", ["x"], ["none"]), node("ReduceMax", ["x"], ["most"], keepdims=0),
         node("Less", ["most", "most"], ["c"]), node("If", ["c"], ["y"], **branches)],
        {"x": (F32, [4])}, ["y"],
    )  # fmt: skip
    with pytest.raises(OnnxError, match="Unknown"):
        import_model(made)


def test_sizes_that_are_squared_without_end_are_refused() -> None:
    names = [f"s{k}" for k in range(8)]
    for shape in ([1 << 20], names):
        nodes, rank = [], len(shape)
        for k in range(40):
            nodes += [node("Flatten", [f"v{k}"], [f"f{k}"], axis=rank if k == 0 else 1),
                      node("Transpose", [f"f{k}"], [f"t{k}"]),
                      node("Mul", [f"f{k}", f"t{k}"], [f"o{k}"]),
                      node("Flatten", [f"o{k}"], [f"v{k + 1}"], axis=2)]
        made = models.model(nodes, {"v0": (F32, shape)}, ["v40"])
        with pytest.raises(OnnxError):
            import_model(made)
    sized = [node("Shape", ["x"], ["d0"]), node("ReduceProd", ["d0"], ["d1"])]
    sized += [node("Mul", [f"d{k}", f"d{k}"], [f"d{k + 1}"]) for k in range(1, 40)]
    sized.append(node("Expand", ["x", "d40"], ["y"]))
    made = models.model(sized, {"x": (F32, names)}, ["y"])
    with pytest.raises(OnnxError, match="more complicated"):
        import_model(made)


def test_nodes_in_a_circle_are_refused() -> None:
    made = models.model([node("Add", ["x", "b_"], ["a_"]), node("Neg", ["a_"], ["b_"])],
                        {"x": (F32, [4])}, ["b_"])  # fmt: skip
    with pytest.raises(OnnxError, match="nothing before it computes"):
        import_model(made)


@pytest.mark.parametrize(
    "nodes",
    [[node("Neg", ["x"], ["y"]), node("Abs", ["x"], ["y"])],
     [node("Neg", ["x"], ["x"]), node("Abs", ["x"], ["y"])],
     [node("Split", ["x"], ["y", "y"], num_outputs=2)],
     [node("Neg", ["x"], ["w"]), node("Add", ["w", "w"], ["y"])]],
)  # fmt: skip
def test_a_name_is_of_one_value(nodes: list[NodeProto]) -> None:
    made = models.model(nodes, {"x": (F32, [4])}, ["y"], {"w": np.ones(4, np.float32)}, opset=18)
    with pytest.raises(OnnxError, match="several values of one graph are named"):
        import_model(made)
    inner = helper.make_graph(nodes, "inner", [], [helper.make_empty_tensor_value_info("y")])
    made = models.model(
        [node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)],
        {"x": (F32, [4])}, ["z"], {"c": np.array(True)}, opset=18,
    )  # fmt: skip
    if not any("x" in n.output or "w" in n.output for n in nodes):
        with pytest.raises(OnnxError, match="several values of one graph are named"):
            import_model(made)


@pytest.mark.parametrize(
    "made, words",
    [(node("Softmax", ["x"], ["y"], axis=2), "axis 2 of 2 dimensions"),
     (node("Flatten", ["x"], ["y"], axis=-3), "axis -3 of 2 dimensions"),
     (node("Flatten", ["x"], ["y"], axis=3), "axis 3 of 2 dimensions"),
     (node("Softmax", ["x"], ["y"], axis=[1]), "`axis` is of the kind ints"),
     (node("Softmax", ["x"], ["y"], axis="1"), "`axis` is of the kind string"),
     (node("Cast", ["x"], ["y"]), "`to` is missing"),
     (node("Neg", ["x", "x"], ["y"]), "it has 2 inputs")],
)  # fmt: skip
def test_a_node_fits_its_schema(made: NodeProto, words: str) -> None:
    with pytest.raises(OnnxError, match=words):
        import_model(models.model([made], {"x": (F32, [2, 3])}, ["y"]))


def test_a_long_chain_is_written_without_a_deep_stack() -> None:
    nodes = [node("Neg", [f"v{k}"], [f"v{k + 1}"]) for k in range(1500)]
    found = import_model(models.model(nodes, {"v0": (F32, [4])}, ["v1500"]))
    assert "for turn in 0..750:" in found.text


def test_functions_that_call_themselves_or_unfold_without_end_are_refused() -> None:
    domain = "own"
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    loop = helper.make_function(
        domain, "F", ["x"], ["y"], [helper.make_node("F", ["x"], ["y"], domain=domain)], opsets)
    wide = [helper.make_function(
        domain, f"G{k}", ["x"], ["y"],
        [helper.make_node(f"G{k + 1}", ["x"], ["a"], domain=domain),
         helper.make_node(f"G{k + 1}", ["a"], ["y"], domain=domain)], opsets)
        for k in range(30)]  # fmt: skip
    last = helper.make_function(domain, "G30", ["x"], ["y"],
                                [helper.make_node("Neg", ["x"], ["y"])], opsets)  # fmt: skip
    for name, functions in (("F", [loop]), ("G0", [*wide, last])):
        made = models.model([helper.make_node(name, ["x"], ["y"], domain=domain)],
                            {"x": (F32, [4])}, ["y"])  # fmt: skip
        made.opset_import.append(opsets[1])
        made.functions.extend(functions)
        with pytest.raises(OnnxError, match="without end"):
            import_model(made)


def test_names_cannot_break_out_of_the_source() -> None:
    evil = '"\n    import os\n"""'
    made = models.model(
        [node("Add", ["x", evil], [evil + "y"]), node("Neg", [evil + "z"], ["z"])],
        {"x": (F32, [2]), evil + "z": (F32, [evil])}, [evil + "y", "z"],
        {evil: np.arange(2, dtype=np.float32)},
    )  # fmt: skip
    made.producer_name = evil
    found = import_model(made, name=evil)
    assert not any(line.strip() == "import os" for line in found.text.splitlines())
    pipe = sf.compile(found.text, weights={"w": found.arrays})
    ones = np.ones(2, np.float32)
    y, _ = pipe(**{found.inputs["x"]: ones, found.inputs[evil + "z"]: ones})
    np.testing.assert_array_equal(y, [1, 2])


@pytest.mark.parametrize("kind", ["INT4", "UINT2", "FLOAT4E2M1", "FLOAT8E4M3FNUZ"])
def test_packed_elements_take_as_many_bytes_as_they_need(kind: str) -> None:
    number = TensorProto.DataType.Value(kind)
    for size in (0, 1, 9):
        tensor = TensorProto(name="q", data_type=number, dims=[7], raw_data=bytes(size))
        made = models.model(
            [node("Cast", ["q"], ["w"], to=F32), node("Add", ["x", "w"], ["y"])],
            {"x": (F32, [7])}, ["y"], opset=25,
        )  # fmt: skip
        made.graph.initializer.append(tensor)
        with pytest.raises(OnnxError, match="bytes of data"):
            import_model(made)
    made.graph.initializer[0].dims[0] = 1 << 50
    with pytest.raises(OnnxError, match="impossible shape"):
        import_model(made)
