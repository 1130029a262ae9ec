"""Models of classical machine learning against the reference evaluator, on data drawn anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

import stagefuse as sf
from stagefuse.onnx import OnnxError, import_model

from .models import F32, I64

DOMAIN = "ai.onnx.ml"


def made(op: str, results: int, kind: int = F32, rank: int = 2, **attributes: Any) -> Any:
    names = ["y", "scores"][:results]
    node: NodeProto = helper.make_node(op, ["x"], names, domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node], "graph",
        [helper.make_tensor_value_info("x", kind, ["n", 5][:rank])],
        [helper.make_empty_tensor_value_info(name) for name in names],
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 3)]
    )


def compare(model: Any, x: np.ndarray[Any, Any], rtol: float = 1e-5) -> None:
    wanted = ReferenceEvaluator(model).run(None, {"x": x})
    found = import_model(model)
    got = sf.compile(found.text, weights={"w": found.arrays} if found.arrays else None)(x=x)
    for a, b in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def forest(rng: np.random.Generator, trees: int = 4, deep: int = 3) -> dict[str, Any]:
    """Attributes of random trees; their leaves as pairs of tree and node."""
    found: dict[str, Any] = {
        k: [] for k in ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids",
                        "falsenodeids", "missing_value_tracks_true")
    }  # fmt: skip
    leaves = []
    for tree in range(trees):
        pending, count = [(0, 0)], 1
        while pending:
            node, depth = pending.pop()
            is_leaf = depth == deep or (depth > 0 and rng.random() < 0.3)
            row = (tree, node, int(rng.integers(5)), float(np.float32(rng.normal())),
                   "LEAF" if is_leaf else "BRANCH_LEQ", 0 if is_leaf else count,
                   0 if is_leaf else count + 1, int(rng.integers(2)))  # fmt: skip
            for column, value in zip(found.values(), row, strict=True):
                column.append(value)
            if is_leaf:
                leaves.append((tree, node))
            else:
                pending += [(count, depth + 1), (count + 1, depth + 1)]
                count += 2
    return {"nodes": {f"nodes_{k}": v for k, v in found.items()}, "leaves": leaves}


def weights(kind: str, leaves: list[tuple[int, int]], ids: list[int], values: Any) -> Any:
    many = [leaf for leaf in leaves for _ in ids]
    return {
        f"{kind}_treeids": [t for t, _ in many], f"{kind}_nodeids": [k for _, k in many],
        f"{kind}_ids": ids * len(leaves), f"{kind}_weights": [float(v) for v in values(len(many))],
    }  # fmt: skip


@pytest.mark.parametrize("how", ["SUM", "AVERAGE"])
def test_trees_of_numbers(how: str, rng: np.random.Generator) -> None:
    trees = forest(rng)
    model = made(
        "TreeEnsembleRegressor", 1, n_targets=2, aggregate_function=how, base_values=[0.5, -1.0],
        **trees["nodes"], **weights("target", trees["leaves"], [0, 1], rng.standard_normal),
    )  # fmt: skip
    x = rng.standard_normal((9, 5), np.float32)
    x[0, :3] = np.nan
    compare(model, x)


@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("ids", [[0], [0, 1], [0, 1, 2]])
def test_trees_of_classes(ids: list[int], transform: str, rng: np.random.Generator) -> None:
    trees = forest(rng)
    labels = [7, 3] if len(ids) < 3 else [0, 1, 2]
    model = made(
        "TreeEnsembleClassifier", 2, classlabels_int64s=labels, post_transform=transform,
        **trees["nodes"], **weights("class", trees["leaves"], ids, rng.standard_normal),
    )  # fmt: skip
    compare(model, rng.standard_normal((9, 5), np.float32))


@pytest.mark.parametrize("change, words", [
    ({"nodes_modes": lambda v: ["BRANCH_GT", *v[1:]]}, "branches BRANCH_GT, BRANCH_LEQ"),
    ({"nodes_truenodeids": lambda v: [0, *v[1:]]}, "no trees"),
    ({"nodes_featureids": lambda v: [9, *v[1:]]}, "beyond 5 features"),
    ({"n_targets": lambda v: 1 << 40}, "nodes with 1099511627776 weights each"),
    ({"nodes_falsenodeids": lambda v: [77, *v[1:]]}, "failed with KeyError"),
])  # fmt: skip
def test_what_are_no_trees(change: Any, words: str, rng: np.random.Generator) -> None:
    trees = forest(rng, deep=4)
    ((name, changed),) = change.items()
    nodes = {"n_targets": 1, **trees["nodes"]}
    nodes[name] = changed(nodes[name])
    model = made("TreeEnsembleRegressor", 1, **nodes,
                 **weights("target", trees["leaves"], [0], rng.standard_normal))  # fmt: skip
    with pytest.raises(OnnxError, match=words):
        import_model(model)


LEAF: Any = {
    "nodes_treeids": [0], "nodes_nodeids": [0], "nodes_modes": ["LEAF"], "nodes_featureids": [0],
    "nodes_values": [0.0], "nodes_truenodeids": [0], "nodes_falsenodeids": [0],
}  # fmt: skip


@pytest.mark.parametrize("op, attributes, words", [
    ("TreeEnsembleRegressor", {**LEAF, **weights("target", [(0, 0)], [-1], np.ones)}, "of -1"),
    ("LinearClassifier", {"coefficients": [1.0] * 10, "classlabels_ints": [0, 1, 2]}, "2 classes"),
    ("LinearClassifier", {"coefficients": [1.0] * 5, "classlabels_ints": [0]}, "scores of 1"),
    ("FeatureVectorizer", {"inputdimensions": [-1]}, "-1 features"),
])  # fmt: skip
def test_numbers_that_do_not_fit(op: str, attributes: Any, words: str) -> None:
    with pytest.raises(OnnxError, match=words):
        import_model(made(op, 2 if op.endswith("Classifier") else 1, **attributes))


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_models(rows: int, rng: np.random.Generator) -> None:
    drawn = {"coefficients": rng.standard_normal(5 * rows), "intercepts": rng.standard_normal(rows)}
    x = rng.standard_normal((6, 5), np.float32)
    compare(made("LinearRegressor", 1, targets=rows, post_transform="NONE", **drawn), x)
    labels = [4, 2] if rows == 1 else [0, 1, 2]
    for transform in ("NONE", "LOGISTIC", "SOFTMAX"):
        compare(made("LinearClassifier", 2, classlabels_ints=labels, post_transform=transform,
                     **drawn), x)  # fmt: skip


def test_features_are_prepared(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 5), np.float32)
    drawn = {"offset": rng.standard_normal(5), "scale": rng.standard_normal(5)}
    compare(made("Scaler", 1, **drawn), x)
    for norm in ("MAX", "L1", "L2"):
        compare(made("Normalizer", 1, norm=norm), x)
    x[1, 2] = x[3, 0] = np.nan
    compare(made("Imputer", 1, imputed_value_floats=list(map(float, range(5))),
                 replaced_value_float=float("nan")), x)  # fmt: skip
    ids = rng.integers(0, 4, (6, 5))
    compare(made("Imputer", 1, I64, imputed_value_int64s=[9], replaced_value_int64=2), ids)
    compare(made("OneHotEncoder", 1, I64, cats_int64s=[3, 0, 2], zeros=1), ids)
    compare(made("FeatureVectorizer", 1, inputdimensions=[3]), x[:, ::-1].copy(), 0)
    with pytest.raises(OnnxError, match="strings"):
        import_model(made("OneHotEncoder", 1, I64, cats_strings=["a"]))
