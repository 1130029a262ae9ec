"""Products of few rows at the steps of a recurrence: sums that the lanes of a warp share.

A warp has a column, of each product that is read there: an LSTM's unit has a column of all four
gates. What is computed of the sums is then the same warp's, so that nothing of it is stored. The
columns are the same at all steps, and stay in the lanes' registers (`steady.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.compiler.fusion.groups import Access, Group, count_of
from stagefuse.compiler.gpu.draft import SourceLowering
from stagefuse.compiler.graph import Contract, Graph, Ref, split_index
from stagefuse.compiler.kernel_ir import Fold, Index, Local, Op, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import symbols_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, mod, sym
from stagefuse.dsl.dtypes import F32, F64

from .stage import Unfit

MOST_ROWS = 32
"""Rows of a product that are summed so. With 64, steps of an LSTM of 256 units took 13.0 us on an
H200, and 9.6 as launches of tensor cores' products; with 16 they took 4.4 and 12.6."""
DEEPEST = 512
"""Elements of a column. Twice as many, of four gates, do not fit registers beside the rows."""
PRODUCTS = ("contract", "chain", "attention")


class DotLowering(SourceLowering):
    """A kernel in which products are sums."""

    def _make(self, ref: Ref, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        product = self.graph.nodes[ref.node].primitive
        if ref.node in self.group.members and isinstance(product, Contract):
            if guard:
                raise Unfit("a step reads a product where it may have no element")
            return self._dot(ref, product, at)
        return super()._make(ref, at, guard)

    def _dot(self, ref: Ref, product: Contract, at: tuple[Value, ...]) -> Value:
        """An element of a product; each is summed once, where its row and column are known."""
        scope = self.scope_for(symbols_of(at))
        if (ref, at) not in scope.known:
            depth = self.scopes.index(scope)
            inside, self.scopes = self.scopes, self.scopes[: depth + 1]
            node, before = self.graph.nodes[ref.node], self.facts
            self.facts = before.with_ranges({"k": (0, product.depth - 1)})
            rows, columns = self._flat(ref, at, product.rows), self._flat(ref, at, product.columns)
            left, panels = node.operands[:2]
            place = product.base + rows * product.row_stride + sym("k")
            index = split_index(place, self.graph.type(left).shape, self.facts)
            packed = (floordiv(columns, product.panel), sym("k"), mod(columns, product.panel))
            with self.elsewhere():
                factors = (
                    self.value(left, tuple(map(Index, index)), ()),
                    self.value(panels, tuple(map(Index, packed)), ()),
                )
            self.facts = before
            name, dtype = self.name("r"), node.type.dtype.compute
            value = Op("mul", factors, dtype)
            self.emit(Fold(name, "sum", (("k", product.depth),), value, dtype))
            self.scopes = inside
            scope.known[(ref, at)] = Local(name, dtype)
        return scope.known[(ref, at)]

    def _flat(self, ref: Ref, at: tuple[Value, ...], axes: Sequence[int]) -> Expr:
        """The row or column that an element is in."""
        shape, total = self.graph.type(ref).shape, const(0)
        for axis in axes:
            index = at[axis]
            if not isinstance(index, Index):
                raise Unfit("a step reads a product at positions from data")
            total = total * shape[axis] + index.expr
        return total


def lower_dots(low: Lowering) -> Parallel:
    """A warp for each place along the last axis, with all rows."""
    domain = low.group.domain
    last = len(domain) - 1
    low.bind(parallel := [(f"d{last}", domain[last])])
    at = [const(0) if e.as_int() == 1 else sym(f"d{a}") for a, e in enumerate(domain)]
    rows = [x for x in low.axes(range(last)) if x[1].as_int() != 1] or [("row", const(1))]
    low.nest(rows, lambda: low.store(at))
    return parallel, count_of(domain[:last]) * max(1, low.cost())


def dotted(graph: Graph, groups: Sequence[Group]) -> tuple[list[Group], Expr] | None:
    """The kernels of a recurrence with products as sums, in those that read them where each element
    is read once; and the greatest number of rows. None if some products are of other kinds."""
    products = [g for g in groups if g.kind in PRODUCTS]
    if not all(g.kind == "contract" and _is_plain(graph, g) for g in products):
        return None
    rows, found = const(0), list(groups)
    for product in products:
        node = graph.nodes[_anchor(product)]
        contract = node.primitive
        assert isinstance(contract, Contract)
        many = count_of([node.type.shape[a] for a in contract.rows])
        rows = maximum(rows, many, graph.facts)
        inside = set(product.members)
        for pack in product.packs.values():
            inside |= pack.members
        readers = _readers(graph, product, found)
        if readers:
            found.remove(product)
            for reader in readers:
                at = found.index(reader)
                found[at] = replace(reader, kind="dots", members=reader.members | inside)
        else:
            at = found.index(product)
            found[at] = replace(product, kind="dots", members=inside, packs={})
    return found, rows


def _anchor(group: Group) -> int:
    assert group.anchor is not None
    return group.anchor


def _is_plain(graph: Graph, group: Group) -> bool:
    """Whether a product has no batch, numbers that are multiplied as they are, and columns that
    are short."""
    node = graph.nodes[_anchor(group)]
    contract = node.primitive
    assert isinstance(contract, Contract)
    left, panels = node.operands[:2]
    types = {graph.type(ref).dtype for ref in (left, panels)}
    packed = set(group.packs) <= {panels} and all(not g.packs for g in group.packs.values())
    source = graph.type(group.source(group.roots[0])).shape
    deepest = graph.facts.bounds(contract.depth)[1]
    if deepest is None or deepest > DEEPEST:
        return False
    return (
        not contract.batch and packed and types | {node.type.dtype} in ({F32}, {F64})
        and group.rows is None and source == group.domain and len(group.domain) > 0
    )  # fmt: skip


def _readers(graph: Graph, product: Group, groups: Sequence[Group]) -> list[Group]:
    """The kernels that may compute a product themselves: all that read it, each element once."""
    if len(product.roots) != 1 or product.placed or product.roots[0] in graph.results:
        return []
    (root,) = product.roots
    users = {n.id for n in graph.nodes.values() if root in n.operands}
    readers = [g for g in groups if g is not product and users & g.members]
    if not users <= set[int]().union(*(g.members for g in readers)):
        return []
    read = const(0)
    for group in readers:
        accesses: list[Access] = group.accesses.get(root.node, [])
        if group.kind not in ("pointwise", "dots") or group.nest != product.nest:
            return []
        if not group.domain or None in accesses:
            return []
        read = read + count_of(group.domain) * len(accesses)
    return readers if graph.facts.prove_le(read, count_of(graph.type(root).shape)) else []
