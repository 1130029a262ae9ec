"""Rows whose number depends on data: room for all, and a count of those that are meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

import stagefuse as sf
from benchmarks import onnx_score
from stagefuse.onnx import Backend, OnnxError, import_model

from . import models
from .models import F32, I64, node

MOST = np.array([3], np.int64)
LIMIT, LEAST = np.array([0.4], np.float32), np.array([0.3], np.float32)


def suppressed(
    boxes: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], most: float = MOST[0],
    least: float = LEAST[0],
) -> list[list[int]]:  # fmt: skip
    """What the standard says, box by box."""
    found = []
    for b in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            kept: list[int] = []
            for i in np.argsort(-scores[b, c], kind="stable"):
                if scores[b, c, i] <= least or len(kept) == most:
                    continue
                if all(_overlap(boxes[b, i], boxes[b, k]) <= LIMIT[0] for k in kept):
                    kept.append(int(i))
            found += [[b, c, i] for i in kept]
    return found


def _overlap(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    sides = np.minimum(p[2:], q[2:]) - np.maximum(p[:2], q[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    if shared == 0:  # also of boxes without any area
        return 0.0
    return shared / float(np.prod(p[2:] - p[:2]) + np.prod(q[2:] - q[:2]) - shared)


def detector(*more: Any, results: tuple[str, ...] = ("rows",)) -> ModelProto:
    nodes = [node("NonMaxSuppression", ["boxes", "scores", "most", "limit", "least"], ["rows"]),
             *more]  # fmt: skip
    weights = {"most": MOST, "limit": LIMIT, "least": LEAST, "one": np.array(1, np.int64),
               "two": np.array([2], np.int64), "end": np.array([4], np.int64),
               "start": np.array([0], np.int64)}  # fmt: skip
    inputs: dict[str, Any] = {"boxes": (F32, ["B", "N", 4]), "scores": (F32, ["B", "C", "N"])}
    return models.model(nodes, inputs, list(results), weights)


def _drawn(rng: np.random.Generator, b: int, c: int, n: int) -> dict[str, np.ndarray[Any, Any]]:
    corners = rng.uniform(0, 2, (b, n, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(2), corners.max(2) + 0.1], -1)
    return {"boxes": boxes, "scores": rng.uniform(0, 1, (b, c, n)).astype(np.float32)}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 11), (1, 2, 29)])
def test_the_first_rows_are_those_of_the_standard(
    sizes: tuple[int, int, int], rng: np.random.Generator
) -> None:
    given = _drawn(rng, *sizes)
    found = import_model(detector())
    assert found.counts == {"rows": (0, 1)}
    assert "as many elements along axis 0 as there can be" in found.text
    rows, count = sf.compile(found.text)(**given)
    want = suppressed(**given)
    assert rows.shape == (sizes[0] * sizes[1] * min(3, sizes[2]), 3)
    assert rows[: int(count)].tolist() == want and not rows[int(count) :].any()


def test_boxes_without_a_limit_and_by_their_centres(rng: np.random.Generator) -> None:
    """Of equal scores the first box comes first; of no boxes there are none."""
    both = sf.compile(
        """import onnx

pipeline p(boxes: f32[B, N, 4], centred: f32[B, N, 4], scores: f32[B, C, N])
where B >= 1, C >= 1:
    a = onnx.non_max_suppression(boxes[..., ::-1], scores, 0.4)
    b = onnx.non_max_suppression(centred, scores, 0.4, most=31, least=0.25, centred=True)
    a[0], a[1], b[0], b[1]
"""
    )
    for sizes in ((2, 2, 0), (1, 3, 7), (2, 1, 97)):
        given = _drawn(rng, *sizes)
        given["boxes"] = np.round(given["boxes"] * 8)  # no overlap is near the limit
        given["scores"] = np.round(given["scores"], 1).astype(np.float32)
        low, high = np.split(given["boxes"], 2, axis=-1)
        rows, count, few, kept = both(
            **given, centred=np.concatenate([(low + high) / 2, high - low], -1)
        )
        assert rows[: int(count)].tolist() == suppressed(**given, most=np.inf, least=-np.inf)
        assert few[: int(kept)].tolist() == suppressed(**given, most=31, least=0.25)


def test_what_takes_each_row_for_itself_follows(rng: np.random.Generator) -> None:
    """Gather of boxes at the rows' last column, halved, of which at most four are kept."""
    more = [
        node("Gather", ["rows", "two"], ["column"], axis=1),
        node("Squeeze", ["column", "one_"], ["at"]),
        node("Reshape", ["boxes", "flat"], ["all"]), node("Gather", ["all", "at"], ["picked"]),
        node("Add", ["picked", "picked"], ["doubled"]),
        node("Slice", ["doubled", "start", "end"], ["best"]),
    ]  # fmt: skip
    made = detector(*more, results=("best", "rows"))
    for name, value in (("one_", [1]), ("flat", [-1, 4])):
        made.graph.initializer.append(helper.make_tensor(name, I64, [len(value)], value))
    given = _drawn(rng, 1, 2, 13)
    for info in made.graph.output:
        kind = TensorProto.FLOAT if info.name == "best" else I64
        info.CopyFrom(helper.make_tensor_value_info(info.name, kind, [None, None]))
    best, rows = Backend.prepare(made, "CPU").run(given)
    want = suppressed(**given)
    assert rows.tolist() == want
    np.testing.assert_array_equal(best, 2 * given["boxes"][0, [r[2] for r in want][:4]])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([node("Shape", ["rows"], ["y"])], "as a size"),
        ([node("ReduceMax", ["rows"], ["y"], axes=[0])], "number of rows that depends on data"),
        ([node("Concat", ["rows", "rows"], ["y"], axis=0)], "number of rows that depends on data"),
        ([node("Gather", ["rows", "one"], ["y"], axis=0)], "number of rows that depends on data"),
        ([node("Add", ["rows", "wide"], ["y"])], "number of rows that depends on data"),
    ],
)
def test_what_mixes_rows_is_refused(more: list[Any], words: str) -> None:
    made = detector(*more, results=("y",))
    made.graph.initializer.append(helper.make_tensor("wide", I64, [6, 3], range(18)))
    with pytest.raises(OnnxError, match=words) as error:
        import_model(made, sizes={"B": 1, "C": 2, "N": 9})
    assert "cut the model before this node" in str(error.value)


def test_a_branch_that_reads_them_is_refused() -> None:
    branch = helper.make_graph([node("Identity", ["rows"], ["z"])], "b", [],
                               [helper.make_empty_tensor_value_info("z")])  # fmt: skip
    choose = node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    made = detector(choose, results=("y",))
    made.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    with pytest.raises(OnnxError, match="number of rows that depends on data"):
        import_model(made)


def test_positions_of_what_is_not_zero(rng: np.random.Generator) -> None:
    made = models.model([node("NonZero", ["x"], ["y"])], {"x": (F32, ["N", 3, "M"])}, ["y"])
    pipe = sf.compile(import_model(made).text)
    for n, m in ((1, 1), (4, 5), (7, 2)):
        x = rng.integers(0, 2, (n, 3, m)).astype(np.float32)
        y, count = pipe(x=x)
        np.testing.assert_array_equal(y[:, : int(count)], np.nonzero(x))


@pytest.mark.parametrize(("size", "in_order"), [(1, 1), (97, 1), (64, 0)])
def test_each_element_once(size: int, in_order: int, rng: np.random.Generator) -> None:
    outputs = ["y", "first", "which", "often"]
    made = models.model([node("Unique", ["x"], outputs, sorted=in_order)],
                        {"x": (I64, ["N"])}, outputs)  # fmt: skip
    x = rng.integers(-size // 3, 6, size)
    y, first, which, often, count = sf.compile(import_model(made).text)(x=x)
    places = np.unique(x, return_index=True)[1]
    places = places if in_order else np.sort(places)
    meant = int(count)
    np.testing.assert_array_equal(y[:meant], x[places])
    np.testing.assert_array_equal(first[:meant], places)
    np.testing.assert_array_equal(y[which], x)
    np.testing.assert_array_equal(often[:meant], (x[:, None] == x[places]).sum(0))


def test_the_standards_tests_pass() -> None:
    """Those of the ops that count, with all inputs given at the call."""
    ops = ("NonMaxSuppression", "NonZero", "Compress", "Unique")
    chosen = [c for c in onnx_score.cases("") if onnx_score.op_of(c) in ops]
    found = [onnx_score.outcome(c, "CPU", False) for c in chosen]
    assert len(found) == 23 and [o for o in found if o.status != "passed"] == []
