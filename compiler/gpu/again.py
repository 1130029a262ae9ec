"""What kernels compute and read again and again, and what they never read: `report` counts all of
their buffers once."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.buffers import size_of
from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.graph import Graph, Scatter, Sort
from stagefuse.compiler.kernel_ir import For, Index, SortDigit, SortRow, Statement
from stagefuse.compiler.lower import Lowered
from stagefuse.dsl.dims import Expr, const

from .predict import UNLIMITED
from .private import accesses
from .sequences.scatter import is_sparse

_COMPARED = 48
"""What an element costs at each of a sort's stages, as operations at full rate: from the 169 us
that 4096 rows of 1024 took on an H100."""
_DIGIT = 152
"""What an element costs at each digit of a sort: 76 instructions on `sm_90a` by nvdisasm, each of
which takes as long as two operations."""
_POSITION = 8  # bytes


def again(graph: Graph, lowered: Lowered, in_memory: bool) -> tuple[Expr, Expr]:
    """The operations, and the bytes from and to memory, of what is done more than once, less what
    is not done at all.

    A sort goes over its elements once for each digit, or each stage of a network, then beyond
    shared memory if `in_memory`; each range of a scatter reads all positions.
    """
    work, moved = const(0), const(0)
    for node in map(graph.nodes.get, lowered.nodes):
        if node is None:
            continue
        if isinstance(node.primitive, Sort):
            statements = list(walk(lowered.kernel.body))
            if any(isinstance(s, SortDigit) for s in statements):
                work = work + size_of(node.type.shape) * (_digits(statements) * _DIGIT)
            if not any(isinstance(s, SortRow) for s in statements):
                continue
            stages = _stages(graph, node.type.shape[node.primitive.axis])
            elements = size_of(node.type.shape) * stages
            work = work + elements * _COMPARED
            if in_memory:
                width = node.type.dtype.compute.itemsize + _POSITION
                moved = moved + elements * (2 * width)
        elif isinstance(node.primitive, Scatter):
            (count,) = graph.type(node.operands[1]).shape
            if any(isinstance(s, SortDigit) for s in walk(lowered.kernel.body)):
                work = work + count * _DIGIT
            if not any(is_sparse(s) for s in walk(lowered.kernel.body)):
                continue
            teams = size_of([extent for _, extent in lowered.kernel.parallel])
            moved = moved + teams * count * _POSITION
    return work, moved - _unread(lowered)


def _unread(lowered: Lowered) -> Expr:
    """The bytes that a kernel leaves of what others make for it: along an axis on which it reads
    the same places in all of its loops, all others."""
    dims, left = set(lowered.kernel.dims), const(0)
    found = list(accesses(lowered.kernel.body))
    for ref, buffer in zip(lowered.values, lowered.kernel.buffers, strict=True):
        own = [a for a in found if a.buffer == buffer.name]
        if ref.node >= 0 or buffer.mode != "in" or not own or not all(a.indices for a in own):
            continue
        read = const(1)
        for axis, extent in enumerate(buffer.shape):
            places = {a.indices[axis] for a in own}
            fixed = all(isinstance(at, Index) and at.expr.symbols() <= dims for at in places)
            read = read * (const(len(places)) if fixed else extent)
        left = left + (size_of(buffer.shape) - read) * buffer.dtype.itemsize
    return left


def _digits(statements: Sequence[Statement]) -> int:
    """By how many digits a kernel sorts."""
    times = 0
    for s in statements:
        if isinstance(s, For) and any(isinstance(x, SortDigit) for x in s.body):
            times += (s.hi - s.lo).as_int() or 1
    return times or 1


def _stages(graph: Graph, length: Expr) -> int:
    """Of a bitonic network for rows of the greatest length."""
    most = graph.facts.bounds(length)[1]
    doublings = ((UNLIMITED if most is None else max(most, 1)) - 1).bit_length()
    return doublings * (doublings + 1) // 2
