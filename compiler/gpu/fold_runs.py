"""Reductions over the same elements, brought beside each other: one loop reads what all need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import Fold, Let, Load, Local, Statement, Store

MOST = 6
"""Reductions of one loop."""


def runs(body: Sequence[Statement]) -> list[list[Statement]]:
    """Statements in an order that is right, reductions over the same loops together as far as none
    needs what another one, or what lies between, makes; all others by themselves."""
    found: list[list[Statement]] = []
    for s in body:
        place = _place(found, s) if isinstance(s, Fold) else None
        if place is None:
            found.append([s])
        else:
            found[place].append(s)
    return found


def _place(found: Sequence[Sequence[Statement]], s: Fold) -> int | None:
    """The run that a reduction may be part of."""
    needed = _needs(s)
    for place in reversed(range(len(found))):
        run = found[place]
        if any(_makes(x) & needed for x in run):
            return None
        first = run[0]
        if isinstance(first, Fold) and len(run) < MOST and first.loops == s.loops:
            if first.kind.startswith("arg") == s.kind.startswith("arg"):
                return place
    return None


def _needs(s: Fold) -> set[str]:
    parts = list(post_order(s.value))
    loads = {p.buffer for p in parts if isinstance(p, Load)}
    return loads | {p.name for p in parts if isinstance(p, Local)}


def _makes(s: Statement) -> set[str]:
    """The names and buffers that a statement gives values to."""
    made: set[str] = set()
    for x in walk([s]):
        if isinstance(x, Fold | Let):
            made.add(x.name)
        elif isinstance(x, Store):
            made.add(x.buffer)
        else:  # whatever it names may be written
            made |= {v for f in fields(x) if isinstance(v := getattr(x, f.name), str)}
    return made
