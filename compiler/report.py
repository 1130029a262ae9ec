"""What a kernel's report says for any target: its work, its source lines, and why it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stagefuse.dsl.dims import Expr, const, minimum

from .buffers import size_of
from .cpu.bodies import walk
from .fusion.groups import Decision, flops
from .graph import Contract, Gather, Graph, Map, Node, Recurrence, Reduce, Ref, Scan, Update, View
from .kernel_ir import Buffer, Kernel, TileProduct
from .lower import Lowered


def report(
    graph: Graph,
    lowered: Lowered,
    decisions: Mapping[int, Decision],
    passed: Mapping[Any, str],
    nest: Sequence[str] = (),
) -> dict[str, Any]:
    """Bytes and arithmetic as expressions, lines, fused nodes, and the reasons for fusing them;
    of a kernel with products also their tiles, and of one in recurrences how often it runs."""
    nodes = [graph.nodes[n] for n in lowered.nodes]
    work, moved = work_of(graph, lowered)
    fused = [describe(n) for n in nodes if isinstance(n.primitive, Map | Reduce) or
             _type_name(n) in ("Contract", "Scan", "Sort", "Scatter", "Gather")]  # fmt: skip
    reasons = [
        {"node": describe(graph.nodes[n]), "fused": decisions[n].fused,
         "because": decisions[n].reason}
        for n in lowered.nodes if n in decisions
    ]  # fmt: skip
    reasons += [
        {"node": describe(n), "fused": not text.startswith("not "), "because": text}
        for n in nodes if isinstance(n.primitive, Contract)
        for text in (passed.get((n.span, n.stack)),) if text is not None
    ]  # fmt: skip
    return {
        "bytes": str(moved), "flops": str(work), "lines": _lines(nodes), "fused": fused,
        "reasons": reasons,
        **_structure(lowered.kernel),
        **({"turns": str(turns_of(graph, nest))} if nest else {}),
    }  # fmt: skip


def _structure(kernel: Kernel) -> dict[str, str]:
    tiles = [f"{s.mr} x {s.nr}" for s in walk(kernel.body) if isinstance(s, TileProduct)]
    return {"structure": f"tiles of {' and '.join(dict.fromkeys(tiles))}"} if tiles else {}


def _lines(nodes: Sequence[Node]) -> list[int]:
    """The lines of the program that nodes come from; of a library's function those that call it."""
    places = [n.stack[0] if n.stack else n.span for n in nodes]
    return sorted({place.line for place in places if place is not None})


def turns_of(graph: Graph, nest: Sequence[str]) -> Expr:
    """How often the body of some recurrences, one inside the other, runs."""
    total = const(1)
    for node in graph.nodes.values():
        if isinstance(node.primitive, Recurrence) and node.primitive.step in nest:
            total = total * node.primitive.count
    return total


def work_of(graph: Graph, lowered: Lowered) -> tuple[Expr, Expr]:
    """The arithmetic of a kernel, and the bytes that it touches of its buffers."""
    work, moved = const(0), const(0)
    parts = [
        (-1 - ref.node, b) for ref, b in zip(lowered.values, lowered.kernel.buffers, strict=True)
        if ref.node < 0 and b.mode == "in" and _is_in_parts(graph, -1 - ref.node)
    ]  # fmt: skip
    for _, buffer in parts:  # of what another kernel has computed in parts
        work = work + size_of(buffer.shape)
    done = _left(graph, lowered, {number for number, _ in parts}) if parts else set[int]()
    for number in lowered.nodes:
        if number not in done:
            work = work + _work(graph, graph.nodes[number])
    for ref, buffer in zip(lowered.values, lowered.kernel.buffers, strict=True):
        moved = moved + _touched(graph, lowered, ref, buffer) * buffer.dtype.itemsize
    return work, moved


def _is_in_parts(graph: Graph, number: int) -> bool:
    return isinstance(graph.nodes[number].primitive, Contract | Reduce)


def _touched(graph: Graph, lowered: Lowered, ref: Ref, buffer: Buffer) -> Expr:
    """The elements of a buffer that a kernel reads or writes, at most.

    Of what it reads through index maps alone that is no more than these give, and of what it
    updates no more than it writes.
    """
    whole = size_of(buffer.shape)
    users = [n for n in map(graph.nodes.get, lowered.nodes) if n and ref in n.operands]
    for node in users:
        if isinstance(node.primitive, Update) and ref == node.operands[0]:
            return size_of(graph.type(node.operands[1]).shape)
    maps = [isinstance(n.primitive, View | Gather) and ref == n.operands[0] for n in users]
    if buffer.mode != "in" or not maps or not all(maps):
        return whole
    read = const(0)
    for node in users:
        read = read + size_of(node.type.shape)
    return minimum(whole, read, graph.facts)


def _left(graph: Graph, lowered: Lowered, made: set[int]) -> set[int]:
    """The nodes of a kernel that it does not compute, since it has parts of what is `made`."""
    written = zip(lowered.values, lowered.kernel.buffers, strict=True)
    pending = [ref.node for ref, b in written if ref.node >= 0 and b.mode != "in"]
    inside, found = set(lowered.nodes) - made, set[int]()
    while pending:
        number = pending.pop()
        if number in inside and number not in found:
            found.add(number)
            pending += [ref.node for ref in graph.nodes[number].operands]
    return set(lowered.nodes) - found


def describe(node: Node) -> str:
    """A node's operation in a word."""
    primitive = node.primitive
    if isinstance(primitive, Map):
        return primitive.fn
    if isinstance(primitive, Reduce):
        return primitive.kind
    return {"Contract": "matmul"}.get(_type_name(node), _type_name(node).lower())


def _type_name(node: Node) -> str:
    return type(node.primitive).__name__


def _work(graph: Graph, node: Node) -> Expr:
    if isinstance(node.primitive, Contract):
        return size_of(node.type.shape) * node.primitive.depth * 2
    if isinstance(node.primitive, Reduce | Scan):
        return size_of(graph.type(node.operands[0]).shape)
    return size_of(node.type.shape) * flops(node)
