"""Joins kernels around matrix products, so that what lies between two kernels stays in scratch.

Joins, tried in this order on the kernels that `fuse` found:

- *placed*: a kernel that only copies a product's result into another order disappears; the
  product stores its elements where the copy would have put them.
- *attended*: with softmax between them, no row of scores is ever whole: sums over ranges of keys
  are corrected as greater scores come. For GPUs.
- *chained*: a product whose rows go through row reductions into another product (attention)
  computes a block of rows from end to end.
- what `join_decoded` does, for attention whose keys and values another kernel only converts.
- what `join_operands`, `join_narrow` and `join_chosen` do, for products whose operands other
  kernels only prepare, and `join_reduced` and `join_pooled`, for those whose rows are only reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.compiler.graph import Contract, Graph, Node, Ref, View, flatten_index
from stagefuse.compiler.patterns.attention import find_softmax, is_cheap, is_narrow
from stagefuse.compiler.patterns.steps import steps_of
from stagefuse.dsl.dims import const, sym

from .groups import Group, Partition, flops
from .inverse import inverse
from .join_decoded import DecodedJoiner
from .join_pooled import PooledJoiner
from .join_reduced import along_row, rows_between


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


class _Joiner(DecodedJoiner, PooledJoiner):
    def run(self, joins: Sequence[str]) -> Partition:
        rules = {
            "placed": self._placed, "chained": self._chained, "packed": self._packed,
            "gathered": self._gathered, "turned": self._turned,
            "direct": self._direct, "halved": self._halved, "thin": self._thin,
            "attended": self._attended, "decoded": self._decoded, "coded": self._coded,
            "chosen": self._chosen, "reduced": self._reduced, "finished": self._finished,
            "pooled": self._pooled,
        }  # fmt: skip
        self.halves = "halved" in joins
        for joined in (rules[name] for name in joins):
            for group in list(self.groups):
                if group in self.groups.present:
                    joined(group)
        return Partition(list(self.groups), list(self.decisions.values()))

    # The joins

    def _placed(self, copy: Group) -> None:
        (ref, *others) = copy.roots
        node = self.graph.nodes[ref.node]
        if others or copy.members != {ref.node} or not isinstance(node.primitive, View):
            return
        users = self.users.get(ref, frozenset())
        takes = (self._takes_halves, self._takes_turned) if self.halves else ()
        if any(users and all(fits(user, ref) for user in users) for fits in takes):
            return  # those read what is copied where it lies
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
        first = next((g for g in self._read_by(middle) if self._scores(g, middle)), None)
        if first is None or not self._share_rows(self.graph.nodes[first.anchor or 0], anchor):
            return None
        return first, middle

    def _chained(self, last: Group) -> None:
        found = self._between(last)
        if found is None:
            return
        first, middle = found
        most = self.graph.facts.bounds(middle.domain[-1])[1]
        if self.longest is not None and (most is None or most > self.longest):
            return
        rows = rows_between(first, middle)
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
        score, mix = (self.graph.nodes[g.anchor or 0] for g in (first, last))
        halves = self._halves_of(score, mix, first)
        rounds = self.graph.type(halves[score.operands[0]]).dtype if halves else None
        softmax = find_softmax(self.graph, root, scores, middle.members, rounds)
        if softmax is None or not is_narrow(score, mix):
            return
        masks = [g for g in self._read_by(middle) if self._is_mask(g, middle)]
        packs = self._taken_as_stored(halves, first) or self._lying(score, mix)
        rows = rows_between(first, middle)
        rows.members.update(*(g.members for g in masks))
        members = rows.members.union(last.members, *(g.members for g in packs.values()))
        joined = replace(
            last, kind="attention", members=members, rows=rows, packs=packs, softmax=softmax
        )
        makers = [g for ref in packs if (g := self.maker.get(ref)) in self.groups.present]
        unused = [g for g in makers if self._private_to(g, {id(first), id(last)})]
        self._replace([first, middle, last, *masks, *unused], joined)
        self._drop_unread(*map(self._viewed, halves))
        for ref in (scores, root):
            self._say(ref, "its rows are summed as they come, and never stored")
        for group in masks:
            self._say(group.roots[0], "it is computed where scores are masked")

    def _read_by(self, group: Group) -> list[Group]:
        """The kernels whose results a kernel reads, in order."""
        made = (self.maker.get(ref) for ref in sorted(group.loads(self.graph)))
        return list(dict.fromkeys(g for g in made if g in self.groups.present))

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
        return all(id(g) in readers for g in self._readers(ref))

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

    def _halves_of(self, score: Node, mix: Node, first: Group) -> dict[Ref, Ref]:
        """The operands of the products of attention, of which `first` makes the scores, with what
        they are converted from, if that is of one 16-bit dtype and may be read."""
        found: dict[Ref, Ref] = {}
        for ref, node in ((score.operands[0], None), *((p.operands[1], p) for p in (score, mix))):
            source = self._viewed(ref) if node else ref
            half, reader = self._halves(source), self.maker.get(ref) if node else first
            if half is None or reader is None or not self._may_store(half, source, reader):
                return {}
            if node is not None and steps_of(self.graph, ref, node) is None:
                return {}
            found[ref] = half
        return found if len({self.graph.type(half).dtype for half in found.values()}) == 1 else {}

    def _taken_as_stored(self, halves: dict[Ref, Ref], first: Group) -> dict[Ref, Group]:
        """Who would convert the operands of attention: what they convert is in memory from now."""
        found: dict[Ref, Group] = {}
        for ref, half in halves.items():
            converts = half in self.graph.nodes[ref.node].operands
            source, reader = (ref, first) if converts else (self._viewed(ref), self.maker[ref])
            found[ref] = self._part(ref, None if converts else half)
            self._stored(half, source, reader)
        return found

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

    def _share_rows(self, *products: Node) -> bool:
        """Whether two products have the same axes as rows: queries of several heads are rows of one
        matrix where the heads share their keys, but not where each has values of its own."""
        rows = []
        for node in products:
            assert isinstance(node.primitive, Contract)
            rows.append(_longer(node, node.primitive.rows))
        return rows[0] == rows[1]

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
        if not anchor.type.dtype.is_float:
            return False
        reads = middle.accesses.get(first.roots[0].node, [])
        return bool(reads) and all(along_row(a, first.domain) for a in reads)


def _longer(node: Node, axes: Sequence[int]) -> list[int]:
    """The axes of a result that are not of size 1."""
    return [a for a in axes if node.type.shape[a].as_int() != 1]
