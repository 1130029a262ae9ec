"""Which kernels a group becomes on GPUs by the rules, and for which sizes each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_reduced import rows_reduced
from stagefuse.compiler.graph import Contract, Graph, Node
from stagefuse.compiler.kernel_ir import Value
from stagefuse.compiler.lower import FORMS, Sites
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.schedule import (
    GPU,
    GPU_CHAIN,
    GPU_CODES,
    GPU_HALF,
    GPU_TMA,
    GPU_WGMMA,
    Schedule,
)
from stagefuse.dsl.dims import Expr, const, floordiv, minimum

from .attention.chain import lower_chain
from .attention.lowering import heights, lower_attention, suits_groups
from .attention.split_keys import Split, lower_joined, lower_pieces, split_of
from .emit import KernelWriter
from .matmul.decoded_first import lower_unfolded, unfolded_of
from .matmul.deep_split import Deep, deeps_of
from .matmul.lowering import (
    holds_codes,
    lower_contract,
    matrices_of,
    operands_of,
    part_of,
    sums_roughly,
    tile_widths,
    whole_of,
)
from .matmul.norm_epilogue import lower_finished, not_split, tile_for
from .matmul.persistent import Whole
from .matmul.pooled_epilogue import even_width, lower_pooled, pooling_of, windows_of
from .matmul.reduction_epilogue import cut_of, lower_rest, lower_tiles
from .matmul.split_depth import (
    FEW_ROWS,
    Thin,
    are_few,
    enough_tiles,
    low_rows,
    lower_parts,
    lower_sum_of_parts,
    split_of_computed,
    thin,
)
from .matmul.tensor_loads import Matrices
from .matmul.tf32_shapes import Choice, Shape, choices
from .reductions.columns import Written, lower_rows
from .reductions.split_reductions import by_need, lower_whole_parts, lower_whole_rest, share_of
from .reductions.split_rows import levels, lower_level, lower_rest_of_rows, share_of_rows
from .row_classes import classes_of_rows
from .sequences.long_sorts import scatter_forms, sort_forms
from .sequences.split_scan import lower_stretch_scans, lower_stretches, splits
from .transposed import lower_elements

WGMMA = ("sm_90a",)
"""Arches with warpgroup instructions."""
FEW_REDUCED, MANY_REDUCED = 64, 1 << 20
"""Rows, and elements of a product, from which on its tiles reduce its rows: fewer rows have tiles
of their own, and fewer elements are read again from the L2 cache."""
DEEP_REDUCED = 256
"""Depth up to which that is so of 16 and 8 bits on warpgroups: tensor copies bring operands, and
store results while the next tile is multiplied, at 700 TFLOP/s and more; what `cp.async` feeds is
taken to reach 400. An element of f32 that is not read again saves 1 ps, and the difference is 1 ps
at a depth of about 500, but there is also the time of the reduction."""
REDUCED_COLUMNS = 128
"""Of tiles of 16 and 8 bits on warpgroups: an SM holds two, of which one multiplies while the other
reduces."""
NOT_POOLED = (
    "its windows are not pooled in its tiles: tensor copies, which can bring them in the order of "
    "the image alone, are faster by more than that saves"
)
TILE_ROWS = 64
"""Of tiles of parts whose panels are computed, which take several of them."""
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


def families(graph: Graph, group: Group, arches: Sequence[str]) -> list[tuple[str, ...]]:
    """The arches by what kernels of a group they have in common."""
    if sums_roughly(graph, group):
        return [(a,) for a in arches]
    groups = group.kind == "contract" and (
        bool(group.apart) or operands_of(graph, group) is not None or bool(choices(graph, group))
    )
    if group.kind == "attention":
        groups = suits_groups(SourceLowering(graph, (group.apart or (group,))[-1], Sites(), GPU))
    if not groups:
        return [tuple(arches)]
    found = [tuple(a for a in arches if (a in WGMMA) == has) for has in (False, True)]
    return [f for f in found if f]


def drafts(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """The kernels of a group on arches of one family."""
    if pooling_of(graph, group) is not None:
        yield from _pooled(graph, group, sites, arches)
    elif group.kind == "contract" and group.rows is not None:
        yield from _finished(graph, group, sites, arches)
    elif rows_reduced(group) is not None:
        yield from _reduced(graph, group, sites, arches)
    elif group.kind == "contract" and group.apart and arches[0] in WGMMA:
        yield from _in_steps(graph, group, sites, arches)
    elif group.kind == "contract":
        yield from _products(graph, group, sites, arches)
    elif group.kind in ("row", "scan"):
        yield from _rows(graph, group, sites)
    elif group.kind == "attention":
        yield from _attentions(graph, group, sites, arches)
    elif group.kind in ("sort", "scatter"):
        forms = sort_forms if group.kind == "sort" else scatter_forms
        for kernel in forms(graph, group):
            low = SourceLowering(graph, group, sites, GPU)
            low.sizes = kernel.facts
            yield Draft(low, {group.kind: kernel.lower}, kernel.share, kernel.part)
    else:
        schedule = GPU_CHAIN if group.kind == "chain" else GPU
        for facts, name, share in classes_of_rows(graph, group) or [(graph.facts, "", const(1))]:
            low = SourceLowering(graph, group, sites, schedule)
            low.sizes = facts
            yield Draft(low, GPU_FORMS, share, name)


def _in_steps(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """A product of few rows that are chosen by indices in one kernel, of more after a kernel that
    gathers them."""
    assert group.anchor is not None
    product, shape = graph.nodes[group.anchor].primitive, graph.nodes[group.anchor].type.shape
    assert isinstance(product, Contract)
    few = 1 - minimum(floordiv(size_of([shape[a] for a in product.rows]), FEW_ROWS + 1), const(1))
    few = graph.facts.simplify(few)
    plain = replace(group, apart=())
    for groups, share in (((plain,), few), (group.apart, 1 - few)):
        for part in groups if share != const(0) else ():
            for draft in drafts(graph, part, sites, arches):
                yield draft._replace(share=graph.facts.simplify(draft.share * share))


def _reduced(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """A product whose rows are reduced tile by tile, where it has many elements; else by a kernel
    that reads them. On warpgroups a deep product in 16 or 8 bits gains more by tensor copies."""
    rows, own = rows_reduced(group), partial(SourceLowering, graph, group, sites)
    assert group.anchor is not None and rows is not None
    node, narrow = graph.nodes[group.anchor], operands_of(graph, group) is not None
    product, shape = node.primitive, node.type.shape
    assert isinstance(product, Contract)
    high, wide = (size_of([shape[a] for a in x]) for x in (product.rows, product.columns))
    many = minimum(floordiv(high, FEW_REDUCED + 1), floordiv(high * wide, MANY_REDUCED))
    many = graph.facts.simplify(minimum(many, const(1)))
    groups = arches[0] in WGMMA
    if groups and narrow and (product.depth.as_int() or DEEP_REDUCED + 1) > DEEP_REDUCED:
        many = const(0)
    ways: list[tuple[SourceLowering, Shape | None, Expr]] = []
    others = many
    for choice in choices(graph, group) if groups and not narrow and many != const(0) else ():
        draft = shape_draft(own(GPU), replace(choice, holds=choice.holds * many))
        ways.append((draft.low, choice.shape, draft.share))
        others = others - draft.share
    schedule = GPU_HALF if narrow else GPU
    if groups and narrow:
        schedule = replace(GPU_WGMMA, tile_columns=REDUCED_COLUMNS)
    if graph.facts.simplify(others) != const(0):
        ways.append((own(schedule), None, others))
    for variant, (low, tile, share) in enumerate(ways):
        cut = cut_of(low, tile, variant)
        share = graph.facts.simplify(share)
        form = partial(lower_tiles, cut=cut, shape=tile)
        yield Draft(low, {"contract": form}, share, "reduced")
        rest = SourceLowering(graph, rows, sites, GPU)
        yield Draft(rest, {"row": partial(lower_rest, cut=cut)}, share, "of tiles")
    for part in group.apart if many != const(1) else ():
        for draft in drafts(graph, part, sites, arches):
            share = graph.facts.simplify(draft.share * (1 - many))
            if share != const(0):
                yield draft._replace(share=share)


def _finished(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """A product whose rows are finished in tiles that have them whole."""
    own = partial(SourceLowering, graph, group, sites)
    groups, narrow = arches[0] in WGMMA, operands_of(graph, group) is not None
    copied = whole_of(own(GPU_TMA)) if narrow and groups else None
    tile = tile_for(own(GPU_HALF if narrow else GPU), groups)
    columns = group.domain[-1].as_int() or 0
    yield from _in_tiles(
        graph, group, sites, arches, lower_finished, "finished", copied, tile, columns
    )


def _pooled(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """A product whose windows are pooled in tiles that have them whole; not where tensor copies
    can bring its operands in the order of the image alone."""
    own = partial(SourceLowering, graph, group, sites)
    groups, narrow = arches[0] in WGMMA, operands_of(graph, group) is not None
    schedule, copied = GPU_HALF if narrow else GPU, None
    if narrow and groups:
        low = own(replace(GPU_TMA, tile_columns=even_width(group.domain[-1].as_int())))
        found = pooling_of(graph, group)
        assert found is not None
        copied = whole_of(low, windows_of(low, found))
        if copied is None and whole_of(low) is not None:
            product, pool = (drafts(graph, part, sites, arches) for part in group.apart)
            yield from product
            yield from (draft._replace(why=NOT_POOLED) for draft in pool)
            return
        schedule = low.schedule if copied else replace(low.schedule, tensor_copies=False)
    tile = schedule, None
    for draft in _in_tiles(graph, group, sites, arches, lower_pooled, "pooled", copied, tile):
        if draft.part == "pooled":
            draft.low.whole = copied
        yield draft


def _in_tiles(
    graph: Graph, group: Group, sites: Sites, arches: Sequence[str],
    lower: Callable[..., Parallel], part: str, copied: Whole | None,
    tile: tuple[Schedule, Shape | None] | None, columns: int = 0,
) -> Iterator[Draft]:  # fmt: skip
    """A product that its tiles, of so many `columns` at least, finish where it is not split along
    its depth; else kernels that do the same in two steps. `tile`: by which schedule and shape it
    does so, other than f32 on warpgroups."""
    own = partial(SourceLowering, graph, group, sites)
    groups, narrow = arches[0] in WGMMA, operands_of(graph, group) is not None
    many = not_split(graph, group, copied, narrow and groups)
    done = const(0)
    found = choices(graph, group, columns) if groups and not narrow and many != const(0) else ()
    for choice in found:
        draft = shape_draft(own(GPU), replace(choice, holds=choice.holds * many))
        yield draft._replace(forms={"contract": partial(lower, shape=choice.shape)}, part=part)
        done = done + draft.share
    rest = graph.facts.simplify(many * (1 - sum((c.holds for c in found), const(0))))
    if tile is not None and rest != const(0):
        schedule, shape = tile
        yield Draft(own(schedule), {"contract": partial(lower, shape=shape)}, rest, part)
        done = done + rest
    others = graph.facts.simplify(1 - done)
    for each in group.apart if others != const(0) else ():
        for draft in drafts(graph, each, sites, arches):
            share = graph.facts.simplify(draft.share * others)
            if share != const(0):
                yield draft._replace(share=share)


def _products(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """The kernels of a product, and of the same by a matrix that is unfolded first."""
    own = unfolded_of(graph, group) if arches[0] in WGMMA else None
    if own is None:
        return (yield from _by_size(graph, group, sites, arches))
    low = SourceLowering(graph, group.packs[own.panels], sites, GPU)
    low.unfolds, form = True, partial(lower_unfolded, own=own)
    yield Draft(low, {"pointwise": form}, own.share, "unfolded", own.why)
    for draft in _by_size(own.graph, own.group, sites, arches):
        yield draft._replace(share=graph.facts.simplify(draft.share * own.share))
    for draft in _by_size(graph, group, sites, arches) if own.share != const(1) else ():
        if own.below.simplify(draft.share) != const(0):
            yield draft._replace(share=graph.facts.simplify(draft.share * (1 - own.share)))


def _by_size(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """The kernels of a product: tiles by warpgroups or warps, or parts of the depth and their
    sum."""
    own = partial(SourceLowering, graph, group, sites)
    groups, codes = arches[0] in WGMMA, holds_codes(graph, group)
    narrow = operands_of(graph, group) is not None
    copied = whole_of(own(GPU_TMA)) if narrow and groups and not codes else None
    enough = enough_tiles(graph, group, copied) if narrow and groups and not codes else None
    split = thin(graph, group, enough)
    others = const(1)
    deeps = [] if copied is None else deeps_of(graph, group)
    if any(deep.split.few == const(1) for deep in deeps):
        split = None
    if split is not None and deeps and are_few(graph, group, split):
        split = replace(split, low=const(0))
    sums: list[tuple[Thin, Expr]] = []
    if split is not None and split.low != const(0):
        others = 1 - split.low
        for rows, share in low_rows(graph, group, split):
            way = split if rows < FEW_ROWS else split_of_computed(graph, group, split)
            yield parts_draft(own(GPU), way, share, rows)
            sums.append((way, share))
    for deep in deeps:
        assert copied is not None
        share = graph.facts.simplify(deep.split.few * others)
        others = others - share
        yield deep_draft(own(replace(GPU_TMA, tile_columns=deep.width)), deep, copied, share)
        yield sum_draft(own(GPU), deep.split, share)
    found = choices(graph, group) if groups and not narrow and others != const(0) else ()
    for choice in found:
        yield shape_draft(own(GPU), replace(choice, holds=choice.holds * others))
    others = others * (1 - sum((c.holds for c in found), const(0)))
    if split is not None:
        few = split.few * others
        if few != const(0):
            way = split_of_computed(graph, group, split)
            yield parts_draft(own(GPU), way, few, 0 if way is split else TILE_ROWS)
            sums.append((way, few))
        others = others - few
        for way in dict.fromkeys(way for way, _ in sums):
            summed = sum((share for each, share in sums if each == way), const(0))
            yield sum_draft(own(GPU), way, summed)
    if others == const(0):
        return
    if not narrow or not groups or codes:
        schedule = GPU_HALF if narrow else GPU
        if narrow and groups:
            schedule = GPU_CODES
        yield Draft(own(schedule), GPU_FORMS, others, "")
        return
    for width, best in tile_widths(graph, group, 1 if copied is None else copied.cluster):
        yield width_draft(graph, group, sites, width, copied, others * best)


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


def _attentions(graph: Graph, group: Group, sites: Sites, arches: Sequence[str]) -> Iterator[Draft]:
    """The kernels of attention: of few queries in two, which may compute keys and values, the
    others in one, after the kernels that store those."""
    *makers, whole = group.apart or (group,)
    split = split_of(SourceLowering(graph, whole, Sites(), GPU), bool(makers))
    others = const(1)
    if split is not None:
        others = 1 - split.few
        yield from pieces_drafts(graph, group, sites, split)
    if graph.facts.bounds(others)[1] != 0:
        for maker in makers:
            for draft in drafts(graph, maker, sites, arches):
                yield draft._replace(share=graph.facts.simplify(draft.share * others))
        low = SourceLowering(graph, whole, Sites(), GPU)
        if arches[0] not in WGMMA or not suits_groups(low):
            yield attended_draft(graph, whole, sites, None, others)
            return
        for rows, best in heights(low):
            yield attended_draft(graph, whole, sites, rows, graph.facts.simplify(others * best))


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


def _rows(graph: Graph, group: Group, sites: Sites) -> Iterator[Draft]:
    """The kernels of rows: of long ones in two, the others by how long they are."""
    own = partial(SourceLowering, graph, group, sites, GPU)
    split = splits(graph, group)
    steps: list[tuple[Callable[[Lowering], Parallel], str]]
    steps = [(lower_stretches, "parts"), (lower_stretch_scans, "stretches")]
    if split is None:
        split = share_of(own())
        steps = [
            (partial(lower_whole_parts, level=n), f"parts {n}" if n else "parts")
            for n in range(len(by_need(graph, group)))
        ]
        steps.append((lower_whole_rest, "" if split == const(1) else "of parts"))
    if split != const(0):
        for form, name in steps:
            yield Draft(own(), {group.kind: form}, split, name)
    else:
        split = share_of_rows(graph, group)
        for level in range(len(levels(graph, group)) if split != const(0) else 0):
            form = partial(lower_level, level=level)
            yield Draft(own(), {group.kind: form}, split, f"parts {level}")
        if split != const(0):
            yield Draft(own(), {group.kind: lower_rest_of_rows}, split, "of parts")
    others = graph.facts.simplify(1 - split)
    if others == const(0):
        return
    for facts, name, share in classes_of_rows(graph, group) or [(graph.facts, "", const(1))]:
        low = own()
        low.sizes = facts
        yield Draft(low, GPU_FORMS, share * others, name)
