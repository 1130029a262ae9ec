"""What a driver refuses to launch: sizes beyond what a target, or the kernel itself, allows.

Limits are those of the compute capability tables of the CUDA C++ Programming Guide; shared memory
and clusters as for kernels that asked for all they may have.
"""

from __future__ import annotations

from math import prod

from stagefuse.compiler.ptx.check import target_number

from .layout import Layout
from .machine import Dim
from .program import Code

STATIC_SHARED = 48 << 10
"""Bytes of shared variables that a block may have; more must be dynamic."""
SHARED = ((70, 96), (75, 64), (80, 163), (86, 99), (87, 163), (89, 99), (90, 227))
"""KiB of shared memory that a block may have in all, from a compute capability on."""
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_THREADS = (1024, 1024, 64)
BLOCK_THREADS = 1024
CLUSTER_BLOCKS = 16
CLUSTERS_SINCE = 90


def shared_limit(target: str) -> int:
    """Bytes of shared memory that a block may have on a target."""
    number, _ = target_number(target)
    return next((kib for since, kib in reversed(SHARED) if number >= since), 48) << 10


def cluster_of(code: Code, given: Dim) -> Dim:
    """The size of clusters of a launch: what it says, else what the kernel does.

    Raises: ValueError where they differ.
    """
    said = code.function.directive("reqnctapercluster")
    if said is None:
        return given
    x, y, z = (*map(int, said), 1, 1, 1)[:3]
    if given not in ((1, 1, 1), (x, y, z)):
        raise ValueError(f"`{code.name}` is for clusters of {(x, y, z)}, and these are {given}")
    return x, y, z


def check_launch(
    target: str, code: Code, layout: Layout, grid: Dim, block: Dim, cluster: Dim, shared_bytes: int
) -> None:
    """Raises: ValueError where a driver would not launch this."""
    _check_block(code, block)
    if any(not 1 <= n <= most for n, most in zip(grid, MOST_BLOCKS, strict=True)):
        raise ValueError(f"a grid of {grid} blocks; at most {MOST_BLOCKS} are allowed")
    _check_cluster(target, code, grid, cluster)
    static, most = layout.dynamic_offset, shared_limit(target)
    if static > STATIC_SHARED:
        raise ValueError(f"`{code.name}` has {static} bytes of shared variables, and "
                         f"{STATIC_SHARED} are allowed: more must be dynamic")  # fmt: skip
    if shared_bytes < 0 or static + shared_bytes > most:
        raise ValueError(f"{shared_bytes} bytes of dynamic shared memory, besides {static} of "
                         f"variables; {target} has {most} for a block")  # fmt: skip


def _check_block(code: Code, block: Dim) -> None:
    said = code.function.directive("reqntid")
    if said is not None and (*map(int, said), 1, 1, 1)[:3] != block:
        raise ValueError(f"`{code.name}` is for blocks of {said}, and this is {block}")
    limit = code.function.directive("maxntid")
    most = BLOCK_THREADS if limit is None else prod(map(int, limit))
    if not 0 < prod(block) <= most:
        raise ValueError(f"a block of {prod(block)} threads, and `{code.name}` allows {most}")
    if any(n > limit for n, limit in zip(block, MOST_THREADS, strict=True)):
        raise ValueError(f"a block of {block} threads; at most {MOST_THREADS} are allowed")


def _check_cluster(target: str, code: Code, grid: Dim, cluster: Dim) -> None:
    said = code.function.directive("maxclusterrank")
    most = CLUSTER_BLOCKS if said is None else int(said[0])
    if not 0 < prod(cluster) <= most:
        raise ValueError(f"clusters of {cluster} blocks; at most {most} are allowed")
    if prod(cluster) > 1 and target_number(target)[0] < CLUSTERS_SINCE:
        raise ValueError(f"clusters of {cluster} blocks, and {target} has no clusters")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise ValueError(f"a grid of {grid} blocks in clusters of {cluster}")
