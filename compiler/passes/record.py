"""What a pass over the dataflow graph is."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from stagefuse.compiler.graph import Graph
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Span

INVARIANTS = {
    "simplified": "no rule of `compiler.rules` fits",
    "views-folded": "no view reads another that it could be folded into",
    "products-found": "each sum of a product that a matrix product can compute is a `Contract`",
    "constants-folded": "what depends on weights and constants alone is stored, unless much larger",
    "results-computed": "each result is the result of a different node that computes it",
}
"""What passes establish and rely on, by name; the verifier's invariants hold always."""

Place: TypeAlias = tuple[Span | None, tuple[Span, ...]]
"""Where a node comes from: its span, and those of the calls around it."""


@frozen
class Pass:
    """A function from graph to graph that keeps the meaning; its fields are its options.

    It needs the invariants in `requires` and gives those in `establishes`; those in `breaks` may
    no longer hold after it, all others still do. A pass has no side effects.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    establishes: ClassVar[tuple[str, ...]] = ()
    breaks: ClassVar[tuple[str, ...]] = ()

    def run(self, graph: Graph) -> Graph:
        """The graph after the pass."""
        raise NotImplementedError

    def reasons(self, graph: Graph) -> dict[Place, str]:
        """Why the pass will do, or not do, something at a place, for `explain`."""
        return {}
