"""Sizes that vary: their names and ranges, and what the model's own shapes say of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.dsl.dims import floordiv, minimum, sym
from stagefuse.dsl.format import formatted
from stagefuse.dsl.source import Source
from stagefuse.onnx import OnnxError, import_model
from stagefuse.onnx.suspects import equal_at, quotients

from . import models
from .models import F32, I64, node


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


def test_a_table_that_is_cut_to_a_part_of_a_size_bounds_it() -> None:
    made = models.model(
        [node("MaxPool", ["x"], ["h"], kernel_shape=[8], strides=[8]),
         node("Shape", ["h"], ["shape"], start=2, end=3),
         node("Slice", ["table", "zero", "shape"], ["rows"]), node("Add", ["h", "rows"], ["y"])],
        {"x": (F32, [1, 1, "time"])}, ["y"],
        {"table": np.arange(5, dtype=np.float32), "zero": np.array([0])},
    )  # fmt: skip
    assert "where Time in 1..=47:" in import_model(made).text


def test_a_size_that_an_exporter_wrote_into_a_shape_is_that() -> None:
    made = models.model(
        [node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
         node("Shape", ["x"], ["batch"], start=0, end=1), node("Mul", ["batch", "two"], ["rows"]),
         node("Concat", ["nine", "rows", "four"], ["shape"], axis=0),
         node("Reshape", ["t", "shape"], ["y"])],
        {"x": (F32, ["batch", "time", 8])}, ["y"],
        {"two": np.array([2]), "nine": np.array([9]), "four": np.array([4])},
    )  # fmt: skip
    found = import_model(made)
    assert "x: f32[Batch, 9, 8]" in found.text
    x = np.arange(144, dtype=np.float32).reshape(2, 9, 8)
    y = sf.compile(found.text)(x=x)
    np.testing.assert_array_equal(y, x.transpose(1, 0, 2).reshape(9, 4, 4))


def test_what_several_sizes_make_in_a_shape_asks_for_them() -> None:
    """An exporter wrote height times width of its example."""
    made = models.model(
        [node("Reshape", ["x", "shape"], ["y"])], {"x": (F32, ["batch", "h", "w"])}, ["y"],
        {"shape": np.array([30, 2])},
    )  # fmt: skip
    with pytest.raises(OnnxError) as caught:
        import_model(made)
    assert caught.value.problems[0].need == (
        "the sizes that it was exported for, as `sizes=`: of `batch`, `h`, `w`")
    assert "-> f32[30, 2]" in import_model(made, sizes={"batch": 2, "h": 5, "w": 6}).text


def test_what_is_chosen_of_a_size_is_there() -> None:
    made = models.model(
        [node("MaxPool", ["x"], ["h"], kernel_shape=[2], strides=[2]),
         node("TopK", ["h", "three"], ["y", "at"])],
        {"x": (F32, ["batch", 1, "time"])}, ["y", "at"], {"three": np.array([3])},
    )  # fmt: skip
    assert "where Batch >= 1, Time >= 6:" in import_model(made).text


def test_a_size_from_which_on_shapes_fit_has_no_end() -> None:
    """As many as there are, at most 2, by a shape that says 2."""
    made = models.model(
        [node("Slice", ["x", "zero", "two", "one"], ["h"]),
         node("TopK", ["h", "four"], ["top", "at"]), node("Reshape", ["top", "shape"], ["y"])],
        {"x": (F32, ["batch", "n", "m"])}, ["y"],
        {"zero": np.array([0]), "two": np.array([2]), "one": np.array([1]),
         "four": np.array([4]), "shape": np.array([0, 8])},
    )  # fmt: skip
    assert equal_at(minimum(sym("N"), 2) * sym("B"), 2 * sym("B")) == ("N", (2, None))
    assert equal_at(minimum(sym("N"), 2), minimum(sym("N"), 5)) == ("N", (1, 2))
    found = import_model(made).text
    assert "-> f32[Batch, 8]" in found and "N >= 2, M >= 4" in found


def test_a_mask_is_as_long_as_what_it_masks() -> None:
    """The sizes of inputs that meet are the same, whatever the model calls them."""
    made = models.model(
        [node("Concat", ["past", "x"], ["all"], axis=1), node("Mul", ["all", "mask"], ["y"]),
         node("Add", ["x", "more"], ["z"])],
        {"past": (F32, ["batch", "past"]), "x": (F32, ["batch", "time"]),
         "mask": (F32, ["batch", "total"]), "more": (F32, ["other", "time2"])}, ["y", "z"],
    )  # fmt: skip
    found = import_model(made)
    assert "mask: f32[Batch, Past + Time]" in found.text and "more: f32[Batch, Time]" in found.text
    x = np.ones((2, 3), np.float32)
    y, z = sf.compile(found.text)(past=x, x=x, mask=np.ones((2, 6), np.float32), more=x)
    assert y.shape == (2, 6) and np.array_equal(z, x + x)


def test_positions_of_what_is_past_and_what_is_new_share_a_table() -> None:
    made = models.model(
        [node("Concat", ["past", "x"], ["all"], axis=1),
         node("Shape", ["all"], ["shape"], start=1, end=2),
         node("Slice", ["table", "zero", "shape"], ["rows"]), node("Add", ["all", "rows"], ["y"])],
        {"past": (F32, ["batch", "past"]), "x": (F32, ["batch", "time"])}, ["y"],
        {"table": np.arange(64, dtype=np.float32), "zero": np.array([0])},
    )  # fmt: skip
    assert "where Batch >= 1, Past in 1..=32, Time in 1..=32:" in import_model(made).text
    found = import_model(made, sizes={"time": 1})
    assert "where Batch >= 1, Past in 1..=63:" in found.text


def test_ranges_of_floats_and_shapes_of_nothing() -> None:
    """`arange(W, dtype=float)`, and -1 beside sizes that may be 0."""
    made = models.model(
        [node("Shape", ["x"], ["w"], start=1, end=2), node("Squeeze", ["w"], ["n"]),
         node("Cast", ["n"], ["limit"], to=F32), node("Range", ["zero", "limit", "one"], ["at"]),
         node("Squeeze", ["x", "two"], ["flat"]), node("Add", ["flat", "at"], ["sum"]),
         node("Concat", ["keep", "w", "rest"], ["shape"], axis=0),
         node("Reshape", ["sum", "shape"], ["y"])],
        {"x": (F32, ["b", "w", 1])}, ["y"],
        {"zero": np.array(0, np.float32), "one": np.array(1, np.float32), "keep": np.array([0]),
         "rest": np.array([-1]), "two": np.array([2])},
    )  # fmt: skip
    found = import_model(made)
    y = sf.compile(found.text)(x=np.ones((2, 3, 1), np.float32))
    np.testing.assert_array_equal(y, np.tile([[[1.0], [2.0], [3.0]]], (2, 1, 1)))


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
@pytest.mark.parametrize("step", [-1, -2, 3])
def test_ranges_between_sizes_rise_and_fall(dtype: type, step: int) -> None:
    """From T - 1 down to -T, as relative positions are made, or up to T."""
    element = I64 if dtype is np.int64 else F32
    ends = ("last", "less") if step < 0 else ("less", "t")
    made = models.model(
        [node("Shape", ["x"], ["size"], start=0, end=1), node("Squeeze", ["size"], ["t"]),
         node("Sub", ["t", "one"], ["last"]), node("Neg", ["t"], ["less"]),
         *(node("Cast", [end], [f"{end}_cast"], to=element) for end in ends),
         node("Range", [*(f"{end}_cast" for end in ends), "step"], ["y"])],
        {"x": (F32, ["time"])}, ["y"], {"one": np.array(1), "step": np.array(step, dtype)},
    )  # fmt: skip
    pipe = sf.compile(import_model(made).text)
    for t in (1, 2, 7):
        wanted = np.arange(t - 1 if step < 0 else -t, -t if step < 0 else t, step, dtype)
        found = pipe(x=np.zeros(t, np.float32))
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == dtype


def test_windows_that_would_be_empty_are_not_meant() -> None:
    made = models.model(
        [node("MaxPool", ["x"], ["a"], kernel_shape=[5]), node("Shape", ["a"], ["s"]),
         node("ConstantOfShape", ["s"], ["zeros"]),
         node("Pad", ["zeros", "four"], ["b"]), node("Add", ["x", "b"], ["y"])],
        {"x": (F32, [1, 1, "t"])}, ["y"], {"four": np.array([0, 0, 4, 0, 0, 0])},
    )  # fmt: skip
    assert "where T >= 5:" in import_model(made).text


RESIZINGS = [
    ("nearest", "asymmetric", "floor"), ("nearest", "asymmetric", "ceil"),
    ("nearest", "half_pixel", "round_prefer_floor"), ("nearest", "half_pixel", "round_prefer_ceil"),
    ("nearest", "align_corners", "round_prefer_floor"), ("linear", "half_pixel", ""),
    ("linear", "pytorch_half_pixel", ""), ("linear", "align_corners", ""),
    ("linear", "asymmetric", ""), ("cubic", "half_pixel", ""), ("cubic", "align_corners", ""),
]  # fmt: skip


@pytest.mark.parametrize("mode, transform, nearest", RESIZINGS)
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resizing_of_sizes_that_vary(
    mode: str, transform: str, nearest: str, by: str, rng: np.random.Generator
) -> None:
    """To the size of another tensor, or by a fraction, as by constants."""
    rounding = {"nearest_mode": nearest} if nearest else {}
    names = ["x", "", "scales"] if by == "scales" else ["x", "", "", "sizes"]
    nodes = [node("Resize", names, ["y"], mode=mode, **rounding,
                  coordinate_transformation_mode=transform)]  # fmt: skip
    inputs = {"x": (F32, [1, 2, "h", "w"])}
    given = {"scales": np.array([1, 1, 1.5, 0.75], np.float32)}
    if by == "sizes":
        nodes.insert(0, node("Shape", ["like"], ["sizes"]))
        inputs["like"] = (F32, [1, 2, "m", "n"])
        given = {}
    made = models.model(nodes, inputs, ["y"], given)
    found = import_model(made)
    pipe = sf.compile(found.text)
    for h, w, m, n in ((4, 8, 6, 6), (6, 12, 1, 17), (10, 4, 5, 4), (2, 16, 7, 31)):
        feeds = {"x": rng.standard_normal((1, 2, h, w)).astype(np.float32)}
        if by == "sizes":
            feeds["like"] = np.zeros((1, 2, m, n), np.float32)
        (want,) = models.reference(made, **feeds)
        y = pipe(**feeds)
        assert y.shape == want.shape
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(feeds["x"]).max())


def windows_of(x: Any, size: tuple[int, int], strides: tuple[int, int], lower: bool) -> Any:
    """What windows see of x [c, h, w], NaN beyond it: [c, ceil(h / stride), .., .., ..]."""
    pads = [(0, 0)]
    for n, k, s in zip(x.shape[1:], size, strides, strict=True):
        more = max((-(-n // s) - 1) * s + k - n, 0)
        pads.append((more - more // 2, more // 2) if lower else (more // 2, more - more // 2))
    around = np.pad(x.astype(np.float64), pads, constant_values=np.nan)
    seen = np.lib.stride_tricks.sliding_window_view(around, size, (1, 2))
    return seen[:, :: strides[0], :: strides[1]]


@pytest.mark.parametrize("where", ["SAME_UPPER", "SAME_LOWER"])
def test_zeros_around_windows_with_a_stride_where_sizes_vary(
    where: str, rng: np.random.Generator
) -> None:
    """Each size is divided, rounded up, and branches of one length meet again."""
    w = {"deep": models.drawn(rng, 2, 2, 3, 4), "flat": models.drawn(rng, 2, 2, 1, 1),
         "wide": models.drawn(rng, 1, 2, 5, 5)}  # fmt: skip
    made = models.model(
        [node("Conv", ["x", "deep"], ["a"], strides=[2, 2], auto_pad=where),
         node("Conv", ["x", "flat"], ["b"], strides=[2, 2], auto_pad=where),
         node("Add", ["a", "b"], ["c"]),
         node("MaxPool", ["c"], ["d"], kernel_shape=[3, 2], strides=[2, 2], auto_pad=where),
         node("Conv", ["d", "wide"], ["y"], strides=[3, 2], auto_pad=where)],
        {"x": (F32, [1, 2, "height", "width"])}, ["y"], w,
    )  # fmt: skip
    found = import_model(made)
    pipe = sf.compile(found.text, weights={"w": found.arrays})

    def convolved(x: Any, name: str, strides: tuple[int, int]) -> Any:
        seen = windows_of(x, w[name].shape[2:], strides, where == "SAME_LOWER")
        return np.einsum("cijmn,ocmn->oij", np.nan_to_num(seen), w[name])

    for height, width in ((1, 1), (6, 9), (17, 32), (24, 23)):
        x = rng.standard_normal((2, height, width)).astype(np.float32)
        c = convolved(x, "deep", (2, 2)) + convolved(x, "flat", (2, 2))
        d = np.nanmax(windows_of(c, (3, 2), (2, 2), where == "SAME_LOWER"), (3, 4))
        np.testing.assert_allclose(pipe(x=x[None])[0], convolved(d, "wide", (3, 2)), atol=3e-5)


@pytest.mark.parametrize(
    "mode, attributes",
    [("linear", {"antialias": 1}), ("cubic", {"antialias": 1, "exclude_outside": 1}),
     ("cubic", {"exclude_outside": 1})],
)  # fmt: skip
def test_smooth_resizing_of_sizes_that_vary(
    mode: str, attributes: dict[str, int], rng: np.random.Generator
) -> None:
    scales = {"scales": np.array([1, 0.375, 2.5], np.float32)}
    made = models.model([node("Resize", ["x", "", "scales"], ["y"], mode=mode, **attributes)],
                        {"x": (F32, [2, "h", "w"])}, ["y"], scales, opset=19)  # fmt: skip
    pipe = sf.compile(import_model(made).text)
    for h, w in ((16, 4), (24, 2), (8, 1)):
        x = rng.standard_normal((2, h, w)).astype(np.float32)
        (want,) = models.reference(made, x=x)
        np.testing.assert_allclose(pipe(x=x), want, rtol=0, atol=1e-5 * np.abs(x).max())


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


@pytest.mark.parametrize(
    ("size", "shape", "source"),
    [
        (["b", "t", 4], [0, -1, 3, 4], "x: f32[B, 3 * T, 4]"),
        (["b", 1, "t"], [0, 0, -1, 2], "x: f32[B, 1, 2 * T]"),
        (["b", "t", 4], ["b", "t // 3", 3, 4], "x: f32[B, 3 * T, 4]"),
        (["b", "t", 4], ["b", "t // 2", 2, 2, -1], "x: f32[B, 2 * T, 4]"),
    ],
)
def test_sizes_that_are_taken_apart_are_multiples(
    size: list[Any], shape: list[Any], source: str, rng: np.random.Generator
) -> None:
    """As pixel_unshuffle and windows do, whatever the number."""
    nodes, parts, weights = [], [], {"by": np.array([0])}
    for at, want in enumerate(shape):
        parts.append(f"part{at}")
        if want == "b":
            nodes.append(node("Shape", ["x"], [parts[-1]], start=0, end=1))
        elif isinstance(want, str):
            weights["by"] = np.array([int(want[-1])])
            nodes += [node("Shape", ["x"], ["whole"], start=1, end=2),
                      node("Div", ["whole", "by"], [parts[-1]])]  # fmt: skip
        else:
            weights[parts[-1]] = np.array([want])
    nodes += [node("Concat", parts, ["shape"], axis=0), node("Reshape", ["x", "shape"], ["y"])]
    found = import_model(models.model(nodes, {"x": (F32, size)}, ["y"], weights))
    assert source in found.text
    x = rng.standard_normal([{"b": 5, "t": 12}.get(n, n) for n in size], np.float32)
    want = {0: None, "b": 5, "t // 2": 6, "t // 3": 4}
    wanted = [n if (n := want.get(d, d)) is not None else x.shape[k] for k, d in enumerate(shape)]
    np.testing.assert_array_equal(sf.compile(found.text)(x=x), x.reshape(wanted))


def test_multiples_are_the_least_ones() -> None:
    """Halved, doubled and cut by 4: by 2 in all, beside the halves."""
    half = floordiv(sym("h"), 2)
    assert quotients(floordiv(half * 6, 4)) == {"h": 2}
    assert quotients(floordiv(sym("h") * 6 + 1, 4)) == {"h": 2}
    assert quotients(floordiv(sym("h") * 4, sym("w") * 4)) == {"h": 2, "w": 2}


def test_a_multiple_of_several_sizes_asks_for_them() -> None:
    made = models.model([node("Reshape", ["x", "shape"], ["y"])], {"x": (F32, ["b", "t", 4])},
                        ["y"], {"shape": np.array([-1, 6])})  # fmt: skip
    with pytest.raises(OnnxError) as caught:
        import_model(made)
    assert caught.value.problems[0].need == "multiples for `sizes=`: of one of `b`, `t`"
    assert "-> f32[4 * B * T, 6]" in import_model(made, sizes={"t": (6, 600, 6)}).text


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_a_size_may_be_shorter_at_its_end(count: int, rng: np.random.Generator) -> None:
    names = [f"y{k}" for k in range(count)]
    made = models.model([node("Split", ["x"], names, num_outputs=count)], {"x": (F32, ["n", 2])},
                        names, opset=18)  # fmt: skip
    found = import_model(made)
    pipe = sf.compile(found.text)
    for n in (count, count + 2, 11, 12):
        x = rng.standard_normal((n, 2), np.float32)
        each = -(-n // count)
        for k, part in enumerate(pipe(x=x)):
            np.testing.assert_array_equal(part, x[k * each : (k + 1) * each])


def test_negative_sizes_divide_towards_zero() -> None:
    """x is N long and filled by 2 * (N // 3) zeros: -N / 3 is -(N // 3)."""
    made = models.model(
        [node("Shape", ["x"], ["n"]), node("Neg", ["n"], ["less"]),
         node("Div", ["less", "three"], ["third"]), node("Mul", ["third", "two"], ["fill"]),
         node("Concat", ["none", "fill"], ["pads"], axis=0), node("Pad", ["x", "pads"], ["y"])],
        {"x": (F32, ["n"])}, ["y"],
        {"three": np.array([3]), "two": np.array([-2]), "none": np.array([0])},
    )  # fmt: skip
    pipe = sf.compile(import_model(made).text)
    for n in (1, 2, 3, 7):
        x = np.ones(n, np.float32)
        np.testing.assert_array_equal(pipe(x=x), models.reference(made, x=x)[0])


def test_what_export_writes_of_negative_sizes_is_read(tmp_path: Path) -> None:
    text = "pipeline p(x: f32[B, N]):\n    pad(x, [(0, 0), (0, -N % 4)], value=-1.5)\n"
    (tmp_path / "p.pipe").write_text(text)
    path = sf.import_onnx(sf.export_onnx(tmp_path / "p.pipe", tmp_path / "p.onnx"), tmp_path / "q")
    for n in (1, 4, 6):
        x = np.ones((2, n), np.float32)
        want = np.pad(x, [(0, 0), (0, -n % 4)], constant_values=-1.5)
        np.testing.assert_array_equal(sf.compile(path)(x=x), want)


def test_an_axis_that_is_taken_away_has_one_element() -> None:
    made = models.model([node("Squeeze", ["x", "one"], ["y"])], {"x": (F32, ["b", "t"])}, ["y"],
                        {"one": np.array([1])})  # fmt: skip
    assert "x: f32[B, 1]) -> f32[B]" in import_model(made).text


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


def test_a_size_is_filled_up_to_a_multiple(rng: np.random.Generator) -> None:
    """As images are for windows: the rest of their negated height by that of a window."""
    made = models.model(
        [node("Shape", ["x"], ["n"], start=0, end=1), node("Neg", ["n"], ["less"]),
         node("Mod", ["less", "four"], ["more"]),
         node("Concat", ["zero", "more"], ["pads"], axis=0),
         node("Pad", ["x", "pads"], ["y"]), node("Add", ["n", "more"], ["whole"]),
         node("Div", ["whole", "four"], ["windows"]),
         node("Concat", ["windows", "four"], ["shape"], axis=0),
         node("Reshape", ["y", "shape"], ["z"])],
        {"x": (F32, ["n"])}, ["z"], {"zero": np.array([0]), "four": np.array([4])}, opset=18,
    )  # fmt: skip
    found = import_model(made)
    pipe = sf.compile(found.text)
    for count in (1, 4, 7):
        x = rng.standard_normal(count).astype(np.float32)
        wanted = np.pad(x, (0, -count % 4)).reshape(-1, 4)
        np.testing.assert_array_equal(pipe(x=x), wanted)


def test_sizes_are_clipped_and_put_into_a_shape_by_one_hot(rng: np.random.Generator) -> None:
    """PyTorch's `repeat_interleave` repeats by a OneHot of sizes."""
    made = models.model(
        [node("Shape", ["x"], ["rows"], start=0, end=1), node("Clip", ["rows", "", "most"], ["n"]),
         node("Concat", ["one", "n"], ["values"], axis=0),
         node("OneHot", ["one", "three", "values"], ["hot"]),
         node("Reshape", ["hot", "three"], ["repeats"]), node("Tile", ["z", "repeats"], ["y"]),
         node("Size", ["x"], ["size"]), node("Add", ["y", "size"], ["total"])],
        {"x": (F32, [2, "m"]), "z": (I64, ["a", 1, 5])}, ["total"],
        {"one": np.array([1]), "three": np.array([3]), "most": np.array(9)}, opset=18,
    )  # fmt: skip
    found = import_model(made)
    z = rng.integers(0, 9, (3, 1, 5))
    y = sf.compile(found.text)(x=np.zeros((2, 4), np.float32), z=z)
    np.testing.assert_array_equal(y, np.tile(z, (1, 2, 1)) + 8)


def test_a_part_that_is_cut_out_of_a_size_is_its_least(rng: np.random.Generator) -> None:
    """`x[1:3] = 2 * x[1:3]`: three rows or more, since with fewer the part would be smaller."""
    made = models.model(
        [node("Slice", ["x", "one", "three"], ["part"]), node("Mul", ["part", "two"], ["twice"]),
         node("ScatterND", ["x", "places", "twice"], ["y"])],
        {"x": (F32, ["n", 4])}, ["y"],
        {"one": np.array([1]), "three": np.array([3]), "places": np.array([[1], [2]]),
         "two": np.array(2, np.float32)},
    )  # fmt: skip
    found = import_model(made)
    assert "where N >= 3:" in found.text
    x = rng.standard_normal((5, 4)).astype(np.float32)
    wanted = x * np.array([1, 2, 2, 1, 1], np.float32)[:, None]
    pipe = sf.compile(found.text, weights={"w": found.arrays} if found.arrays else None)
    np.testing.assert_array_equal(pipe(x=x), wanted)


@pytest.mark.parametrize("range", [(3, None), (3,), (5, 4), (1, 8, 0), "many"])
def test_a_range_is_whole_numbers_in_order(range: object) -> None:
    made = models.model([node("Relu", ["x"], ["y"])], {"x": (F32, ["n"])}, ["y"])
    with pytest.raises(OnnxError, match="gives 'n' the range"):
        import_model(made, sizes={"n": range})  # type: ignore[dict-item]


FAR = (-(2**63), -100, -6, -1, 0, 2, 5, 2**63 - 1)


@pytest.mark.parametrize("step", [1, 2, -1, -2])
@pytest.mark.parametrize("size", [5, "n"])
def test_slices_begin_and_end_anywhere(
    size: int | str, step: int, rng: np.random.Generator
) -> None:
    """Ends are clamped as the standard says, also where they do not fit a size."""
    pairs = list(itertools.product(FAR, FAR))
    nodes = [node("Slice", ["x", f"s{k}", f"e{k}", "axes", "step"], [f"y{k}"])
             for k in range(len(pairs))]  # fmt: skip
    arrays = {f"{name}{k}": np.array([v]) for k, p in enumerate(pairs)
              for name, v in zip("se", p, strict=True)}  # fmt: skip
    made = models.model(
        nodes, {"x": (F32, [size])}, [n.output[0] for n in nodes],
        {**arrays, "axes": np.array([0]), "step": np.array([step])},
    )  # fmt: skip
    x = rng.standard_normal(5).astype(np.float32)
    found = sf.compile(import_model(made).text)(x=x)
    for (start, end), part in zip(pairs, found, strict=True):
        first, last = (v + 5 if v < 0 else v for v in (start, end))
        first = min(max(first, 0), 5 if step > 0 else 4)
        last = min(max(last, 0 if step > 0 else -1), 5 if step > 0 else 4)
        np.testing.assert_array_equal(part, x[list(range(first, last, step))], f"{start}:{end}")
