"""The loops of reductions: those that lie behind each other in all that is read are one, as those
of height and width often are, and that along which memory runs is the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.merging import Shapes, fold_as_one
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import Alloc, Fold, For, If, Index, Kernel, Load, Statement
from stagefuse.dsl.dims import Expr, const


def by_memory(kernel: Kernel) -> Kernel:
    """The kernel, of which each reduction has few loops, and goes along memory in the last one.

    A convolution's are over channels, rows and columns of its windows, and where channels lie
    beside each other lanes would read elements that lie apart. That of an extreme's place stays,
    since places are numbered in its order.
    """
    shapes = {b.name: b.shape for b in kernel.buffers}
    shapes |= {s.name: s.shape for s in walk(kernel.body) if isinstance(s, Alloc)}

    def changed(s: Statement) -> Statement:
        if isinstance(s, Fold):
            return _ordered(fold_as_one(s, shapes), shapes)
        return replace(s, body=tuple(map(changed, s.body))) if isinstance(s, For | If) else s

    return replace(kernel, body=tuple(map(changed, kernel.body)))


def _ordered(s: Fold, shapes: Shapes) -> Fold:
    if s.kind.startswith("arg") or len(s.loops) < 2:
        return s
    places = [_place(part, shapes[part.buffer]) for part in post_order(s.value)
              if isinstance(part, Load) and part.buffer in shapes]  # fmt: skip
    along = [n for n, _ in s.loops if places and all(p.coefficient(n) == const(1) for p in places)]
    if len(along) != 1:
        return s
    last = [loop for loop in s.loops if loop[0] in along]
    return replace(s, loops=(*(x for x in s.loops if x not in last), *last))


def _place(load: Load, shape: Sequence[Expr]) -> Expr:
    """Where an element lies, as far as expressions say so."""
    place, step = const(0), const(1)
    for index, extent in reversed(list(zip(load.indices, shape, strict=True))):
        place = place + index.expr * step if isinstance(index, Index) else place
        step = step * extent
    return place
