"""Index maps as ONNX ops: slices, transpositions, reshapes, pads; in general, gathers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from stagefuse.compiler.graph import flatten_index
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import BOOL, I64
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .layout import Labels, Layout
from .model import Model, Tensor
from .sizes import Sizes, broadcast

Shape: TypeAlias = Sequence[Expr]
BACKWARD_END = -(1 << 63)
"""The end of a slice that runs backwards through element 0."""


@frozen
class Lookup:
    """An index that is read from a tensor: `symbols` are those it depends on, in order.

    `build` gives the positions over those symbols' axes.
    """

    symbols: tuple[str, ...]
    build: Callable[[], Tensor]


@frozen
class Access:
    """result[symbols] = x[indices], `fill` where a guard is negative; x is of shape `own`."""

    own: tuple[Expr, ...]
    symbols: tuple[str, ...]
    shape: tuple[Expr, ...]
    indices: tuple[Expr | Lookup, ...]
    guard: tuple[Expr, ...] = ()
    fill: Any = 0


class Views:
    """Writes accesses."""

    def __init__(self, model: Model, sizes: Sizes, layout: Layout) -> None:
        self.model, self.sizes, self.layout = model, sizes, layout

    def write(self, x: Tensor, access: Access) -> Tensor:
        """The access of a stored tensor, itself stored with what repeats left small."""
        facts = self.sizes.facts.at_element(access.symbols, access.shape)
        if access.guard:
            padded = self._padded(x, access, facts)
            return self._guarded(x, access, facts) if padded is None else padded
        lead = len(access.own) - x.rank
        indices = [
            const(0) if stored.as_int() == 1 else index
            for stored, index in zip(x.shape, access.indices[lead:], strict=True)
        ]
        if self.is_reshape(access):
            if not self._is_plain(indices, access):
                return self.layout.reshaped(self.layout.whole(x, access.own), access.shape)
        return self._accessed(x, indices, access, facts)

    def _is_plain(self, indices: Sequence[Expr | Lookup], access: Access) -> bool:
        """Whether every index is one symbol, or 0."""
        texts = [str(i) for i in indices if isinstance(i, Expr) and i.terms]
        plain = all(t in access.symbols for t in texts) and len(set(texts)) == len(texts)
        return plain and all(isinstance(i, Expr) for i in indices)

    def is_reshape(self, access: Access) -> bool:
        """Whether an access keeps all elements in their order."""
        facts = self.sizes.facts.at_element(access.symbols, access.shape)
        if any(isinstance(i, Lookup) for i in access.indices):
            return False
        at = [const(0) if d.as_int() == 1 else sym(n)
              for n, d in zip(access.symbols, access.shape, strict=True)]  # fmt: skip
        indices = [i for i in access.indices if isinstance(i, Expr)]
        used = frozenset[str]().union(*(i.symbols() for i in indices))
        if any(a.terms and str(a) not in used for a in at):
            return False
        wanted = flatten_index(at, access.shape)
        if not facts.prove_eq(flatten_index(indices, access.own), wanted):
            return False
        count, own = const(1), const(1)
        for size in access.shape:
            count = count * size
        for size in access.own:
            own = own * size
        return self.sizes.facts.prove_eq(count, own)

    # Where every axis has indices of its own

    def _accessed(
        self, x: Tensor, indices: Sequence[Expr | Lookup], access: Access, facts: Facts
    ) -> Tensor:
        owners: dict[str, int] = {}
        shared = False
        for axis, index in enumerate(indices):
            for name in self._symbols(index, access):
                shared |= owners.setdefault(name, axis) != axis
        if shared:
            return self._by_elements(x, indices, access, facts)
        labels: Labels = []
        for index in indices:
            x, found = self._along(x, len(labels), index, access, facts)
            labels += found
        return self.layout.placed(x, labels, len(access.shape))

    def _symbols(self, index: Expr | Lookup, access: Access) -> list[str]:
        """The symbols of an index, in the order of the result's axes."""
        used = index.symbols() if isinstance(index, Expr) else index.symbols
        return [name for name in access.symbols if name in used]

    def _along(
        self, x: Tensor, axis: int, index: Expr | Lookup, access: Access, facts: Facts
    ) -> tuple[Tensor, Labels]:
        """One axis indexed; the labels of the axes that stand there then."""
        names, size = self._symbols(index, access), x.shape[axis]
        places: Labels = [access.symbols.index(n) for n in names]
        if isinstance(index, Expr):
            if not names:
                return self._picked(x, axis, index)
            sliced = self._sliced(x, axis, index, names, access)
            if sliced is not None:
                return sliced, places
            split = self._split(index, names, access, size)
            if split is not None:
                sizes = [access.shape[p] for p in split if p is not None]
                shape = (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
                return self.layout.reshaped(x, shape), split
        positions = self._positions(index, names, access, facts)
        if len(names) < positions.rank:  # a size has rank 1
            positions = self.model.node("Squeeze", [positions, self.model.constant([0])], I64, ())
        sizes = [access.shape[p] for p in places if p is not None]
        shape = (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        positions = self.layout.whole(positions, sizes)
        return self.model.node("Gather", [x, positions], x.dtype, shape, axis=axis), places

    def _picked(self, x: Tensor, axis: int, index: Expr) -> tuple[Tensor, Labels]:
        """One position of an axis: as an axis of size 1 where it is that, else without it."""
        if x.shape[axis].as_int() == 1:
            return x, [None]
        last = (x.shape[axis] - 1 - index).as_int()
        at = (
            self.model.constant(-1 - last)
            if last is not None and index.as_int() is None
            else (self.sizes.scalar(index))
        )
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        return self.model.node("Gather", [x, at], x.dtype, shape, axis=axis), []

    def _sliced(
        self, x: Tensor, axis: int, index: Expr, names: list[str], access: Access
    ) -> Tensor | None:
        """A slice, where the index is start + step * symbol."""
        if len(names) != 1:
            return None
        slope = index.coefficient(names[0])
        step = None if slope is None else slope.as_int()
        if not step:
            return None
        start, extent = (
            index.substitute({names[0]: 0}),
            access.shape[access.symbols.index(names[0])],
        )
        if not start.terms and step == 1 and extent == x.shape[axis]:
            return x
        end = start + extent if step == 1 else start + step * (extent - 1) + (1 if step > 0 else -1)
        if step < 0:
            if end.as_int() is None and not self.sizes.facts.is_nonneg(end):
                return None
            if end.as_int() is not None and not self.sizes.facts.is_nonneg(end):
                end = const(BACKWARD_END)
        elif not self.sizes.facts.is_positive(extent) and step != 1:
            end = start + step * extent  # of nothing, nothing
        given = [start, end, const(axis), const(step)]
        ends = [self.sizes.vector([e]) for e in (given if step != 1 else given[:3])]
        shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
        return self.model.node("Slice", [x, *ends], x.dtype, shape)

    def _split(self, index: Expr, names: list[str], access: Access, size: Expr) -> Labels | None:
        """The result's axes into which one is cut: a*n + b with b < n, and nothing left over."""
        scales = []
        for name in names:
            scale = index.coefficient(name)
            if scale is None or index.substitute(dict.fromkeys(names, 0)).terms:
                return None
            scales.append((scale, access.symbols.index(name)))
        order: list[int] = []
        rest = const(1)
        while scales:
            found = next((s for s in scales if s[0] == rest), None)
            if found is None:
                return None
            scales.remove(found)
            order.insert(0, found[1])
            rest = rest * access.shape[found[1]]
        return list(order) if rest == size else None

    # In general

    def _positions(
        self, index: Expr | Lookup, names: Sequence[str], access: Access, facts: Facts
    ) -> Tensor:
        """An index over the axes of some symbols, with what repeats left small."""
        if isinstance(index, Expr):
            return self.sizes.value(index, self._lines(names, access), facts)
        found = index.build()
        if list(names) == list(index.symbols):
            return found
        whole = self.layout.whole(
            found, [access.shape[access.symbols.index(n)] for n in index.symbols]
        )
        return self.layout.placed(whole, [list(names).index(n) for n in index.symbols], len(names))

    def _lines(self, names: Sequence[str], access: Access) -> dict[str, Tensor]:
        """Each symbol as its positions along its own axis, of as many axes as there are names."""
        found = {}
        for place, name in enumerate(names):
            extent = access.shape[access.symbols.index(name)]
            found[name] = self.sizes.positions(extent, len(names) - place - 1)
        return found

    def _by_elements(
        self, x: Tensor, indices: Sequence[Expr | Lookup], access: Access, facts: Facts
    ) -> Tensor:
        """GatherND over the axes whose indices share symbols; the rest are moved behind them."""
        uses: dict[str, int] = {}
        for index in indices:
            for name in self._symbols(index, access):
                uses[name] = uses.get(name, 0) + 1
        front = [
            n
            for n, i in enumerate(indices)
            if not (isinstance(i, Expr) and str(i) in uses and uses[str(i)] == 1)
            and not (isinstance(i, Expr) and not i.terms and x.shape[n].as_int() == 1)
        ]
        back = [n for n in range(x.rank) if n not in front]
        x = self.layout.transposed(x, [*front, *back])
        names = [n for n in access.symbols
                 if any(n in self._symbols(indices[axis], access) for axis in front)]  # fmt: skip
        sizes = [access.shape[access.symbols.index(n)] for n in names]
        at = self._places([indices[axis] for axis in front], names, sizes, access, facts)
        shape = (*sizes, *(x.shape[n] for n in range(len(front), x.rank)))
        found = self.model.node("GatherND", [x, at], x.dtype, shape)
        labels: Labels = [access.symbols.index(n) for n in names]
        rest: Labels = []
        for place, axis in enumerate(back, len(sizes)):
            index = indices[axis]
            assert isinstance(index, Expr)
            found, made = self._along(found, place, index, access, facts)
            rest += made
        return self.layout.placed(found, labels + rest, len(access.shape))

    def _places(
        self, indices: Sequence[Expr | Lookup], names: Sequence[str], sizes: Shape, access: Access,
        facts: Facts,
    ) -> Tensor:
        """Indices side by side, for every place of some symbols: i64 [*sizes, indices]."""
        parts = []
        for index in indices:
            found = self._positions(index, names, access, facts)
            if found.rank <= len(sizes):  # a size has rank 1
                found = self.layout.unsqueezed(self.layout.whole(found, sizes), [len(sizes)])
            parts.append(found)
        if all(p.known is not None for p in parts):
            return self.model.constant(np.concatenate([p.known for p in parts], -1))
        shape = (*sizes, const(len(parts)))
        return self.model.node("Concat", parts, I64, shape, axis=len(sizes))

    def update(self, base: Tensor, value: Tensor, access: Access) -> Tensor:
        """The base, of shape `own`, with elements of a value of shape `shape` at the indices."""
        facts = self.sizes.facts.at_element(access.symbols, access.shape)
        names, indices = list(access.symbols), list(access.indices)
        base, value = (self.layout.whole(x, s)
                       for x, s in ((base, access.own), (value, access.shape)))  # fmt: skip
        while (names and indices and indices[-1] == sym(names[-1])
               and access.shape[len(names) - 1] == access.own[len(indices) - 1]):  # fmt: skip
            names.pop(), indices.pop()  # whole rows
        if not indices:
            return self.layout.reshaped(value, access.own)
        at = self._places(indices, names, access.shape[: len(names)], access, facts)
        return self.model.node("ScatterND", [base, at, value], base.dtype, access.own)

    # Guards

    def _padded(self, x: Tensor, access: Access, facts: Facts) -> Tensor | None:
        """A Pad, where each index is its own axis' symbol less what stands before."""
        if len(access.own) != len(access.shape):
            return None
        before: list[Expr] = []
        for index, size, name in zip(access.indices, access.shape, access.symbols, strict=True):
            if not isinstance(index, Expr):
                return None
            at = const(0) if size.as_int() == 1 and name not in index.symbols() else sym(name)
            before.append(at - index)
            if before[-1].symbols() & set(access.symbols):
                return None
        inside = set()
        for index, extent in zip(access.indices, access.own, strict=True):
            assert isinstance(index, Expr)
            inside |= {index, extent - 1 - index}
        after = [n - d - b for n, d, b in zip(access.shape, access.own, before, strict=True)]
        if not set(access.guard) <= inside:
            return None
        if any(not facts.is_nonneg(e) for e in inside if e not in access.guard):
            return None
        if not all(self.sizes.facts.is_nonneg(w) for w in (*before, *after)):
            return None
        x = self.layout.whole(x, access.own)
        fill = self.model.constant(access.fill, x.dtype)
        widths = self.sizes.vector([*before, *after])
        return self.model.node("Pad", [x, widths, fill], x.dtype, access.shape)

    def _guarded(self, x: Tensor, access: Access, facts: Facts) -> Tensor:
        """Positions kept within the operand, then a choice between what is there and `fill`."""
        inside: Tensor | None = None
        lines = self._lines(access.symbols, access)
        for guard in access.guard:
            found = self.sizes.is_inside(guard, lines, facts)
            if inside is None:
                inside = found
            else:
                shape = broadcast(inside.shape, found.shape)
                inside = self.model.node("And", [inside, found], BOOL, shape)
        assert inside is not None
        kept = tuple(self._kept(i, n, access, facts)
                     for i, n in zip(access.indices, access.own, strict=True))  # fmt: skip
        plain = Access(access.own, access.symbols, access.shape, kept)
        lead = len(access.own) - x.rank
        indices = [const(0) if d.as_int() == 1 else i
                   for d, i in zip(x.shape, plain.indices[lead:], strict=True)]  # fmt: skip
        there = self._accessed(x, indices, plain, facts)
        fill = self.model.constant(access.fill, x.dtype)
        shape = broadcast(inside.shape, there.shape)
        return self.model.node("Where", [inside, there, fill], x.dtype, shape)

    def _kept(
        self, index: Expr | Lookup, extent: Expr, access: Access, facts: Facts
    ) -> Expr | Lookup:
        if not isinstance(index, Expr):
            return index
        if facts.is_nonneg(index) and facts.prove_lt(index, extent):
            return index
        names = tuple(self._symbols(index, access))

        def build() -> Tensor:
            found = self.sizes.value(index, self._lines(names, access), facts)
            found = self.sizes.apply("Max", found, self.model.constant([0]))
            return self.sizes.apply("Min", found, self.sizes.value(extent - 1, {}))

        return Lookup(names, build) if names else index
