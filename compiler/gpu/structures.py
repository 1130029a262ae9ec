"""Other ways to compute a product or an attention than the rules choose, for `--tune` to measure.

A structure is a few numbers: `columns` and `cluster` of a tile of narrow operands on warpgroups;
`rows`, `columns` and `split` of one of f32; `parts` of the depth that a second kernel sums; `warps`
is 1 where `mma.sync` is used on an arch with warpgroups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_reduced import rows_reduced
from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.lower import Sites
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.schedule import GPU, GPU_HALF, GPU_TMA
from stagefuse.compiler.tuned import Changes
from stagefuse.dsl.dims import Expr, const

from .attention.lowering import suits_groups
from .draft import (
    GPU_FORMS,
    WGMMA,
    Draft,
    SourceLowering,
    attended_draft,
    parts_draft,
    shape_draft,
    sum_draft,
    width_draft,
)
from .matmul.lowering import whole_of
from .matmul.operands import holds_codes, operands_of
from .matmul.persistent import CLUSTER
from .matmul.split_depth import in_parts
from .matmul.tf32_shapes import Shape, shapes_of
from .matmul.tile_widths import rounds_of, widths_of

TILES = 5
"""Tiles to be measured, those that are predicted to be quickest."""
PARTS = (2, 4, 8)


class Made(NamedTuple):
    """The kernels of a structure, and an expression that is 1 for sizes that they can run for."""

    drafts: list[Draft]
    holds: Expr


def candidates(
    graph: Graph, group: Group, arch: str, sizes: Mapping[str, int] | None
) -> list[Changes]:
    """The structures that a group may have: the few that are predicted to be quickest at some
    sizes, or all of them."""
    if group.kind == "attention":
        groups = arch in WGMMA and suits_groups(SourceLowering(graph, group, Sites(), GPU))
        return [{"warps": 1}] if groups and not group.apart else []
    if group.kind != "contract" or group.anchor is None or rows_reduced(group) is not None:
        return []
    found: list[Changes] = []
    if arch in WGMMA:
        found += _shapes(graph, group, sizes)
        found += _widths(graph, group, sizes)
    if found:
        found.append({"warps": 1})
    return found + [{"parts": n} for n in PARTS if in_parts(graph, group, n) is not None]


def made_by(changes: Changes, graph: Graph, group: Group, sites: Sites, arch: str) -> Made | None:
    """The kernels of a group in a structure; None if it cannot have that."""
    if changes not in candidates(graph, group, arch, None):
        return None
    if group.kind == "attention":
        return Made([attended_draft(graph, group, sites, None, const(1))], const(1))
    if "parts" in changes:
        split = in_parts(graph, group, changes["parts"])
        assert split is not None
        pair = [SourceLowering(graph, group, sites, GPU) for _ in range(2)]
        return Made(
            [parts_draft(pair[0], split, const(1)), sum_draft(pair[1], split, const(1))], const(1)
        )
    narrow = operands_of(graph, group) is not None
    if "warps" in changes:
        low = SourceLowering(graph, group, sites, GPU_HALF if narrow else GPU)
        return Made([Draft(low, GPU_FORMS, const(1), "by warps")], const(1))
    if "split" in changes:
        shape = Shape(changes["rows"], changes["columns"], changes["split"])
        choice = next(c for c in shapes_of(graph, group) if c.shape == shape)
        low = SourceLowering(graph, group, sites, GPU)
        return Made([shape_draft(low, replace(choice, holds=const(1)))], choice.holds)
    copied = whole_of(SourceLowering(graph, group, sites, GPU_TMA))
    if copied is not None:
        copied = replace(copied, cluster=changes["cluster"])
    width = changes["columns"]
    return Made([width_draft(graph, group, sites, width, copied, const(1))], const(1))


def _shapes(graph: Graph, group: Group, sizes: Mapping[str, int] | None) -> list[Changes]:
    """Tiles of f32 products on warpgroups."""
    if operands_of(graph, group) is not None:
        return []
    found = [c.shape for c in shapes_of(graph, group)]
    if sizes is not None:
        batch, rows, columns, depth = _extents(graph, group, sizes)
        found.sort(key=lambda shape: shape.clocks((batch, rows, columns, depth, 1)))
        found = found[:TILES]
    return [{"rows": s.rows, "columns": s.columns, "split": s.split} for s in found]


def _widths(graph: Graph, group: Group, sizes: Mapping[str, int] | None) -> list[Changes]:
    """Tiles of narrow operands on warpgroups."""
    kind = operands_of(graph, group)
    if kind is None or holds_codes(graph, group):
        return []
    copied = whole_of(SourceLowering(graph, group, Sites(), GPU_TMA))
    clusters = (1,) if copied is None else (1, CLUSTER)
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    all_columns = size_of([node.type.shape[a] for a in product.columns])
    listed = [(w, c) for w in widths_of(all_columns, graph.facts, kind.is_rough) for c in clusters]
    if sizes is not None:
        batch, rows, columns, _ = _extents(graph, group, sizes)
        own = 1 if copied is None else copied.cluster
        rough = kind.is_rough

        def order(tile: tuple[int, int]) -> tuple[int, bool, int]:
            width, cluster = tile
            time = rounds_of(batch, rows, columns, width, cluster, rough)
            return time, cluster != own, -width

        listed.sort(key=order)
        listed = listed[:TILES]
    return [{"columns": w, "cluster": c} for w, c in listed]


def _extents(graph: Graph, group: Group, sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Batch, rows, columns and depth of a group's product at sizes."""
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    parts = [
        size_of([node.type.shape[a] for a in axes])
        for axes in (product.batch, product.rows, product.columns)
    ]
    extents = [*parts, product.depth]
    known = {name: sizes.get(name, 1) for e in extents for name in e.symbols()}
    batch, rows, columns, depth = (e.evaluate(known) for e in extents)
    return batch, rows, columns, depth
