"""Which kernels a group becomes on GPUs by the rules, and for which sizes each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_reduced import rows_reduced
from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.lower import Sites
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

from .attention.lowering import heights, suits_groups
from .attention.split_keys import split_of
from .draft import (
    GPU_FORMS,
    WGMMA,
    Draft,
    SourceLowering,
    attended_draft,
    deep_draft,
    parts_draft,
    pieces_drafts,
    shape_draft,
    sum_draft,
    width_draft,
)
from .matmul.decoded_first import lower_unfolded, unfolded_of
from .matmul.deep_split import deeps_of
from .matmul.lowering import tile_widths, whole_of
from .matmul.norm_epilogue import lower_finished, not_split, tile_for
from .matmul.operands import holds_codes, operands_of, sums_roughly
from .matmul.persistent import Whole
from .matmul.pooled_epilogue import even_width, lower_pooled, pooling_of, windows_of
from .matmul.reduction_epilogue import cut_of, lower_rest, lower_tiles
from .matmul.split_depth import (
    FEW_ROWS,
    Thin,
    are_few,
    enough_tiles,
    low_rows,
    split_of_computed,
    thin,
)
from .matmul.tf32_shapes import Shape, choices
from .reductions.split_reductions import by_need, lower_whole_parts, lower_whole_rest, share_of
from .reductions.split_rows import levels, lower_level, lower_rest_of_rows, share_of_rows
from .row_classes import classes_of_rows
from .sequences.long_sorts import scatter_forms, sort_forms
from .sequences.split_scan import lower_stretch_scans, lower_stretches, splits

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
    return _Sizes(graph, group, sites, arches[0] in WGMMA).drafts()


class _Sizes:
    """The kernels of a product, found one after the other. `others`: 1 for the sizes that none of
    those found so far runs for, else 0. `sums`: how parts are cut that are still to be added up,
    and for which sizes."""

    def __init__(self, graph: Graph, group: Group, sites: Sites, groups: bool) -> None:
        self.graph, self.group, self.sites = graph, group, sites
        self.own = partial(SourceLowering, graph, group, sites)
        self.narrow = operands_of(graph, group) is not None
        self.shaped = groups and not self.narrow
        """Whether it is a product of f32 on warpgroups, in tiles of the shapes of `choices`."""
        self.by_width = groups and self.narrow and not holds_codes(graph, group)
        """Whether it is one of narrow operands on warpgroups, in tiles of several widths."""
        self.half = GPU_CODES if groups else GPU_HALF
        self.copied = whole_of(self.own(GPU_TMA)) if self.by_width else None
        enough = enough_tiles(graph, group, self.copied) if self.by_width else None
        self.deeps = [] if self.copied is None else deeps_of(graph, group)
        self.split = self._split(thin(graph, group, enough))
        self.sums: list[tuple[Thin, Expr]] = []
        self.others = const(1)

    def _split(self, split: Thin | None) -> Thin | None:
        """How products of few tiles are split, but for those that are split deep anyway."""
        if split is None or any(deep.split.few == const(1) for deep in self.deeps):
            return None
        if self.deeps and are_few(self.graph, self.group, split):
            return replace(split, low=const(0))
        return split

    def drafts(self) -> Iterator[Draft]:
        if self.split is not None:
            yield from self._of_few_rows(self.split)
        yield from self._deep()
        yield from self._of_shapes()
        if self.split is not None:
            yield from self._of_few_tiles(self.split)
        if self.others == const(0):
            return
        if self.by_width:
            yield from self._of_widths()
        else:
            yield Draft(self.own(self.half if self.narrow else GPU), GPU_FORMS, self.others, "")

    def _of_few_rows(self, split: Thin) -> Iterator[Draft]:
        """Parts in tiles as low as the product."""
        if split.low == const(0):
            return
        self.others = 1 - split.low
        for rows, share in low_rows(self.graph, self.group, split):
            computed = rows >= FEW_ROWS
            way = split_of_computed(self.graph, self.group, split) if computed else split
            yield parts_draft(self.own(GPU), way, share, rows)
            self.sums.append((way, share))

    def _deep(self) -> Iterator[Draft]:
        """Parts by warpgroups, and their sums."""
        for deep in self.deeps:
            assert self.copied is not None
            share = self.graph.facts.simplify(deep.split.few * self.others)
            self.others = self.others - share
            low = self.own(replace(GPU_TMA, tile_columns=deep.width))
            yield deep_draft(low, deep, self.copied, share)
            yield sum_draft(self.own(GPU), deep.split, share)

    def _of_shapes(self) -> Iterator[Draft]:
        """Tiles of f32 by warpgroups."""
        wanted = self.shaped and self.others != const(0)
        found = choices(self.graph, self.group) if wanted else ()
        for choice in found:
            yield shape_draft(self.own(GPU), replace(choice, holds=choice.holds * self.others))
        self.others = self.others * (1 - sum((c.holds for c in found), const(0)))

    def _of_few_tiles(self, split: Thin) -> Iterator[Draft]:
        """Parts of what has few tiles, then the sums of all parts."""
        few = split.few * self.others
        if few != const(0):
            way = split_of_computed(self.graph, self.group, split)
            yield parts_draft(self.own(GPU), way, few, 0 if way is split else TILE_ROWS)
            self.sums.append((way, few))
        self.others = self.others - few
        for way in dict.fromkeys(way for way, _ in self.sums):
            summed = sum((share for each, share in self.sums if each == way), const(0))
            yield sum_draft(self.own(GPU), way, summed)

    def _of_widths(self) -> Iterator[Draft]:
        """Tiles of narrow operands by warpgroups."""
        cluster = 1 if self.copied is None else self.copied.cluster
        for width, best in tile_widths(self.graph, self.group, cluster):
            share = self.others * best
            yield width_draft(self.graph, self.group, self.sites, width, self.copied, share)


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
