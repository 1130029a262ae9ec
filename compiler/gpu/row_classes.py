"""The classes of lengths for which kernels of rows are made, where lengths are not known."""

from __future__ import annotations

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Gather, Graph, Scan
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv, minimum
from stagefuse.dsl.facts import Facts

from .teams import PART_ROW, WARP_ROW

SHORT_ROWS = (PART_ROW, 256, 1024, 4096)
"""Rows up to these lengths have kernels of their own, whose lanes need no more registers."""
FEW_ELEMENTS = 8
"""Of a row that one lane moves from where data says."""


def classes_of_rows(graph: Graph, group: Group) -> list[tuple[Facts, str, Expr]]:
    """For rows that may be short or long, of row kernels, scans and gathers: what is known of sizes
    in each class of lengths, its name, and an expression that is 1 there and else 0."""
    axes = tuple(group.row_axes or ())
    if group.kind == "scan":
        scan = graph.nodes[group.roots[0].node].primitive
        axes = (scan.axis,) if isinstance(scan, Scan) and scan.axis == len(group.domain) - 1 else ()
    if group.kind == "pointwise" and any(
        isinstance(graph.nodes[m].primitive, Gather) for m in group.members
    ):  # of a single element there are no rows
        axes = (len(group.domain) - 1,) if group.domain else ()
    if group.kind not in ("row", "scan", "pointwise") or len(axes) != 1:
        return []
    (axis,) = axes
    length = group.domain[axis]
    name = length.as_symbol()
    if name is None or len(group.domain) == 1:
        return []
    low, high = graph.facts.ranges.get(name, (0, None))
    most = None if high is None else graph.facts.bounds(as_expr(high))[1]
    least = graph.facts.bounds(as_expr(low))[0]
    if least is None:
        return []
    limits = [n for n in SHORT_ROWS if least <= n and (most is None or n < most)]
    if group.kind == "scan":
        limits = [n for n in limits if n == WARP_ROW]
    elif group.kind == "pointwise":
        limits = [n for n in (FEW_ELEMENTS, PART_ROW, WARP_ROW) if least <= n]
        limits = [n for n in limits if most is None or n < most]
    found, above = [], const(1)
    for limit in limits:
        beyond = minimum(floordiv(length, limit + 1), const(1))
        facts = graph.facts.with_ranges({name: (low, limit)})
        found.append((facts, f"to {limit}", above - beyond))
        low, above = limit + 1, beyond
    if found:
        found.append((graph.facts.with_ranges({name: (low, high)}), "", above))
    return found
