"""Folds chains of views into one, and finds matrix products whatever they were written as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import rebuild
from ..graph import Graph
from .record import Pass


@dataclass(frozen=True)
class FindProducts(Pass):
    """A view of a view is one view; a sum of a product along an axis is a `Contract`.

    Both at once: a product's operands are in place only where the views around them are folded,
    and the views that pack its panels fold into those of the weights. With `few_places`, a
    convolution of few places has them as rows.
    """

    name: ClassVar[str] = "find_products"
    establishes: ClassVar[tuple[str, ...]] = ("views-folded", "products-found")

    few_places: bool = True

    def run(self, graph: Graph) -> Graph:
        return rebuild(graph, self.few_places)
