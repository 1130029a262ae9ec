"""Who runs next, where a group of threads has let others go on.

Nothing on a GPU makes who signals wait for who was signalled. Here one of them runs first, and if
that were always the one that signals, it would do all its work before the other begins: what the
other misses, such as a buffer that is overwritten too early, would go unseen. So who signals lets
others run until they wait again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import Fault, Stop

if TYPE_CHECKING:
    from stagefuse.compiler.ptx.syntax import Instruction

    from .groups import Group
    from .machine import Batch

Array = NDArray[Any]
MOST_WAYS = 16
"""How often others run before a release, at most."""
MOST_STEPS = 200
"""How many turns others get, at most, to come to what was read too early."""


_WIDE = frozenset(("gpu", "gl", "sys"))


def releases(x: Instruction) -> bool:
    """Whether an instruction orders what was done before for threads of other blocks.

    A release, or the fence that stands before a relaxed one.
    """
    words = set(x.modifiers)
    if x.opcode in ("membar", "fence"):
        return bool(words & _WIDE) and "acquire" not in words
    return x.opcode in ("st", "red", "atom") and bool(words & {"release", "acq_rel"}) and (
        bool(words & _WIDE))  # fmt: skip


def gives_way(g: Group) -> bool:
    """Lets groups run before a release at which one stands, as long as that changes anything."""
    progress = g.batch.machine.progress
    if len(g.gave_way) == MOST_WAYS or progress in g.gave_way:
        return False
    g.gave_way += (progress,)
    let_others_run(g)
    return True


def wrote(g: Group, addresses: Array) -> None:
    """Lets groups run that look at memory which a group has written."""
    first, last = int(addresses[0]), int(addresses[-1])
    if any(a <= last and first <= b
           for o in g.batch.ready.values() for _, a, b in o.places):  # fmt: skip
        let_others_run(g)


def let_others_run(g: Group | None) -> None:
    """Lets groups run before the one that runs goes on, and those that share a warp with it.

    Lanes of its warps go on together with it, as they are to meet again.
    """
    if g is None:
        return
    batch = g.batch
    mine = np.zeros(batch.warps, np.bool_)
    mine[g.threads() // 32] = True
    mates, turn = [g], g.turn
    for other in batch.ready.values():
        if mine[other.threads() // 32].any():
            mates.append(other)
        else:
            turn = max(turn, other.turn + 1)
    for mate in mates:
        mate.turn = max(mate.turn, turn)


def race_behind(batch: Batch, stop: Stop) -> Fault | None:
    """The race that reading what nothing wrote is part of, if others still come to write it.

    Who reads too early finds, by whose turn it is, what was written too late or nothing at all.
    Without the group that read, the others go on for a while.
    """
    if stop.kind != "uninitialised" or batch.state.get("was read early"):
        return None
    batch.state["was read early"] = True
    for _ in range(MOST_STEPS):
        try:
            if not batch.step():
                return None
        except Fault as later:
            return later if later.kind == "race" else None
    return None
