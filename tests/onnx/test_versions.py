"""Versions of ops that the node tests, which are of the newest, do not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.onnx import import_model

from .models import F32, model, node

Array = np.ndarray[Any, Any]


def run(op: str, opset: int, arrays: list[Array], known: dict[str, Array], **kept: Any) -> Array:
    """The result of one node, some of whose inputs are stored."""
    inputs = {f"x{k}": (F32, list(a.shape)) for k, a in enumerate(arrays)}
    made = model([node(op, [*inputs, *known], ["y"], **kept)], inputs, ["y"], known, opset=opset)
    found = import_model(made)
    pipe = sf.compile(found.text, weights={"w": found.arrays} if found.arrays else None)
    return np.asarray(pipe(**dict(zip(inputs, arrays, strict=True))))


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.6, 1.5, 2.0])
def test_opset_10_resizes_up_by_the_place_below_and_down_by_that_above(
    rng: np.random.Generator, scale: float
) -> None:
    """As ONNX Runtime does, of places with a margin that f32 does not change."""
    x = rng.standard_normal((1, 1, 12)).astype(np.float32)
    at = np.arange(int(12 * scale)) / scale
    at = np.ceil(at - 1e-6) if scale < 1 else np.floor(at + 1e-6)
    scales = {"scales": np.array([1, 1, scale], np.float32)}
    found = run("Resize", 10, [x], scales, mode="nearest")
    np.testing.assert_array_equal(found, x[..., np.minimum(at, 11).astype(int)])


def test_half_pixels_of_tensorflow_are_not_moved_back(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 1, 10)).astype(np.float32)
    known = {"roi": np.zeros(0, np.float32), "scales": np.zeros(0, np.float32),
             "sizes": np.array([1, 1, 4])}  # fmt: skip
    found = run("Resize", 11, [x], known, mode="nearest", nearest_mode="floor",
                coordinate_transformation_mode="tf_half_pixel_for_nn")  # fmt: skip
    np.testing.assert_array_equal(found, x[..., [1, 3, 6, 8]])


def test_batch_norm_by_place(rng: np.random.Generator) -> None:
    x, scale, bias, mean, var = (rng.uniform(0.5, 2, s).astype(np.float32)
                                 for s in ((2, 3, 4, 5), *[(3, 4, 5)] * 4))  # fmt: skip
    found = run("BatchNormalization", 7, [x, scale, bias, mean, var], {}, spatial=0)
    wide = [a.astype(float) for a in (x, scale, bias, mean, var)]
    x64, scale64, bias64, mean64, var64 = wide
    exact = (x64 - mean64) / np.sqrt(var64 + 1e-5) * scale64 + bias64
    # a product of a factor with 5 roundings, twice, and two sums; no term is above 2 * 2 / sqrt(.5)
    assert np.max(np.abs(found - exact)) <= 12 * 2.0**-24 * 6


def test_a_value_to_pad_with_means_nothing_where_elements_are_copied() -> None:
    found = run("Pad", 10, [np.arange(3, dtype=np.float32)], {}, mode="reflect", pads=[1, 2],
                value=7.0)  # fmt: skip
    np.testing.assert_array_equal(found, [1, 0, 1, 2, 1, 0])


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
@pytest.mark.parametrize("pads", [(1, 0, 2, 3), (0, 4, 3, 0), (3, 5, 2, 4), (9, 1, 17, 0)])
def test_elements_around_are_copied(
    rng: np.random.Generator, mode: Any, pads: tuple[int, ...]
) -> None:
    x = rng.standard_normal((4, 6)).astype(np.float32)
    if mode == "wrap" and max(pads) > 9:
        pads = (4, 6, 4, 6)
    found = run("Pad", 19, [x], {"pads": np.array(pads)}, mode=mode)
    want = np.pad(x, ((pads[0], pads[2]), (pads[1], pads[3])), mode)
    np.testing.assert_array_equal(found, want)


def test_boxes_of_as_many_samples_as_a_bin_has_elements(rng: np.random.Generator) -> None:
    """What lies in a box of 4 by 6 elements, in bins of 2 by 3, with samples at elements."""
    x = rng.standard_normal((1, 2, 9, 8)).astype(np.float32)
    rois = np.array([[1, 2, 7, 6]], np.float32)
    found = run("RoiAlign", 16, [x, rois], {"of": np.array([0])}, sampling_ratio=0,
                output_height=2, output_width=2)  # fmt: skip
    part = x[:, :, 2:6, 1:7].astype(float)
    np.testing.assert_allclose(found, part.reshape(1, 2, 2, 2, 2, 3).mean((3, 5)), atol=1e-6)


def test_the_largest_of_boxes(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 9, 8)).astype(np.float32)
    rois = np.array([[1, 2, 2, 7, 5], [0, 20, 20, 30, 30]], np.float32)
    found = run("MaxRoiPool", 9, [x, rois], {}, pooled_shape=[2, 3])
    exact = x[1, :, 2:6, 2:8].reshape(3, 2, 2, 3, 2).max((2, 4))
    np.testing.assert_array_equal(found, [exact, np.zeros_like(exact)])


@pytest.mark.parametrize("op", ["ReduceLogSumExp", "ReduceMax", "ReduceL2"])
def test_axes_beside_what_is_meant_by_none(op: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5)).astype(np.float32)
    found = run(op, 18, [x], {"axes": np.array([1])}, keepdims=0, noop_with_empty_axes=1)
    meant = {"ReduceLogSumExp": lambda a: np.log(np.exp(a).sum(1)), "ReduceMax": lambda a: a.max(1),
             "ReduceL2": lambda a: np.sqrt((a * a).sum(1))}  # fmt: skip
    np.testing.assert_allclose(found, meant[op](x.astype(float)), rtol=1e-5, atol=1e-6)
