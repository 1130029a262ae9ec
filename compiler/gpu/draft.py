"""A kernel of a group on GPUs to be lowered: by which forms, and for which sizes it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Graph, Node
from stagefuse.compiler.kernel_ir import Value
from stagefuse.compiler.lower import FORMS, Sites
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.schedule import GPU, GPU_TMA, GPU_WGMMA
from stagefuse.dsl.dims import Expr, const

from .attention.chain import lower_chain
from .attention.lowering import lower_attention
from .attention.split_keys import Split, lower_joined, lower_pieces
from .emit import KernelWriter
from .matmul.deep_split import Deep
from .matmul.lowering import lower_contract, matrices_of, part_of
from .matmul.persistent import Whole
from .matmul.split_depth import Thin, lower_parts, lower_sum_of_parts
from .matmul.tensor_loads import Matrices
from .matmul.tf32_shapes import Choice
from .reductions.columns import Written, lower_rows
from .transposed import lower_elements

WGMMA = ("sm_90a",)
"""Arches with warpgroup instructions."""
Forms = Mapping[str, Callable[[Lowering], Parallel]]
GPU_FORMS: Forms = {
    **FORMS,
    "pointwise": lower_elements,
    "contract": lower_contract,
    "row": lower_rows,
    "chain": lower_chain,
    "attention": lower_attention,
}


class SourceLowering(Written):
    """A lowering that remembers the line that each value comes from. `whole`: the matrices of a
    product whose operands come by tensor copies."""

    whole: Whole | None = None

    def __init__(self, *args: Any) -> None:
        self.lines: dict[Value, int] = {}
        self.warpgroups = self.unfolds = False
        self.boxes: Matrices | None = None
        self.eights = KernelWriter.eights
        super().__init__(*args)
        self.sizes = self.graph.facts

    def map(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        value = super().map(node, at, guard)
        if node.span is not None:
            self.lines.setdefault(value, node.span.line)
        return value


class Draft(NamedTuple):
    """A kernel to be lowered by forms, a factor of its grid that is 1 or 0, what part of its group
    it is, and why there is one beside the others, if that needs to be said."""

    low: SourceLowering
    forms: Forms
    share: Expr
    part: str
    why: str = ""


def parts_draft(low: SourceLowering, split: Thin, share: Expr, rows: int = 0) -> Draft:
    """The products of parts of the depth, in tiles of some rows."""
    return Draft(
        low, {"contract": partial(lower_parts, split=split, tile_rows=rows)}, share, "parts"
    )


def deep_draft(low: SourceLowering, deep: Deep, whole: Whole, share: Expr) -> Draft:
    """The products of parts of the depth, by warpgroups whose operands come by tensor copies."""
    low.whole = part_of(low, whole, "ks", deep.split.depth)
    form = partial(lower_parts, split=deep.split)
    return Draft(low, {"contract": form}, share, f"parts by {deep.width}")


def sum_draft(low: SourceLowering, split: Thin, share: Expr) -> Draft:
    """The sum of such parts, and what follows."""
    return Draft(low, {"contract": partial(lower_sum_of_parts, split=split)}, share, "sum")


def shape_draft(low: SourceLowering, choice: Choice) -> Draft:
    """An f32 product on warpgroups in tiles of a shape."""
    low.warpgroups, low.sizes = True, choice.facts
    low.boxes = matrices_of(low, choice.shape)
    return Draft(low, {"contract": partial(lower_contract, shape=choice.shape)}, choice.holds, "")


def width_draft(
    graph: Graph, group: Group, sites: Sites, width: int, copied: Whole | None, share: Expr
) -> Draft:
    """A product of narrow operands on warpgroups in tiles of a width, whose operands come by tensor
    copies if `copied` says of which matrices."""
    base = GPU_WGMMA if copied is None else GPU_TMA
    low = SourceLowering(graph, group, sites, replace(base, tile_columns=width))
    low.whole = copied
    return Draft(low, GPU_FORMS, graph.facts.simplify(share), f"by {width}")


def pieces_drafts(graph: Graph, group: Group, sites: Sites, split: Split) -> Iterator[Draft]:
    """Attention by pieces of the keys, and what puts them together."""
    for part, name in ((lower_pieces, "pieces"), (lower_joined, "joined")):
        low = SourceLowering(graph, group, sites, GPU)
        share = const(1) if name == "pieces" else split.few  # no piece, no block
        yield Draft(low, {"attention": partial(part, split=split)}, share, name)


def attended_draft(
    graph: Graph, group: Group, sites: Sites, rows: int | None, share: Expr
) -> Draft:
    """Attention in one kernel, by warpgroups in blocks of so many rows, or by warps."""
    low = SourceLowering(graph, group, sites, GPU if rows is None else GPU_WGMMA)
    form = partial(lower_attention, rows=rows)
    return Draft(low, {"attention": form}, share, "" if rows is None else f"by {rows}")
