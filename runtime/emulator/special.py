"""Special registers (PTX ISA, "Special Registers")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import Stop

if TYPE_CHECKING:
    from .machine import Batch

Array = NDArray[Any]
_AXES = {"x": 0, "y": 1, "z": 2}
SM_COUNT = 132
SM_WARPS = 64
"""Numbers of warps on an SM, which are more than a block has."""
RESERVED_BYTES = 1024
"""The shared memory of a block that CUDA keeps for itself (cooperative groups use it)."""


def special_value(batch: Batch, name: str) -> Array:
    """The values of a special register for all threads of a batch."""
    machine = batch.machine
    within = batch.within
    block = batch.first + batch.block_of
    stem, _, axis = name[1:].partition(".")
    if axis == "w":
        return np.zeros(batch.threads, np.uint32)
    if stem == "tid":
        key = (batch.blocks, name)
        if key not in machine.specials:
            found = _unravel(within, machine.block)[_AXES[axis]]
            machine.specials[key] = found.astype(np.uint32)
        return machine.specials[key].copy()
    if axis:
        of = _AXES[axis]
        clusters = tuple(g // c for g, c in zip(machine.grid, machine.cluster, strict=True))
        numbers = batch.first + np.arange(batch.blocks)
        ctaid = [np.repeat(x, batch.stride) for x in _unravel(numbers, machine.grid)]
        sizes = {
            "ntid": machine.block, "nctaid": machine.grid, "cluster_nctaid": machine.cluster,
            "nclusterid": clusters,
        }  # fmt: skip
        if stem in sizes:
            return np.full(batch.threads, sizes[stem][of], np.uint32)
        found = {
            "ctaid": lambda: ctaid[of],
            "cluster_ctaid": lambda: ctaid[of] % machine.cluster[of],
            "clusterid": lambda: ctaid[of] // machine.cluster[of],
        }[stem]()
        return found.astype(np.uint32)
    return _scalar(batch, stem, within, block)


def _unravel(index: Array, sizes: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    x, y, _ = sizes
    return index % x, index // x % y, index // (x * y)


def cluster_rank(batch: Batch, block: Array) -> Array:
    """The rank of a block, counted in the grid, within its cluster."""
    cluster = batch.machine.cluster
    x, y, z = _unravel(block, batch.machine.grid)
    rank: Array = (x % cluster[0]) + cluster[0] * ((y % cluster[1]) + cluster[1] * (z % cluster[2]))
    return rank


def _scalar(batch: Batch, stem: str, within: Array, block: Array) -> Array:
    machine = batch.machine
    lane = within % 32
    one = np.uint64(1)
    bit = one << lane.astype(np.uint64)
    full = np.uint64(0xFFFFFFFF)
    masks = {
        "lanemask_eq": lambda: bit,
        "lanemask_lt": lambda: bit - one,
        "lanemask_le": lambda: (bit << one) - one,
        "lanemask_gt": lambda: full & ~((bit << one) - one),
        "lanemask_ge": lambda: full & ~(bit - one),
    }
    if stem in masks:
        return masks[stem]().astype(np.uint32)
    if stem in ("clock", "clock64", "globaltimer", "globaltimer_lo", "globaltimer_hi", "clock_hi"):
        machine.clock += 32
        wide = stem in ("clock64", "globaltimer")
        value = 0 if stem.endswith("_hi") else machine.clock
        return np.full(batch.threads, value, np.uint64 if wide else np.uint32)
    cluster = machine.cluster[0] * machine.cluster[1] * machine.cluster[2]
    values: dict[str, Any] = {
        "laneid": lane,
        "warpid": within // 32,
        "nwarpid": SM_WARPS,
        "smid": block % SM_COUNT,
        "nsmid": SM_COUNT,
        "gridid": 0,
        "cluster_ctarank": cluster_rank(batch, block),
        "cluster_nctarank": cluster,
        "is_explicit_cluster": cluster > 1,
        "dynamic_smem_size": machine.dynamic_bytes,
        "total_smem_size": machine.shared_bytes,
        "aggr_smem_size": machine.shared_bytes,
        "reserved_smem_offset_begin": machine.reserved_offset,
        "reserved_smem_offset_end": machine.reserved_offset + RESERVED_BYTES,
        "reserved_smem_offset_cap": machine.reserved_offset + RESERVED_BYTES,
        "reserved_smem_offset_0": machine.reserved_offset,
        "reserved_smem_offset_1": machine.reserved_offset,
    }
    if stem in ("envreg1", "envreg2"):
        # where cooperative groups keep the barrier of a grid, as the CUDA driver gives it
        at = machine.grid_workspace()
        half = at >> 32 if stem == "envreg1" else at & 0xFFFFFFFF
        return np.full(batch.threads, half, np.uint32)
    if stem not in values:
        raise Stop("trap", f"the special register %{stem} has no value here")
    wide = stem == "gridid"
    if stem == "is_explicit_cluster":
        return np.full(batch.threads, values[stem], np.bool_)
    return np.broadcast_to(
        np.asarray(values[stem]).astype(np.uint64 if wide else np.uint32), (batch.threads,)
    ).copy()
