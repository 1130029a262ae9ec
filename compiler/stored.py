"""The tensors that a plan stores: weights and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .graph import Constant, Graph, Ref, Weight


def weight_arrays(graph: Graph, load: Callable[[str, str], Any]) -> Mapping[Ref, Any]:
    """The tensors of a graph's weights and constants, by the node that stands for them."""
    found: dict[Ref, Any] = {}
    for node in graph.nodes.values():
        if isinstance(node.primitive, Weight):
            found[Ref(node.id)] = load(node.primitive.weights, node.primitive.key)
        elif isinstance(node.primitive, Constant):
            shape = tuple(d.as_int() or 0 for d in node.type.shape)
            flat = np.frombuffer(node.primitive.data, node.type.dtype.numpy)
            found[Ref(node.id)] = flat.reshape(shape)
    return found
