"""Sizes that vary: their names and ranges, and what the model's own shapes say of them."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.dsl.format import formatted
from stagefuse.dsl.source import Source
from stagefuse.onnx import OnnxError, import_model

from . import models
from .models import F32, node


def test_a_table_that_is_cut_to_a_size_bounds_it() -> None:
    made = models.model(
        [node("Shape", ["x"], ["shape"], start=1, end=2),
         node("Slice", ["table", "zero", "shape"], ["rows"]), node("Add", ["x", "rows"], ["y"])],
        {"x": (F32, ["batch", "time"])}, ["y"],
        {"table": np.arange(16, dtype=np.float32), "zero": np.array([0])},
    )  # fmt: skip
    found = import_model(made)
    assert "where Batch >= 1, Time in 1..=16:" in found.text
    x = np.ones((2, 5), np.float32)
    y = sf.compile(found.text, weights={"w": found.arrays})(x=x)
    np.testing.assert_array_equal(y, x + np.arange(5, dtype=np.float32))


def halved_and_doubled() -> models.ModelProto:
    """The skeleton of a U-Net: what is pooled and enlarged again meets what it was."""
    return models.model(
        [node("MaxPool", ["x"], ["half"], kernel_shape=[2, 2], strides=[2, 2]),
         node("MaxPool", ["half"], ["quarter"], kernel_shape=[2, 2], strides=[2, 2]),
         node("Resize", ["quarter", "", "four"], ["whole"], mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
         node("Concat", ["x", "whole"], ["y"], axis=1)],
        {"x": (F32, [1, 2, "h", "w"])}, ["y"], {"four": np.array([1, 1, 4, 4], np.float32)},
    )  # fmt: skip


def test_sizes_that_are_halved_and_doubled_are_multiples() -> None:
    found = import_model(halved_and_doubled())
    assert "x: f32[1, 2, 4 * H, 4 * W]" in found.text
    x = np.random.default_rng(0).standard_normal((1, 2, 8, 12)).astype(np.float32)
    (want,) = models.reference(halved_and_doubled(), x=x)
    np.testing.assert_array_equal(sf.compile(found.text)(x=x), want)


def test_sources_have_the_one_layout() -> None:
    text = import_model(halved_and_doubled()).text
    assert formatted(Source("model.pipe", text)) == text


def test_sizes_can_be_given() -> None:
    found = import_model(halved_and_doubled(), sizes={"h": 8, "w": (8, 64, 8)})
    assert "x: f32[1, 2, 8, 8 * W]" in found.text and "where W in 1..=8:" in found.text
    with pytest.raises(OnnxError, match="'h'"):
        import_model(halved_and_doubled(), sizes={"h": (8, 4)})


def test_a_size_without_a_name_is_called_by_its_place() -> None:
    made = models.model([node("Neg", ["x"], ["y"])], {"x": (F32, [None, "?", 3])}, ["y"])
    assert "x: f32[X0, X1, 3]" in import_model(made).text
    assert "x: f32[5, X1, 3]" in import_model(made, sizes={"x.0": 5}).text


def test_an_input_may_be_called_like_an_index() -> None:
    made = models.model([node("Tile", ["i0", "twice"], ["y"])], {"i0": (F32, [3])}, ["y"],
                        {"twice": np.array([2])})  # fmt: skip
    found = import_model(made)
    y = sf.compile(found.text)(i0=np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(y, [0, 1, 2, 0, 1, 2])
