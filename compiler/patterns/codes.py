"""Constants that stay codes and scales: what products by quantised weights, and gathers, read.

Quantised weights are pointwise functions of stored tensors, such as scale * (code - zero). Seen
from an element of a product's panels, or of a table, each of these is an index map; a tensor that
one axis (the depth of the product, the last one of a table) finds only by k // G is stored once for
G of them, and integers in as many bits as they need. What is stored is chosen so that few bytes
are read and little is computed for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stagefuse.compiler.graph import Contract, Gather, Graph, Indirect, Map, Node, Ref, Scalar, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import evaluate_node
from stagefuse.compiler.recurrence import Nests
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import F32, I32, U8, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.types import TensorType

from .byte_operands import stored_for

Array = Any
Evaluate = Callable[[Ref], Array]
Maker = Callable[[Builder, Mapping[Ref, Ref]], Ref]
"""Makes a value in a new graph, given what stands there for values of the old one."""

LEAST, LEAST_IN_STEPS = 1 << 16, 1 << 20
"""Elements that are worth keeping as codes. What every step of a recurrence reads stays in a cache
in f32 too, unless it is large."""
MOST_BITS = 16
"""Bits stored for an element, and for the work to make it, above which it is unfolded while
compiling: half of f32."""
MOST_NARROW_BITS = 18
"""The same where rows of f32 are multiplied by tensors of 16 bits on GPUs, whose lanes convert."""
MAP_BITS = 0.8
"""Bits that a processor reads from memory in the time of a pointwise function of an element."""
SHARED = 8
"""Adjacent elements along the axis of groups for which what is the same is computed once."""
PLANES = {1: (1,), 2: (2,), 3: (4,), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,)}
"""Widths of the planes in which integers of so many bits are stored."""


def kept_codes(
    graph: Graph, known: set[int], evaluate: Evaluate, narrow: bool = False
) -> dict[Ref, Maker]:
    """Values that are worth computing of codes: panels of constants, and gathers from constants.

    `known` are the constant nodes, `evaluate` computes one of them; `narrow`: kernels convert what
    is stored in 16 bits.
    """
    uses, steps = graph.uses(), Nests(graph).depends
    found: dict[Ref, Maker | None] = {}
    for node in graph.nodes.values():
        if isinstance(node.primitive, Contract) and node.operands[1].node in known:
            panels = node.operands[1]
            readers = [graph.nodes[user] for user in uses[panels]]
            if panels not in found and all(_multiplies_by(r, panels) for r in readers):
                least = LEAST_IN_STEPS if steps.get(node.id) else LEAST
                wide = all(_is_f32(graph, reader.operands[0]) for reader in readers)
                most = MOST_NARROW_BITS if narrow and wide else MOST_BITS
                found[panels] = _panels(graph, node, evaluate, least, most)
        elif isinstance(node.primitive, Gather) and node.id not in known:
            if node.operands[0].node in known:
                found[Ref(node.id)] = _gathered(graph, node, evaluate)
    return {ref: maker for ref, maker in found.items() if maker is not None}


def _is_f32(graph: Graph, rows: Ref) -> bool:
    """Whether rows of a product are converted from nothing narrower."""
    return graph.type(stored_for(graph, rows)).dtype == F32


def _multiplies_by(reader: Node, panels: Ref) -> bool:
    return isinstance(reader.primitive, Contract) and reader.operands[0] != panels


def _panels(
    graph: Graph, product: Node, evaluate: Evaluate, least: int, most: int
) -> Maker | None:
    """What makes the panels of a product."""
    node = graph.nodes[product.operands[1].node]
    view, contract = node.primitive, product.primitive
    if not isinstance(view, View) or not isinstance(contract, Contract):
        return None
    columns = const(1)
    for axis in contract.columns:
        columns = columns * product.type.shape[axis]
    panel, _, column = view.symbols[-3:]
    first = const(0) if node.type.shape[-3].as_int() == 1 else sym(panel) * contract.panel
    if any(guard != columns - 1 - (first + sym(column)) for guard in view.guard):
        return None  # it pads by more than the columns after the last one, which nothing reads
    space = _Space(graph, evaluate, view.symbols, node.type.shape, -2, view.guard)
    kept = space.choose(node.operands[0], view.indices, least, most)
    if kept is None:
        return None

    def make(b: Builder, new: Mapping[Ref, Ref]) -> Ref:
        names, shape = b.symbols(node.type.rank), node.type.shape
        facts = b.ranges(names, shape)

        def read(array: Array, dtype: DType, group: int) -> Ref:
            def at(*i: Expr) -> list[Expr]:
                return [*i[:-2], floordiv(i[-2], group, facts), i[-1]]

            return b.view(b.constant(array, dtype), shape, at)

        return kept.make(Reader(b, names, shape, sym(names[-2]), read))

    return make


def _gathered(graph: Graph, node: Node, evaluate: Evaluate) -> Maker | None:
    """What makes a gather from a constant table, whose last position no data tell."""
    gather, table = node.primitive, node.operands[0]
    assert isinstance(gather, Gather)
    shape = graph.type(table).shape
    last = gather.indices[-1] if shape else None
    if last is None or isinstance(last, Indirect):
        return None
    names = tuple(f"t{n}" for n in range(len(shape)))
    space = _Space(graph, evaluate, names, shape, -1)
    kept = space.choose(table, tuple(map(sym, names)), LEAST)
    if kept is None:
        return None

    def make(b: Builder, new: Mapping[Ref, Ref]) -> Ref:
        tensors = [new[ref] for ref in node.operands[1:]]
        facts = b.ranges(gather.symbols, node.type.shape)

        def read(array: Array, dtype: DType, group: int) -> Ref:
            at = (*gather.indices[:-1], floordiv(last, group, facts))
            table = b.constant(array, dtype)
            return b.gather(table, tensors, node.type.shape, gather.symbols, at)

        return kept.make(Reader(b, gather.symbols, node.type.shape, last, read))

    return make


@frozen
class Reader:
    """Where a new graph reads what is stored: values over `symbols`, of `shape`, each at place `k`
    along the axis of groups; `read` reads an array that has one element for so many of them."""

    b: Builder
    symbols: tuple[str, ...]
    shape: tuple[Expr, ...]
    k: Expr
    read: Callable[[Array, DType, int], Ref]

    def number(self, value: float | int | bool, dtype: DType) -> Ref:
        return self.b.scalar(value, dtype, self.shape)


@frozen
class Kept:
    """How to store and compute a value: the bits for an element of it, and what makes it."""

    bits: float
    make: Callable[[Reader], Ref]


@frozen
class _Space:
    """The elements of panels or of a table: their symbols and sizes, the axis of groups, and the
    guards outside which an element is 0 and never read."""

    graph: Graph
    evaluate: Evaluate
    symbols: tuple[str, ...]
    shape: tuple[Expr, ...]
    axis: int
    guard: tuple[Expr, ...] = ()

    @property
    def facts(self) -> Facts:
        return self.graph.facts.at_element(self.symbols, self.shape)

    @property
    def length(self) -> int:
        """The size of the axis of groups."""
        return self.shape[self.axis].as_int() or 0

    def choose(
        self, ref: Ref, at: tuple[Expr, ...], least: int, most: int = MOST_BITS
    ) -> Kept | None:
        """How to have a value at positions of it, if that is worth it for so many elements at
        least, and takes so many bits for each at most."""
        count = 1
        for size in self.shape:
            count *= size.as_int() or 0
        if count < least:
            return None
        kept = self._value(ref, at)
        return kept if kept.bits <= most else None

    def _value(self, ref: Ref, at: tuple[Expr, ...]) -> Kept:
        """The cheapest way to have a value: stored, or made of others."""
        node = self.graph.nodes[ref.node]
        primitive, dtype = node.primitive, node.types[ref.result].dtype
        if isinstance(primitive, View) and not primitive.guard:
            here = dict(zip(primitive.symbols, at, strict=True))
            below = (e.substitute(here, self.facts) for e in primitive.indices)
            return self._value(node.operands[0], tuple(below))
        if isinstance(primitive, Scalar):
            value = primitive.value
            return Kept(0.0, lambda r: r.number(value, dtype))
        group = self._group(at)
        stored = self._stored(ref, at, group)
        if not isinstance(primitive, Map):
            return stored
        parts = [self._value(operand, at) for operand in node.operands]
        bits = MAP_BITS / min(group, SHARED) + sum(part.bits for part in parts)
        if stored.bits <= bits:
            return stored

        def make(r: Reader) -> Ref:
            operands = [part.make(r) for part in parts]
            with r.b.at(node.span, node.stack, node.label):
                return r.b.add(primitive, operands, (TensorType(dtype, r.shape),))[0]

        return Kept(bits, make)

    def _group(self, at: tuple[Expr, ...]) -> int:
        """How many adjacent elements, counted from 0, always find the same one."""
        k = self.symbols[self.axis]
        if not any(k in e.symbols() for e in at):
            return max(self.length, 1)
        for size in (n for n in range(self.length // 2, 1, -1) if self.length % n == 0):
            place = {k: sym("block'") * size + sym("rest'")}
            facts = self.facts.with_ranges(
                {"block'": (0, self.length // size - 1), "rest'": (0, size - 1)}
            )
            if all("rest'" not in e.substitute(place, facts).symbols() for e in at):
                return size
        return 1

    def _stored(self, ref: Ref, at: tuple[Expr, ...], group: int) -> Kept:
        dtype = self.graph.type(ref).dtype
        if dtype.is_int and group == 1:
            low, bits = _range_of(self.evaluate(ref))
            planes = PLANES.get(bits, ())
            if planes and sum(planes) < dtype.bits:
                cost = sum(planes) + 2 * MAP_BITS * sum(width < 8 for width in planes)
                return Kept(cost, lambda r: self._planes(r, ref, at, low, planes))
        return Kept(dtype.bits / group, lambda r: r.read(self._image(ref, at, group), dtype, group))

    def _image(self, ref: Ref, at: tuple[Expr, ...], group: int) -> Array:
        """A constant at the elements of this space, once for each group."""
        dtype, shape = self.graph.type(ref).dtype, list(self.shape)
        shape[self.axis] = const(-(-self.length // group))
        k = self.symbols[self.axis]
        indices = tuple(e.substitute({k: sym(k) * group}) for e in at)
        view = View(self.symbols, indices, self.guard, 0.0 if dtype.is_float else 0)
        node = Node(-1, view, (ref,), (TensorType(dtype, tuple(shape)),))
        return evaluate_node(self.graph, node, [self.evaluate(ref)])[0]

    def _planes(
        self, r: Reader, ref: Ref, at: tuple[Expr, ...], low: int, planes: Sequence[int]
    ) -> Ref:
        """Integers from their bits, those at a place in planes of their own."""
        b, codes = r.b, self._image(ref, at, 1).astype(np.int64) - low
        total, done = None, 0
        for width in planes:
            each = 8 // width
            bits = _packed(codes >> done & (1 << width) - 1, width, self.axis)
            code = b.cast(r.read(bits, U8, each), I32)
            if each > 1:
                place = b.position(r.shape, r.symbols, mod(r.k, each) * width)
                code = b.map("shr", code, b.cast(place, I32))
                code = b.map("bitand", code, r.number((1 << width) - 1, I32))
            if done:
                code = b.map("shl", code, r.number(done, I32))
            total = code if total is None else b.map("bitor", total, code)
            done += width
        assert total is not None
        if low:
            total = b.map("add", total, r.number(low, I32))
        return b.cast(total, self.graph.type(ref).dtype)


def _range_of(codes: Array) -> tuple[int, int]:
    """The least of integers and the bits that tell them, so that all layers of a model have the
    same: from 0, or from a power of two below it."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if low >= 0:
        return 0, max(high.bit_length(), 1)
    bits = max((-low - 1).bit_length(), high.bit_length())
    return -(1 << bits), bits + 1


def _packed(codes: Array, width: int, axis: int) -> Array:
    """Codes of so many bits, adjacent ones along an axis in a byte, the first of them lowest."""
    each = 8 // width
    codes = np.moveaxis(codes, axis, -1)
    codes = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, -codes.shape[-1] % each)])
    parts = codes.reshape(*codes.shape[:-1], -1, each) << np.arange(each) * width
    return np.moveaxis(np.bitwise_or.reduce(parts, axis=-1).astype(np.uint8), -1, axis)
