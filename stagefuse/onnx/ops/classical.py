"""Ops of the domain `ai.onnx.ml`: trees, linear models and what prepares their features.

Source: ONNX Operator Schemas, "ai.onnx.ml", and what the reference evaluator makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stagefuse.dsl.frozen import frozen
from stagefuse.onnx.beyond import STRINGS
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op

Array = np.ndarray[Any, Any]
BRANCHES = {
    "BRANCH_LEQ": "<=", "BRANCH_LT": "<", "BRANCH_GTE": ">=", "BRANCH_GT": ">", "BRANCH_EQ": "==",
    "BRANCH_NEQ": "!=",
}  # fmt: skip
LEAF = "LEAF"
MOST = 1 << 28
"""Weights of all nodes together."""
LEAST = 1e-30
"""What is divided by at least, where rows are normalized."""


def _floats(n: Node) -> str:
    """The first input, rows of floats."""
    if n.val(0).rank != 2:
        raise Refused(f"an input of {n.val(0).rank} dimensions", "rows of features")
    return n.x(0) if n.val(0).dtype.is_float else f"f32({n.x(0)})"


def _constant(n: Node, name: str, values: Any, dtype: Any = np.float32) -> str:
    return n.x_of(n.constant(f"{n.hint}.{name}", np.asarray(values, dtype)))


def _finished(n: Node, scores: str) -> str:
    transform = n.one_of("post_transform", "NONE", "NONE", "LOGISTIC", "SOFTMAX")
    return {"NONE": scores, "LOGISTIC": f"sigmoid({scores})", "SOFTMAX": f"nn.softmax({scores})"}[
        transform
    ]


@op("ai.onnx.ml::Scaler")
def _scaler(n: Node) -> str:
    offset = _constant(n, "offset", n.attr("offset", [0.0]))
    return f"(f32({n.x(0)}) - {offset}) * {_constant(n, 'scale', n.attr('scale', [1.0]))}"


@op("ai.onnx.ml::Normalizer")
def _normalizer(n: Node) -> str:
    x = n.let("x", f"f32({_floats(n)})").text
    sizes = {
        "MAX": f"max(abs({x}), axis=1, keepdims=True)",
        "L1": f"sum(abs({x}), axis=1, keepdims=True)",
        "L2": f"sqrt(sum({x} * {x}, axis=1, keepdims=True))",
    }
    return f"{x} / maximum({sizes[n.one_of('norm', 'MAX', *sizes)]}, {LEAST})"


@op("ai.onnx.ml::Imputer")
def _imputer(n: Node) -> str:
    x, dtype = n.x(0), n.val(0).dtype
    kind = "float" if dtype.is_float else "int64"
    values = n.attr(f"imputed_value_{kind}s") or []
    replaced = n.attr(f"replaced_value_{kind}", 0)
    if not values:
        raise Refused(f"no values for what is missing of {dtype}")
    missing = f"isnan({x})" if replaced != replaced else f"{x} == {replaced!r}"
    return f"select({missing}, {_constant(n, 'imputed', values, dtype.numpy)}, {x})"


@op("ai.onnx.ml::FeatureVectorizer")
def _feature_vectorizer(n: Node) -> str:
    parts = []
    for number, (value, width) in enumerate(zip(n.vals(), n.attr("inputdimensions"), strict=True)):
        text = f"f32({n.x(number)})" + ("[:, None]" if value.rank == 1 else "")
        own = 1 if value.rank == 1 else value.shape[1].as_int()
        if own is None:
            raise Refused("a number of features that varies")
        if width < 0:
            raise Refused(f"{width} features", attribute="inputdimensions")
        text = f"({text})[:, :{width}]" if own > width else text
        parts.append(f"pad({text}, [(0, 0), (0, {width - own})])" if own < width else text)
    return f"concat([{', '.join(parts)}], axis=1)"


@op("ai.onnx.ml::OneHotEncoder", unread=["zeros"])
def _one_hot(n: Node) -> str:
    """What is in no category gives zeros, also where the attribute `zeros` asks for an error."""
    if n.attr("cats_strings"):
        raise Refused(f"categories of strings, and {STRINGS}", attribute="cats_strings")
    categories = _constant(n, "categories", n.attr("cats_int64s"), np.int64)
    return f"f32(i64({n.x(0)})[..., None] == {categories})"


@op("ai.onnx.ml::LinearRegressor")
def _linear_regressor(n: Node) -> str:
    return _finished(n, _linear(n, n.attr("targets", 1)))


def _linear(n: Node, rows: int) -> str:
    weight = np.asarray(n.attr("coefficients"), np.float32).reshape(rows, -1)
    product = f"f32({_floats(n)}) @ {_constant(n, 'coefficients', weight.T)}"
    bias = n.attr("intercepts")
    return f"{product} + {_constant(n, 'intercepts', bias)}" if bias else product


@op("ai.onnx.ml::LinearClassifier", unread=["multi_class"])
def _linear_classifier(n: Node) -> Written:
    labels = _labels(n, "classlabels_ints")
    width = n.val(0).shape[-1].as_int()
    if width is None:
        raise Refused("a number of features that varies")
    rows = len(n.attr("coefficients")) // max(width, 1)
    scores = n.let("scores", _linear(n, rows)).text
    if rows != (len(labels) if rows > 1 else len(labels) - 1):
        raise Refused(f"scores of {rows} classes for {len(labels)}", attribute="coefficients")
    if rows == 1:
        scores = n.let("scores", f"concat([-{scores}, {scores}], axis=1)").text
    return _chosen(n, labels, _finished(n, scores))


def _labels(n: Node, name: str) -> list[int]:
    """The labels of classes, which must be integers. Raises Refused."""
    if n.attr("classlabels_strings"):
        raise Refused(f"classes named by strings, and {STRINGS}", attribute="classlabels_strings")
    return list(n.attr(name) or [])


def _chosen(n: Node, labels: Sequence[int], text: str) -> list[str | Val]:
    """The label of the greatest score of each row, and the scores."""
    scores = n.let("scores", text).text
    best = f"argmax({scores}, axis=1)"
    if list(labels) != list(range(len(labels))):
        best = f"{_constant(n, 'labels', labels, np.int64)}[{best}]"
    return [best, scores]


@frozen
class Forest:
    """The nodes of all trees, one after another; a leaf leads to itself. `places` are their
    numbers by tree and node."""

    roots: list[int]
    feature: list[int]
    limit: list[float]
    yes: list[int]
    no: list[int]
    missing: list[int]
    compare: str
    depth: int
    places: dict[tuple[int, int], int]


def _forest(n: Node) -> Forest:
    """The trees of a node. Raises Refused for what are none."""
    trees, ids, modes = n.attr("nodes_treeids"), n.attr("nodes_nodeids"), n.attr("nodes_modes")
    names = [m.decode() if isinstance(m, bytes) else m for m in modes]
    places = {pair: k for k, pair in enumerate(zip(trees, ids, strict=True))}
    kinds = sorted(set(names) - {LEAF})
    if len(kinds) > 1 or (kinds and kinds[0] not in BRANCHES):
        raise Refused(f"branches {', '.join(kinds)}", "one kind of branch", "nodes_modes")
    ways = [n.attr(f"nodes_{way}nodeids") for way in ("true", "false")]
    yes, no = (
        [k if name == LEAF else places[tree, to]
         for k, (name, tree, to) in enumerate(zip(names, trees, way, strict=True))]
        for way in ways
    )  # fmt: skip
    inner = [k for k, name in enumerate(names) if name != LEAF]
    below = [to for k in inner for to in (yes[k], no[k])]
    roots = sorted(set(range(len(names))) - set(below))
    depth, reached, level = 0, len(roots), roots
    while level := [to for k in level if names[k] != LEAF for to in (yes[k], no[k])]:
        depth, reached = depth + 1, reached + len(level)
        if reached > len(names):
            break
    if reached != len(names) or len(roots) != len(set(trees)):
        raise Refused("nodes that are no trees", "one root a tree, and one way to each node")
    return Forest(
        roots, list(n.attr("nodes_featureids")), list(n.attr("nodes_values")), yes, no,
        list(n.attr("nodes_missing_value_tracks_true") or []),
        BRANCHES[kinds[0]] if kinds else "<=", depth, places,
    )  # fmt: skip


def _sums(n: Node, kind: str, count: int, reduction: str) -> str:
    """The weights of the leaves that rows lead to, over all trees: [rows, count]."""
    forest, x = _forest(n), n.let("x", _floats(n)).text
    if not 1 <= count <= MOST // max(len(forest.feature), 1):
        raise Refused(f"{len(forest.feature)} nodes with {count} weights each")
    weights = np.zeros((len(forest.feature), count), np.float32)
    keys = zip(n.attr(f"{kind}_treeids"), n.attr(f"{kind}_nodeids"), strict=True)
    for key, column, weight in zip(keys, n.attr(f"{kind}_ids"), n.attr(f"{kind}_weights"),
                                   strict=True):  # fmt: skip
        if not 0 <= column < count:
            raise Refused(f"a weight of {column}, of {count}", attribute=f"{kind}_ids")
        weights[forest.places[key], column] += weight
    width = n.val(0).shape[1].as_int()
    if width is not None and not all(0 <= f < width for f in forest.feature):
        raise Refused(f"nodes that read beyond {width} features", attribute="nodes_featureids")
    tables = [
        _constant(n, name, getattr(forest, name), np.int32)
        for name in ("roots", "feature", "yes", "no")
    ]
    roots, feature, yes, no = tables
    limit = f"{n.body.tensor(x).dtype}({_constant(n, 'limit', forest.limit)})"
    more = f', compare="{forest.compare}"' if forest.compare != "<=" else ""
    if any(forest.missing):
        more += f", missing={_constant(n, 'missing', forest.missing, np.bool_)}"
    given = f"{x}, {roots}, {feature}, {limit}, {yes}, {no}, {forest.depth}{more}"
    leaves = n.let("leaves", f"onnx.leaves({given})").text
    return f"{reduction}({_constant(n, 'leaf', weights)}[{leaves}], axis=1)"


def _based(n: Node, scores: str) -> str:
    base = n.attr("base_values")
    return f"{scores} + {_constant(n, 'base', base)}" if base else scores


@op("ai.onnx.ml::TreeEnsembleRegressor", unread=["nodes_hitrates"])
def _tree_regressor(n: Node) -> str:
    targets, how = n.attr("n_targets", 1), n.one_of("aggregate_function", "SUM", "SUM", "AVERAGE")
    reduction = "sum" if how == "SUM" else "mean"
    return _finished(n, _based(n, _sums(n, "target", targets, reduction)))


@op("ai.onnx.ml::TreeEnsembleClassifier", unread=["nodes_hitrates"])
def _tree_classifier(n: Node) -> Written:
    """Of two classes there may be the weights of one alone."""
    labels, ids = _labels(n, "classlabels_int64s"), set(n.attr("class_ids"))
    if len(labels) != 2 or len(ids) > 1:
        return _chosen(n, labels, _finished(n, _based(n, _sums(n, "class", len(labels), "sum"))))
    column = max(ids, default=0)
    both = n.let("both", _sums(n, "class", 2, "sum")).text
    one = n.let("one", _based(n, f"{both}[:, {column}:{column + 1}]")).text
    other = f"1.0 - {one}" if n.attr("post_transform", "NONE") in ("NONE", b"NONE") else f"-{one}"
    return _chosen(n, labels, _finished(n, f"concat([{other}, {one}], axis=1)"))
