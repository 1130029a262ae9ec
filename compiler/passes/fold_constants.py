"""Computes while compiling what depends on weights and constants alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import numpy as np

from stagefuse.compiler.graph import (
    Constant,
    Contract,
    Graph,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    View,
    Weight,
)
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import OutOfRange, evaluate_node
from stagefuse.compiler.patterns.codes import kept_codes
from stagefuse.compiler.patterns.narrow import widened
from stagefuse.compiler.recurrence import Nests, symbols_of
from stagefuse.compiler.scalar import apply, wide
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .record import Pass

SOURCES = (Weight, Constant, Scalar, Position)
GROWTH = 2
"""A folded tensor may be this many times as large as what it is computed from."""
MOST = 1 << 24
"""Elements that are computed while compiling, also where most are repeated."""


@frozen
class FoldConstants(Pass):
    """What depends on weights and constants alone becomes a constant; `load` reads the weights.

    Of what is repeated along an axis one element is stored. A result much larger than what it is
    computed from stays: it would only fill the plan. So does a tensor that is stored anyway in
    another shape, such as a table of embeddings that is the last layer's matrix too, and so do
    codes and scales, which products and gathers unfold as they read them. With
    `narrow`, so does a large weight that is stored in fewer bits than it is used in, where its
    readers can convert what they read as kernels for GPUs do.
    """

    name: ClassVar[str] = "fold_constants"
    requires: ClassVar[tuple[str, ...]] = ("products-found",)
    establishes: ClassVar[tuple[str, ...]] = ("constants-folded",)
    load: Callable[[str, str], np.ndarray[Any, Any]] = field(repr=False)
    narrow: bool = False

    def run(self, graph: Graph) -> Graph:
        return fold_constants(graph, self.load, self.narrow)


def fold_constants(
    graph: Graph, load: Callable[[str, str], np.ndarray[Any, Any]], narrow: bool = False
) -> Graph:
    """The graph with constant tensors in place of the nodes that compute them.

    Only the last node of a constant chain is stored; a broadcast is left to the kernels, and so is
    what takes an item that is not there: they report it.
    """
    known = _constant_nodes(graph)
    while True:
        try:
            return _folded(graph, set(known), load, narrow)
        except OutOfRange as found:
            known -= {found.node.id}
            for node in graph.nodes.values():
                if not known.issuperset(ref.node for ref in node.operands):
                    known.discard(node.id)


def _folded(
    graph: Graph,
    known: set[int],
    load: Callable[[str, str], np.ndarray[Any, Any]],
    narrow: bool,
) -> Graph:
    """The graph with constants in place of known nodes. Raises OutOfRange."""
    builder = Builder(graph.facts)
    new: dict[Ref, Ref] = {}
    cache: dict[Ref, np.ndarray[Any, Any]] = {}
    kept = kept_codes(
        graph,
        known,
        lambda ref: _evaluate(graph, graph.nodes[ref.node], load, cache)[ref.result],
        narrow,
    )
    if narrow:
        late = widened(graph, known, kept)
        known -= late
        kept = {ref: maker for ref, maker in kept.items() if ref.node not in late}
    repeated = _repeated(graph, known)
    wanted = set(graph.results)
    panels = {n.operands[1] for n in graph.nodes.values() if isinstance(n.primitive, Contract)}
    for node in graph.nodes.values():
        if node.id not in known:
            wanted.update(node.operands[1:] if Ref(node.id) in kept else node.operands)

    def is_folded(node: Node) -> bool:
        if node.id not in known or isinstance(node.primitive, SOURCES):
            return False
        once = repeated[node.id]
        again = Ref(node.id) not in panels and _is_stored(graph, node, wanted)
        return not again and not _only_repeats(graph, node, once) and _worth(graph, node, once)

    for node in reversed(graph.nodes.values()):
        own = {Ref(node.id, i) for i in range(len(node.types))}
        if node.id in known and Ref(node.id) not in kept and wanted & own and not is_folded(node):
            wanted.update(node.operands)  # it is left to the kernels, what it is made of is not
    for node in graph.nodes.values():
        with builder.at(node.span, node.stack, node.label):
            refs = [Ref(node.id, i) for i in range(len(node.types))]
            if refs[0] in kept:
                new[refs[0]] = kept[refs[0]](builder, new)
                continue
            if is_folded(node):
                if wanted & set(refs):
                    arrays = _evaluate(graph, node, load, cache)
                    for ref, array, type in zip(refs, arrays, node.types, strict=True):
                        new[ref] = _once(builder, array, type, repeated[node.id])
                    continue
            operands = [new[ref] for ref in node.operands if ref in new]
            if len(operands) == len(node.operands):
                made = builder.add(node.primitive, operands, node.types)
                new.update(zip(refs, made, strict=True))
    builder.graph.results = tuple(new[ref] for ref in graph.results)
    return builder.graph.live()


def _constant_nodes(graph: Graph) -> set[int]:
    """The nodes whose values are known: of static shapes, of known operands, and at positions that
    no size decides, as it does in `w[N - 1]`."""
    known: set[int] = set()
    depends = Nests(graph).depends
    dims = [d for node in graph.nodes.values() for t in node.types for d in t.shape]
    sizes = frozenset[str]().union(*(d.symbols() for d in dims))
    for node in graph.nodes.values():
        static = all(d.as_int() is not None for t in node.types for d in t.shape)
        if depends.get(node.id) or not static or symbols_of(node.primitive) & sizes:
            continue
        if isinstance(node.primitive, SOURCES):
            known.add(node.id)
        elif node.operands and not isinstance(node.primitive, Contract):
            if all(ref.node in known for ref in node.operands):
                known.add(node.id)
    return known


def _is_stored(graph: Graph, node: Node, wanted: set[Ref]) -> bool:
    """Whether a node is a tensor that is wanted itself, in another shape but the same order."""
    view = node.primitive
    if not isinstance(view, View) or view.guard or node.operands[0] not in wanted:
        return False
    if not isinstance(graph.nodes[node.operands[0].node].primitive, Weight | Constant):
        return False
    shape, stored = node.types[0].shape, graph.type(node.operands[0]).shape
    here = [(sym(s), n) for s, n in zip(view.symbols, shape, strict=True) if n.as_int() != 1]
    there = [(at, n) for at, n in zip(view.indices, stored, strict=True) if n.as_int() != 1]
    return here == there


def _size(graph: Graph, ref: Ref) -> int:
    total = 1
    for dim in graph.type(ref).shape:
        total *= dim.as_int() or 0
    return total


def _worth(graph: Graph, node: Node, repeated: frozenset[int]) -> bool:
    """Whether the result is not much larger than the stored tensors behind it, if there are any; of
    what is repeated in it one is stored."""
    behind: set[int] = set()
    pending = [node.id]
    while pending:
        here = pending.pop()
        if here not in behind:
            behind.add(here)
            pending.extend(ref.node for ref in graph.nodes[here].operands)
    tensors = [n for n in behind if isinstance(graph.nodes[n].primitive, Weight | Constant)]
    stored = sum(_size(graph, Ref(n)) for n in tensors)
    size = _size(graph, Ref(node.id))
    once = size // max(math.prod(node.type.shape[a].as_int() or 0 for a in repeated), 1)
    if repeated and size > MOST:
        return False
    return bool(tensors) and once <= max(GROWTH * stored, 64 * 1024)


def _repeated(graph: Graph, known: set[int]) -> dict[int, frozenset[int]]:
    """The axes along which known nodes are the same everywhere, but those of one element."""
    found: dict[int, frozenset[int]] = {}
    for node in graph.nodes.values():
        if node.id in known:
            varying, shape = _varying(node, found), node.type.shape
            axes = set(range(node.type.rank)) - varying
            found[node.id] = frozenset(a for a in axes if shape[a].as_int() != 1)
    return found


def _varying(node: Node, repeated: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The axes along which a node may change, given those along which its operands do not."""
    primitive, axes = node.primitive, frozenset(range(node.type.rank))
    if isinstance(primitive, Scalar):
        return frozenset()
    if isinstance(primitive, Map):
        return frozenset[int]().union(*(axes - repeated[ref.node] for ref in node.operands))
    if isinstance(primitive, View):
        same = repeated[node.operands[0].node]
        read = [e for a, e in enumerate(primitive.indices) if a not in same]
        names = frozenset[str]().union(*(e.symbols() for e in (*read, *primitive.guard)))
        return frozenset(a for a, name in enumerate(primitive.symbols) if name in names)
    return axes


def _only_repeats(graph: Graph, node: Node, repeated: frozenset[int]) -> bool:
    """Whether a node is a stored tensor whose elements are repeated in order."""
    view = node.primitive
    if not isinstance(view, View) or view.guard or not repeated:
        return False
    if not isinstance(graph.nodes[node.operands[0].node].primitive, SOURCES):
        return False
    once = [(sym(s), n) for a, (s, n) in enumerate(zip(view.symbols, node.type.shape, strict=True))
            if a not in repeated and n.as_int() != 1]  # fmt: skip
    shape = graph.type(node.operands[0]).shape
    return once == [(at, n) for at, n in zip(view.indices, shape, strict=True) if n.as_int() != 1]


def _once(
    b: Builder, array: np.ndarray[Any, Any], type: TensorType, repeated: frozenset[int]
) -> Ref:
    """A constant, of whose repeated elements one is stored."""
    one = array[tuple(slice(0, 1) if a in repeated else slice(None) for a in range(array.ndim))]
    stored = b.constant(one, type.dtype)
    if not repeated:
        return stored

    def place(*at: Expr) -> list[Expr]:
        return [const(0) if a in repeated else e for a, e in enumerate(at)]

    return b.view(stored, type.shape, place)


def _evaluate(
    graph: Graph,
    node: Node,
    load: Callable[[str, str], np.ndarray[Any, Any]],
    cache: dict[Ref, np.ndarray[Any, Any]],
) -> list[np.ndarray[Any, Any]]:
    refs = [Ref(node.id, i) for i in range(len(node.types))]
    if all(ref in cache for ref in refs):
        return [cache[ref] for ref in refs]
    if isinstance(node.primitive, Weight):
        arrays = [load(node.primitive.weights, node.primitive.key)]
    else:
        arrays = evaluate_node(graph, node, _operands(graph, node, load, cache))
    for ref, array in zip(refs, arrays, strict=True):
        cache[ref] = array
    return arrays


def _operands(
    graph: Graph,
    node: Node,
    load: Callable[[str, str], np.ndarray[Any, Any]],
    cache: dict[Ref, np.ndarray[Any, Any]],
) -> list[np.ndarray[Any, Any]]:
    """What a node is computed from. Products that are summed are not rounded before, as kernels
    do not round them either: in 16 bits each would lose as much as the whole sum."""
    summed = isinstance(node.primitive, Reduce) and node.primitive.kind == "sum"
    found = []
    for ref in node.operands:
        maker = graph.nodes[ref.node]
        if summed and maker.primitive == Map("mul") and maker.type.dtype.is_float:
            factors = [wide(a) for a in _operands(graph, maker, load, cache)]
            found.append(apply("mul", factors, maker.type.dtype, rounded=False))
        else:
            found.append(_evaluate(graph, maker, load, cache)[ref.result])
    return found
