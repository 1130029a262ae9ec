"""Joins kernels around matrix products, so that what lies between two kernels stays in scratch.

Joins, tried in this order on the kernels that `fuse` found:

- *placed*: a kernel that only copies a product's result into another order disappears; the
  product stores its elements where the copy would have put them.
- *attended*: with softmax between them, no row of scores is ever whole: sums over ranges of keys
  are corrected as greater scores come. For GPUs.
- *chained*: a product whose rows go through row reductions into another product (attention)
  computes a block of rows from end to end.
- *packed*: the panels of a product are packed in the kernel that multiplies by them, where they
  would be larger than what they come from (a convolution's patches, quantised weights) or are used
  once (a product in a batch).
- *thin*: a product whose panels are packed for many rows has a second kernel, for few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.dsl.dims import Expr, const, maximum, minimum, sym
from stagefuse.dsl.dtypes import BF16, F16

from .attention import find_softmax, is_cheap, is_narrow
from .fuse import Access, Decision, Group, Partition, flops
from .graph import Constant, Contract, Graph, Map, Node, Ref, View, Weight, flatten_index
from .inverse import inverse
from .windows import is_worth_it, step_in_place, windows_of

PACKED_BYTES = 1 << 20
"""All panels of a batch, packed by a chain of products itself, must fit the second-level cache."""

FEW_ROWS = 1024
THIN = 36
"""Rows of a product that read the other matrix faster in place than packed: one tile."""


def join(
    graph: Graph,
    found: Partition,
    joins: Sequence[str] = ("placed", "chained", "packed", "thin"),
    longest: int | None = None,
) -> Partition:
    """The partition with kernels joined where nothing else needs what passes between them.

    `longest`: the most elements that a row between two chained products may have.
    """
    return _Joiner(graph, found, longest).run(joins)


class _Joiner:
    def __init__(self, graph: Graph, found: Partition, longest: int | None) -> None:
        self.graph, self.longest = graph, longest
        self.groups = list(found.groups)
        self.decisions = list(found.decisions)
        self.maker = {root: g for g in self.groups for root in g.roots}

    def run(self, joins: Sequence[str]) -> Partition:
        rules = {
            "placed": self._placed, "chained": self._chained, "packed": self._packed,
            "direct": self._direct, "halved": self._halved, "thin": self._thin,
            "attended": self._attended,
        }  # fmt: skip
        for joined in (rules[name] for name in joins):
            for group in list(self.groups):
                if group in self.groups:
                    joined(group)
        return Partition(self.groups, self.decisions)

    # What the joins share

    def _readers(self, ref: Ref) -> list[Group]:
        """The kernels that read a stored result; members compute their operands' positions."""
        return [
            g
            for g in self.groups
            if self.maker.get(ref) is not g
            and ref not in g.packs
            and ref in g.reads(self.graph)
        ]

    def _private(self, group: Group, reader: Group) -> bool:
        """Whether one kernel alone reads the only result of another, at the same steps."""
        (ref, *others) = group.roots
        if others or ref in self.graph.results or group.nest != reader.nest:
            return False
        return self._readers(ref) == [reader]

    def _replace(self, old: Sequence[Group], new: Group) -> None:
        """Puts a kernel in the place of the last of several."""
        place = max(self.groups.index(g) for g in old)
        self.groups[place] = new
        self.groups = [g for g in self.groups if g not in old]
        for root in new.roots:
            self.maker[root] = new

    def _say(self, ref: Ref, reason: str) -> None:
        self.decisions = [d for d in self.decisions if d.node != ref.node]
        self.decisions.append(Decision(ref.node, True, reason))

    # The joins

    def _placed(self, copy: Group) -> None:
        (ref, *others) = copy.roots
        node = self.graph.nodes[ref.node]
        if others or copy.members != {ref.node} or not isinstance(node.primitive, View):
            return
        source = node.operands[0]
        product = self.maker.get(source)
        if product is None or product.kind != "contract" or not self._private(product, copy):
            return
        domain = self.graph.type(source).shape
        if domain != product.domain or node.primitive.guard:
            return
        at = inverse(node.primitive, node.type.shape, domain, self.graph.facts)
        if at is None:
            return
        joined = replace(
            product,
            roots=[ref],
            members=product.members | {ref.node},
            placed={ref: (source, at)},
        )
        self._replace([product, copy], joined)
        self._say(source, "each element is stored where its user wants it")

    def _between(self, last: Group) -> tuple[Group, Group] | None:
        """The product and the row reductions of it whose rows a product multiplies."""
        if last.kind != "contract" or last.anchor is None:
            return None
        anchor = self.graph.nodes[last.anchor]
        middle = self.maker.get(anchor.operands[0])
        if middle is None or middle.kind != "row" or not self._private(middle, last):
            return None
        if anchor.operands[1] in middle.roots or not self._is_rows_of(middle, anchor):
            return None
        first = next((g for g in self.groups if self._scores(g, middle)), None)
        return None if first is None else (first, middle)

    def _chained(self, last: Group) -> None:
        found = self._between(last)
        if found is None:
            return
        first, middle = found
        most = self.graph.facts.bounds(middle.domain[-1])[1]
        if self.longest is not None and (most is None or most > self.longest):
            return
        rows = _rows_between(first, middle)
        members = rows.members | last.members
        chain = replace(last, kind="chain", members=members, rows=rows)
        self._replace([first, middle, last], chain)
        self._say(first.roots[0], "its rows stay in scratch between two products")
        self._say(middle.roots[0], "its rows stay in scratch between two products")

    def _attended(self, last: Group) -> None:
        found = self._between(last)
        if found is None:
            return
        first, middle = found
        (root,), (scores,) = middle.roots, first.roots
        softmax = find_softmax(self.graph, root, scores, middle.members)
        nodes = [self.graph.nodes[g.anchor or 0] for g in (first, last)]
        if softmax is None or not is_narrow(*nodes):
            return
        masks = [g for g in self.groups if self._is_mask(g, middle)]
        packs = self._halves_of(*nodes) or self._lying(*nodes)
        rows = _rows_between(first, middle)
        rows.members.update(*(g.members for g in masks))
        members = rows.members.union(last.members, *(g.members for g in packs.values()))
        joined = replace(
            last, kind="attention", members=members, rows=rows, packs=packs, softmax=softmax
        )
        unused = [g for g in packs.values() if self._private_to(g, {id(first), id(last)})]
        self._replace([first, middle, last, *masks, *unused], joined)
        for ref in (scores, root):
            self._say(ref, "its rows are summed as they come, and never stored")
        for group in masks:
            self._say(group.roots[0], "it is computed where scores are masked")

    def _is_mask(self, group: Group, middle: Group) -> bool:
        """Whether a kernel makes no more than a cheap mask for row reductions."""
        if group.kind != "pointwise" or not self._private(group, middle) or group.placed:
            return False
        work = sum(flops(self.graph.nodes[m]) for m in group.members)
        return is_cheap(self.graph, group.members, work)

    def _private_to(self, group: Group, readers: set[int]) -> bool:
        """Whether only some kernels read the only result of another."""
        (ref, *others) = group.roots
        if others or ref in self.graph.results:
            return False
        return {id(g) for g in self._readers(ref)} <= readers

    def _lying(self, *products: Node) -> dict[Ref, Group]:
        """The panels of products that are elements of a tensor in steps, with who packs them."""
        found: dict[Ref, Group] = {}
        for node in products:
            panels = node.operands[1]
            packer = self.maker.get(panels)
            if packer is None or packer.members != {panels.node} or packer.placed:
                continue
            if steps_of(self.graph, panels, node) is not None:
                found[panels] = packer
        return found

    def _halves_of(self, *products: Node) -> dict[Ref, Group]:
        """The operands of the products of attention, if all are converted from one 16-bit dtype,
        with who converts them."""
        first, last = products
        found: dict[Ref, Group] = {}
        dtypes = set()
        for ref, node in ((first.operands[0], None), *((p.operands[1], p) for p in products)):
            source = ref if node is None else self._viewed(ref)
            half, maker = self._halves(source), self.maker.get(ref)
            if half is None or maker is None or maker.members != {ref.node, source.node}:
                return {}
            if node is not None and steps_of(self.graph, ref, node) is None:
                return {}
            dtypes.add(self.graph.type(half).dtype)
            found[ref] = maker
        return found if len(dtypes) == 1 else {}

    def _is_rows_of(self, middle: Group, anchor: Node) -> bool:
        """Whether a product's matrix is the dense result of row reductions along its depth."""
        product, type = anchor.primitive, self.graph.type(anchor.operands[0])
        assert isinstance(product, Contract)
        rank = type.rank
        lead = [a for a in range(rank - 1) if type.shape[a].as_int() != 1]
        axes = _longer(anchor, (*product.batch, *product.rows))
        if middle.row_axes != (rank - 1,) or axes != lead:
            return False
        if middle.domain != type.shape or type.dtype.bits < 32:
            return False
        count = const(1)
        for a in product.rows:
            count = count * anchor.type.shape[a]
        places = [
            const(0) if anchor.type.shape[a].as_int() == 1 else sym(f"i{a}") for a in product.batch
        ]
        sizes = tuple(anchor.type.shape[a] for a in product.batch)
        base = flatten_index(places, sizes) * count * product.depth
        same = self.graph.facts.prove_eq
        return (
            [anchor.type.shape[a] for a in axes] == [type.shape[a] for a in lead]
            and same(type.shape[-1], product.depth)
            and same(product.row_stride, product.depth)
            and same(product.base, base)
        )

    def _scores(self, first: Group, middle: Group) -> bool:
        """Whether a product computes the rows that row reductions read, and nothing else does."""
        if first.kind != "contract" or first.anchor is None or first.domain != middle.domain:
            return False
        if not self._private(first, middle):
            return False
        anchor = self.graph.nodes[first.anchor]
        product = anchor.primitive
        assert isinstance(product, Contract)
        last = len(first.domain) - 1
        axes = _longer(anchor, (*product.batch, *product.rows))
        whole = _longer(anchor, range(last))
        if axes != whole or product.columns != (last,) or anchor.type.shape != first.domain:
            return False
        reads = middle.accesses.get(first.roots[0].node, [])
        return bool(reads) and all(_along_row(a, first.domain) for a in reads)

    def _packed(self, group: Group) -> None:
        anchors = [] if group.anchor is None else [group.anchor]
        if group.kind == "chain" and group.rows is not None and group.rows.anchor is not None:
            anchors.append(group.rows.anchor)
        if group.kind not in ("contract", "chain"):
            return
        for anchor in anchors:
            panels = self.graph.nodes[anchor].operands[1]
            packer = self.maker.get(panels)
            if packer is None or not self._packs_well(packer, panels, anchor, group):
                continue
            joined = replace(
                group,
                members=group.members | packer.members,
                packs={**group.packs, panels: packer},
            )
            self._replace([packer, group], joined)
            self._say(panels, "its panels are packed where they are used")
            group = joined

    def _thin(self, group: Group) -> None:
        """A product that may have few rows gets another kernel for them, which packs nothing."""
        if group.kind != "contract" or group.anchor is None or group.packs:
            return
        node = self.graph.nodes[group.anchor]
        panels, product = node.operands[1], node.primitive
        packer, windows = self.maker.get(panels), windows_of(self.graph, group.anchor)
        if packer is None or windows is None or not self._private(packer, group):
            return
        assert isinstance(product, Contract)
        same = self.graph.type(windows.source).dtype == node.type.dtype
        if packer.members != {panels.node} or not same:
            return
        if step_in_place(self.graph, windows) is None:
            return
        rows = _count([node.type.shape[a] for a in product.rows])
        least, _ = self.graph.facts.bounds(rows)
        if least is not None and least > THIN:
            return
        few = minimum(maximum(THIN + 1 - rows, 0), 1)
        thin = replace(
            group, members=group.members | packer.members, packs={panels: packer}, when=few
        )
        many = [replace(g, when=1 - few) for g in (packer, group)]
        place = self.groups.index(group)
        self.groups[place : place + 1] = [many[1], thin]
        self.groups[self.groups.index(packer)] = many[0]
        self.maker[panels] = many[0]
        self.maker.update((root, many[1]) for root in group.roots)
        self._say(panels, f"its panels are packed, but for up to {THIN} rows")

    def _direct(self, group: Group) -> None:
        """Panels that are elements of a tensor in steps need not be packed at all."""
        if group.kind not in ("contract", "chain"):
            return
        rows = group.rows.anchor if group.rows is not None else None
        for anchor in (group.anchor, rows):
            panels = None if anchor is None else self.graph.nodes[anchor].operands[1]
            packer = None if panels is None else self.maker.get(panels)
            if panels is None or packer is None or not self._private(packer, group):
                continue
            if packer.members != {panels.node} or packer.placed:
                continue
            if steps_of(self.graph, panels, self.graph.nodes[anchor or 0]) is None:
                continue
            joined = replace(
                group,
                members=group.members | packer.members,
                packs={**group.packs, panels: packer},
            )
            self._replace([packer, group], joined)
            self._say(panels, "its panels are read where they lie")
            group = joined

    def _halved(self, group: Group) -> None:
        """A product whose operands are both converted from one 16-bit dtype takes them as they
        are, if 16 bytes of either are adjacent and aligned."""
        if group.kind != "contract" or group.anchor is None or group.packs:
            return
        node = self.graph.nodes[group.anchor]
        left, panels = node.operands
        made = [self.maker.get(ref) for ref in (left, panels)]
        sources = [self._halves(ref) for ref in (left, self._viewed(panels))]
        dtypes = {self.graph.type(ref).dtype for ref in sources if ref is not None}
        if None in sources or len(dtypes) != 1:
            return
        own = [{left.node}, {panels.node, self._viewed(panels).node}]
        if any(m is not None and m.nest != group.nest for m in made):
            return
        steps = steps_of(self.graph, panels, node)
        if steps is None or not self._is_aligned(node, steps):
            return
        if made[1] is None or made[1].members != own[1]:
            return
        if made[0] is not None and made[0].members != own[0]:
            made[0] = self._unconverted(made[0], left, group)
        if made[0] is None or made[0].members != own[0]:
            return
        makers = [m for m in made if m is not None]
        joined = replace(
            group,
            members=group.members.union(*(m.members for m in makers)),
            packs=dict(zip((left, panels), makers, strict=True)),
        )
        unused = [m for m in makers if m in self.groups and self._private(m, group)]
        self._replace([*unused, group], joined)
        for ref in (left, panels):
            self._say(ref, "its elements are multiplied as they are stored")

    def _unconverted(self, maker: Group, ref: Ref, reader: Group) -> Group | None:
        """The kernel that would convert what another one makes: that one then stores it as it is
        before. None if others read what is converted."""
        (source,) = self.graph.nodes[ref.node].operands
        if ref in self.graph.results or self._readers(ref) != [reader]:
            return None
        if source.node not in maker.members or maker.placed or maker.kind == "update":
            return None
        used = any(ref in self.graph.nodes[m].operands for m in maker.members)
        roots = [source if r == ref else r for r in maker.roots]
        stored = replace(
            maker,
            roots=list(dict.fromkeys(roots)),
            members=maker.members if used else maker.members - {ref.node},
        )
        self._replace([maker], stored)
        del self.maker[ref]
        return Group("pointwise", [ref], maker.domain, {ref.node}, nest=maker.nest)

    def _viewed(self, panels: Ref) -> Ref:
        """What panels are packed from."""
        node = self.graph.nodes[panels.node]
        return node.operands[0] if isinstance(node.primitive, View) else panels

    def _halves(self, ref: Ref) -> Ref | None:
        """The f16 or bf16 tensor that a value is converted from."""
        node = self.graph.nodes[ref.node]
        if node.primitive != Map("cast"):
            return None
        source = node.operands[0]
        return source if self.graph.type(source).dtype in (F16, BF16) else None

    def _is_aligned(self, product: Node, steps: tuple[Expr, Expr, Expr]) -> bool:
        contract = product.primitive
        assert isinstance(contract, Contract)
        first, along, across = steps
        one = {along, across} & {const(1)}
        columns = _count([product.type.shape[a] for a in contract.columns])
        ends = [contract.base, contract.row_stride, first, across if along == const(1) else along]
        if along != const(1):
            ends.append(columns)
        return bool(one) and all(self.graph.facts.divides(e, 8) for e in ends)

    def _packs_well(self, packer: Group, panels: Ref, anchor: int, reader: Group) -> bool:
        if packer.kind != "pointwise" or not self._private(packer, reader):
            return False
        node = self.graph.nodes[anchor]
        product = node.primitive
        assert isinstance(product, Contract)
        facts = self.graph.facts
        if reader.kind == "contract":
            if self._holds_codes(packer):
                return True
            windows = windows_of(self.graph, anchor)
            if windows is not None and is_worth_it(self.graph, anchor, windows):
                return True
            return (
                bool(product.batch)
                or self._few_rows(product, node)
                or (self._expands(packer, panels))
            )
        size = product.depth * (product.panel * node.type.dtype.itemsize)
        most = facts.bounds(size * self.graph.type(panels).shape[-3])[1]
        return most is not None and most <= PACKED_BYTES

    def _holds_codes(self, packer: Group) -> bool:
        """Whether panels are computed of constants alone: then they were kept small."""
        nodes = (self.graph.nodes[ref.node] for ref in packer.loads(self.graph))
        return all(isinstance(node.primitive, Constant | Weight) for node in nodes)

    def _few_rows(self, product: Contract, node: Node) -> bool:
        """Whether panels would be packed only a few times."""
        rows = _count([node.type.shape[a] for a in product.rows])
        most = self.graph.facts.bounds(rows)[1]
        return most is not None and most <= FEW_ROWS

    def _expands(self, packer: Group, panels: Ref) -> bool:
        """Whether panels repeat the elements that they are packed from."""
        read = {
            ref
            for m in packer.members
            for ref in self.graph.nodes[m].operands
            if ref.node not in packer.members
        }
        total, source = _count(self.graph.type(panels).shape), const(0)
        for ref in read:
            source = source + _count(self.graph.type(ref).shape)
        return self.graph.facts.prove_le(source * 2, total)


def _longer(node: Node, axes: Sequence[int]) -> list[int]:
    """The axes of a result that are not of size 1."""
    return [a for a in axes if node.type.shape[a].as_int() != 1]


def _rows_between(first: Group, middle: Group) -> Group:
    """The row kernel between two products, with what the first product is of."""
    return replace(
        middle,
        members=first.members | middle.members,
        accesses={**first.accesses, **middle.accesses},
        anchor=first.anchor,
        placed={},
    )


def steps_of(graph: Graph, panels: Ref, product: Node) -> tuple[Expr, Expr, Expr] | None:
    """Where a view that packs panels finds its elements in its operand, over the view's own
    symbols of the batch: the first one, and the steps along the depth and along the columns;
    None if they do not lie in steps."""
    node = graph.nodes[panels.node]
    view = node.primitive
    contract = product.primitive
    if not isinstance(view, View) or not isinstance(contract, Contract):
        return None
    panel, k, column = view.symbols[-3:]
    width = node.type.shape[-1]
    columns = _count([product.type.shape[a] for a in contract.columns])
    single = node.type.shape[-3].as_int() == 1
    place = sym(column) if single else sym(panel) * width + sym(column)
    if any(guard != columns - 1 - place for guard in view.guard):
        return None  # it pads by more than the panels' tail
    offset = flatten_index(view.indices, graph.type(node.operands[0]).shape)
    along, across = offset.coefficient(k), offset.coefficient(column)
    step = const(0) if single else offset.coefficient(panel)
    if along is None or across is None or step is None:
        return None
    if not single and step != across * width:
        return None
    inner = {panel, k, column}
    first = offset.substitute({name: 0 for name in inner})
    if (first.symbols() | along.symbols() | across.symbols()) & inner:
        return None
    return first, along, across


def _along_row(access: Access, domain: Sequence[Expr]) -> bool:
    """Whether an access reads the kernel's own row: each axis in step, the last one anywhere."""
    if access is None:
        return False
    last = len(domain) - 1
    *lead, column = access
    own = all(
        e == sym(f"d{n}") or (e == const(0) and domain[n].as_int() == 1) for n, e in enumerate(lead)
    )
    return own and column in (sym(f"d{last}"), sym(f"f{last}"))


def _count(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total
