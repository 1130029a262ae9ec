"""Rules about the lanes of a warp that execute an instruction together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Stop

if TYPE_CHECKING:
    from .machine import Group

_ALL = 0xFFFFFFFF


def check_masks(g: Group, masks: Any) -> None:
    """Raises: Stop where a thread's mask does not name the thread itself.

    PTX ISA, `shfl.sync` and the others with a mask: that is undefined.
    """
    if not masks.ndim and int(masks) == _ALL:
        return
    lanes = (g.threads() % 32).astype(np.uint32)
    out = (np.broadcast_to(masks, (g.n,)) >> lanes & np.uint32(1)) == 0
    if out.any():
        at = int(np.flatnonzero(out)[0])
        mask = int(np.broadcast_to(masks, (g.n,))[at])
        text = f"lane {int(lanes[at])} is not in the mask {mask:#010x} that it gives"
        raise Stop("barrier", text, int(g.threads()[at]))


def check_whole(g: Group) -> None:
    """Raises: Stop where lanes of a thread's warp have ended.

    PTX ISA, `mma`, `ldmatrix` and the others on matrices: that is undefined.
    """
    batch = g.batch
    if batch.alive_count == batch.blocks * batch.block_threads:
        return
    ended = batch.exists & ~batch.alive
    counts = np.count_nonzero(ended.reshape(-1, 32), axis=1)[g.threads() // 32]
    if counts.any():
        at = int(np.flatnonzero(counts)[0])
        text = f"the whole warp has to execute this, and {int(counts[at])} of its lanes have ended"
        raise Stop("barrier", text, int(g.threads()[at]))
