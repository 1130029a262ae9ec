"""Names from the source: a value is called as the variable that is bound to it."""

from __future__ import annotations

import re

from stagefuse.compiler.graph import Graph
from stagefuse.dsl.source import Span

_BOUND = re.compile(r"\s*([A-Za-z_]\w*)(?:\[[^\]=]*\])?\s*=(?!=)")


def names_of(graph: Graph) -> dict[int, tuple[int, str]]:
    """By the last node of each statement that binds a variable: how deep in calls, and which.

    Where calls end with the same node, the outermost statement names it.
    """
    found: dict[int, tuple[int, str]] = {}
    runs: dict[tuple[Span, ...], tuple[int, int, str]] = {}

    def ended(depth: int, node: int, name: str) -> None:
        if node not in found or found[node][0] > depth:
            found[node] = (depth, name)

    for node in graph.nodes.values():
        if node.span is None or not node.operands:
            continue
        for depth, span in enumerate((*node.stack, node.span)):
            key = node.stack[:depth]
            before = runs.pop(key, None)
            if before is not None and before[0] != span.line:
                ended(depth, *before[1:])
            bound = _BOUND.match(span.source.line(span.line))
            if bound is not None and span.column - 1 >= bound.end(1):
                runs[key] = (span.line, node.id, bound.group(1))
    for key, (_, last, name) in runs.items():
        ended(len(key), last, name)
    return found
