"""Transforms the weights of convolutions that are computed by minimal filtering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import numpy as np

from stagefuse.compiler.graph import Constant, Contract, Graph, Node, Ref, Weight
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.filtering import LARGEST, filtering_of
from stagefuse.dsl.frozen import frozen

from .record import Pass


@frozen
class MinimalFilters(Pass):
    """A convolution by three taps has its weights a second time, transformed for filtering, where
    they are constants and that is quicker; `load` reads the weights. Weights that are not finite,
    or so large that sums might not be, are not transformed.
    """

    name: ClassVar[str] = "minimal_filters"
    requires: ClassVar[tuple[str, ...]] = ("products-found", "constants-folded")
    load: Callable[[str, str], np.ndarray[Any, Any]] = field(repr=False)

    def run(self, graph: Graph) -> Graph:
        builder = Builder(graph.facts)
        new: dict[Ref, Ref] = {}
        for node in graph.nodes.values():
            with builder.at(node.span, node.stack, node.label):
                operands = [new[ref] for ref in node.operands]
                taps = self._transformed(graph, node)
                if taps is not None:
                    operands.append(builder.constant(taps, node.type.dtype))
                made = builder.add(node.primitive, operands, node.types)
            new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        builder.graph.results = tuple(new[ref] for ref in graph.results)
        return builder.graph.live()

    def _transformed(self, graph: Graph, node: Node) -> np.ndarray[Any, Any] | None:
        """The weights of a product as filtering takes them, if it is one that is filtered."""
        product = node.primitive
        if not isinstance(product, Contract) or len(node.operands) > 2:
            return None
        found = filtering_of(graph, node.id)
        if found is None:
            return None
        weights = self._stored(graph.nodes[node.operands[0].node])
        if not (np.abs(weights) <= LARGEST).all():
            return None
        shape = tuple(size.as_int() or 0 for size in node.type.shape)
        taps: np.ndarray[Any, Any] = found.transformed(product, shape, weights)
        return taps

    def _stored(self, node: Node) -> np.ndarray[Any, Any]:
        if isinstance(node.primitive, Weight):
            return self.load(node.primitive.weights, node.primitive.key)
        assert isinstance(node.primitive, Constant)
        return np.frombuffer(node.primitive.data, node.type.dtype.numpy)
