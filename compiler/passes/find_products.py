"""Folds chains of views into one, and finds matrix products whatever they were written as."""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import ClassVar

from stagefuse.compiler.graph import Graph, Node, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.byte_products import Load, product_of_bytes
from stagefuse.compiler.patterns.contract import Rules, Sums, rebuild
from stagefuse.compiler.patterns.half_products import product_of_halves
from stagefuse.compiler.patterns.single_query import single_query_sums
from stagefuse.compiler.patterns.softmax import attention_sums
from stagefuse.dsl.frozen import frozen

from .record import Pass


@frozen
class FindProducts(Pass):
    """A view of a view is one view; a sum of a product along an axis is a `Contract`.

    Both at once: a product's operands are in place only where the views around them are folded,
    and the views that pack its panels fold into those of the weights. With `few_places`, a
    convolution of few places has them as rows. With `narrow`, a product of 8- or 16-bit operands is
    one of these as they are stored, for GPUs; with `integers`, one of 8-bit integers is, for a CPU.
    `load` reads weights. With `single_queries`, sums of attention that are a row times a matrix are
    products too. `panel`: the columns of panels of f32 and f64, if there is only one width.
    """

    name: ClassVar[str] = "find_products"
    establishes: ClassVar[tuple[str, ...]] = ("views-folded", "products-found")
    few_places: bool = True
    narrow: bool = False
    integers: bool = False
    single_queries: bool = False
    load: Load | None = field(default=None, repr=False)
    panel: int | None = None

    def run(self, graph: Graph) -> Graph:
        finder = None
        if self.narrow or self.integers:
            finder = partial(self._narrow, attended=attention_sums(graph))
        single = single_query_sums(graph) if self.single_queries else frozenset[int]()
        return rebuild(graph, Rules(self.few_places, finder, panel=self.panel), single)

    def _narrow(
        self, b: Builder, node: Node, sums: Sums, attended: frozenset[int]
    ) -> Ref | None:
        """A product of operands of 8 or 16 bits, if it has a form of its own. Those of attention
        take 16 bits as they lie, and what is between them need not be stored."""
        found = product_of_bytes(
            b, node, sums, self.load, convolves=not self.few_places, on_cpu=not self.narrow
        )
        if found is not None or not self.narrow or node.id in attended:
            return found
        return product_of_halves(b, node, sums)
